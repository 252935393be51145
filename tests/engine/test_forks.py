"""Forks share their parent's memory, and leave alone what it has made."""

import gc
import os
from pathlib import Path

from dreamgen.engine.replicas import in_forks


class Threaded:
    """Like a decoder: to free it in a process that has not its threads would take for ever."""

    def __init__(self, freed: Path) -> None:
        self.freed, self.me = freed, self  # a cycle: collected some time, in whatever process that is

    def __del__(self) -> None:
        with self.freed.open("a") as file:
            file.write(f"{os.getpid()}\n")


def test_forks_do_not_free_what_their_parent_has_made(tmp_path) -> None:
    freed, made = tmp_path / "freed", []

    def work(rank: int) -> None:
        made.clear()
        gc.collect()
        (tmp_path / str(rank)).write_text(str(os.getpid()))

    gc.disable()
    try:
        Threaded(freed)  # garbage when the fork begins
        made.append(Threaded(freed))  # garbage soon after, in both
        in_forks(work, 2)
    finally:
        gc.enable()
    assert (tmp_path / "1").read_text() != str(os.getpid()) == (tmp_path / "0").read_text()
    assert freed.read_text().split() == [str(os.getpid())] * 2
    assert gc.get_freeze_count() == 0
