"""Decoders that a forked process inherits."""

import gc
import os

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
