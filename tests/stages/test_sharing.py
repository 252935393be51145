"""Shards of one stage that end together: one of them writes, whoever comes second returns what it wrote."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dreamgen.core.manifest import is_complete
from dreamgen.stages import curate as module
from dreamgen.stages.curate import curate
from dreamgen.stages.dream import dream
from dreamgen.stages.sharing import alone
from tests.stages.drawn_world import DrawnWorld, prompts


class Bright:
    name, needs_labels = "bright", False

    def score(self, clips, labels):
        return np.array([clip.video.mean() / 255 for clip in clips])


def test_shards_of_a_curation_write_once(tmp_path, monkeypatch):
    dream(DrawnWorld(), lambda: prompts(3), out=tmp_path / "dreams", record={})
    out, second = tmp_path / "kept", []

    def shard(number: int) -> dict:
        return curate({"bright": Bright()}, None, out=out, clips=tmp_path / "dreams", keep=2, batch_size=2,
                      shard=number, num_shards=2, record={})  # fmt: skip

    @contextmanager
    def late(folder: Path):
        monkeypatch.undo()
        second.append(shard(0))
        with alone(folder):
            yield

    assert shard(0) == {"complete": False, "left": 1}
    monkeypatch.setattr(module, "alone", late)
    assert [shard(1)] == second and is_complete(out)
    left = {path.name for path in out.iterdir() if path.suffix != ".log"}
    assert left == {"clips", "manifest.json", "scores", "scores.json", "sheets"}  # and no lock
