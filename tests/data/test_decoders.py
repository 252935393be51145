"""Decoders that a forked process inherits, and threads that share them."""

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dreamgen.data.decoders import Decoders
from dreamgen.video.mp4 import write_mp4


def test_a_forked_process_collects_its_parents_garbage_and_lives(tmp_path):
    """A decoder that is closed there waits for threads that did not follow, and aborts the process."""
    path = tmp_path / "a.mp4"
    video = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    write_mp4(path, video, 10)
    gc.collect()
    gc.disable()
    try:
        circle: dict = {"decoders": [Decoders() for _ in range(4)]}
        for each in circle["decoders"]:
            each.read(path, np.arange(8))
        circle["itself"] = circle
        del circle, each
        child = os.fork()
        if not child:
            gc.collect()
            os._exit(0 if Decoders().read(path, np.array([3])).shape == (1, 32, 32, 3) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        gc.enable()


def test_threads_read_files_at_once_and_one_file_by_turns(tmp_path, monkeypatch):
    """While one file is opened and read, others are; a file's decoder stands at one place."""
    entered, both, inside, most = set(), threading.Barrier(2, timeout=60), [0], [0]

    def opened(self, path):
        def read(rows: np.ndarray) -> np.ndarray:
            inside[0] += path.name == "a"
            most[0] = max(most[0], inside[0])
            if path not in entered:
                entered.add(path)
                both.wait()
            inside[0] -= path.name == "a"
            return np.full((len(rows), 1, 1, 3), rows[0], np.uint8)

        return read

    monkeypatch.setattr(Decoders, "_opened", opened)
    videos = Decoders()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: videos.read(tmp_path / "ab"[k % 2], np.array([k])), range(20)))
    assert [int(video[0, 0, 0, 0]) for video in found] == list(range(20)) and most == [1]
