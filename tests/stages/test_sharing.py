"""Shards of one stage that end together: one of them writes, whoever comes second returns what it wrote."""

import errno
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dreamgen.core.manifest import is_complete
from dreamgen.stages import curate as module
from dreamgen.stages import sharing
from dreamgen.stages.curate import curate
from dreamgen.stages.dream import dream
from dreamgen.stages.sharing import Shard, alone
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
    def late(folder: Path, mine: Shard):
        monkeypatch.undo()
        second.append(shard(0))
        with alone(folder, mine) as first:
            yield first

    assert shard(0) == {"complete": False, "left": 1}
    monkeypatch.setattr(module, "alone", late)
    assert [shard(1)] == second and is_complete(out)
    left = {path.name for path in out.iterdir() if path.suffix != ".log"}
    assert left == {"clips", "manifest.json", "scores", "scores.json", "sheets"}  # and no lock


def test_where_files_cannot_be_locked_one_shard_writes(tmp_path, monkeypatch, caplog):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(sharing.fcntl, "flock", unknown)
    for number in range(3):
        with alone(tmp_path, Shard(number, 3)) as may_end:
            assert may_end == (number == 0)
    assert "knows no locks: call shard 0 once more" in caplog.text
    dream(DrawnWorld(), lambda: prompts(3), out=tmp_path / "dreams", record={})
    cut = dict(clips=tmp_path / "dreams", batch_size=2, num_shards=2, record={})
    done = [curate({"bright": Bright()}, None, out=tmp_path / "kept", shard=number, **cut) for number in (0, 1, 0)]
    assert [one["complete"] for one in done[:2]] == [False, False] and done[1]["left"] == 0
    assert is_complete(tmp_path / "kept")
