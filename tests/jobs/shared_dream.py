"""A dream stage that goes on when it may. `python -m tests.jobs.shared_dream ADDRESS OUT` is a driver of Ray's."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from dreamgen.core.clip import Prompt
from dreamgen.stages.dream import dream
from tests.stages.drawn_world import DrawnWorld, prompts

CLIPS = 12


class Gated(DrawnWorld):
    """Dreams as long as `out` holds fewer clips than its file `allowed` says."""

    def __init__(self, out: str) -> None:
        super().__init__()
        self.out = Path(out)

    def denoise(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        while clips(self.out) >= int((self.out / "allowed").read_text() or 0):
            time.sleep(0.1)
        return super().denoise(prompts)


def clips(out: Path) -> int:
    """How many are there."""
    return len(list((out / "dreams" / "clips").glob("p*.json")))


def allow(out: Path, count: int) -> None:
    """Let the stage go on to so many clips."""
    (out / "allowed.new").write_text(str(count))
    (out / "allowed.new").replace(out / "allowed")


def listed() -> list[Prompt]:
    return prompts(CLIPS)


def build(out: str) -> Callable[..., dict]:
    """The stage; who has built it leaves its process id in `out`, once for each time."""
    note = Path(out) / "built" / str(os.getpid())
    note.parent.mkdir(parents=True, exist_ok=True)
    with note.open("a") as file:
        file.write("built\n")
    return partial(dream, Gated(out), listed, out=Path(out) / "dreams", batch_size=1, overlap=False, record={})


def shard_of(out: str, shard: int) -> dict:
    """One of two shares."""
    return build(out)(shard=shard, num_shards=2)


if __name__ == "__main__":
    from jobs.cluster import Ray
    from tests.jobs import shared_dream  # by its name, as workers know it

    found = Ray(address=sys.argv[1], workers=3).run(partial(shared_dream.build, sys.argv[2]), 6)
    sys.stdout.write(found["id"])
