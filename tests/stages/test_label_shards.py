"""Labels shared out over calls, in any order, and labels of a call that was killed: those of one call, to the byte."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clip import Clip, Labels
from dreamgen.core.manifest import Stage, tree_digest
from dreamgen.data.clips import ClipFolder
from dreamgen.data.lerobot import Dataset
from dreamgen.stages.label import label

sys.path.insert(0, str(Path(__file__).parents[1] / "idm"))
from moving_square import CLOCK, ROBOT, Squares  # noqa: E402

CLIPS, BATCH = 9, 2  # five batches, the last of one


class Counting:
    """Labels a clip by its pictures, refuses the sixth, and notes which it was given; dies when it is given `last`."""

    robot, clock, path = ROBOT, CLOCK, None

    def __init__(self, last: str = "") -> None:
        self.given, self.last = [], last

    def check(self, clip: Clip) -> None:
        if clip.id == "dream_5":
            raise ValueError("it is torn")

    def label(self, clips: list[Clip]) -> list[Labels]:
        ids = [clip.id for clip in clips]
        if self.last in ids:
            os.kill(os.getpid(), signal.SIGKILL)
        self.given += ids
        steps = self.clock.steps
        return [Labels(value=np.full((steps, ROBOT.action_dim), clip.video.mean() / 255, np.float32),
                       spread=np.full((steps, ROBOT.action_dim), clip.video.std() / 255, np.float32))
                for clip in clips]  # fmt: skip


@pytest.fixture(scope="module")
def dreams(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "dreams"
    with Stage(out, "dream", config={}) as run:
        for i, square in enumerate(Squares(CLIPS, rows=CLOCK.steps + 1, seed=3).episodes):
            ClipFolder(out / "clips").write(Clip(id=f"dream_{i}", video=square.video["top"][CLOCK.rows], seed=i,
                                                 video_hz="10", instruction=f"move {i % 2}",
                                                 state=square.state[0]))  # fmt: skip
        run.finish(clips=CLIPS)
    return out


def labelled(labeler: Counting, dreams: Path, out: Path, **shared: int) -> dict:
    return label(labeler, dreams, out=out, robot=ROBOT, batch_size=BATCH, skip_bad=True, record={}, **shared)


@pytest.fixture(scope="module")
def alone(dreams) -> tuple[Path, dict]:
    """The labels of one call."""
    return dreams.parent / "alone", labelled(Counting(), dreams, dreams.parent / "alone")


def require_same(out: Path, manifest: dict, alone: tuple[Path, dict]) -> None:
    assert tree_digest(out) == tree_digest(alone[0])
    names = [{path.name for path in folder.iterdir() if path.suffix != ".log"} for folder in (out, alone[0])]
    assert names[0] == names[1]  # no parts, and no lock
    assert (manifest["id"], manifest["results"]) == (alone[1]["id"], alone[1]["results"])
    assert manifest["results"]["episodes"] == CLIPS - 1 and len(manifest["results"]["skipped"]) == 1


def test_shards_in_any_order_write_what_one_call_writes(dreams, alone, tmp_path):
    given, told = {}, []
    for shard in (2, 0, 1):
        labeler = Counting()
        told.append(labelled(labeler, dreams, tmp_path, shard=shard, num_shards=3))
        given[shard] = [int(id.removeprefix("dream_")) for id in labeler.given]
    assert given == {2: [4], 0: [0, 1, 6, 7], 1: [2, 3, 8]}
    assert told[:2] == [{"complete": False, "batches": 1, "left": 4}, {"complete": False, "batches": 3, "left": 2}]
    require_same(tmp_path, told[2], alone)
    for shard in (1, 2):  # whoever comes late labels nothing
        assert labelled(late := Counting(), dreams, tmp_path, shard=shard, num_shards=3) == told[2] and not late.given
    made = Dataset(tmp_path, ROBOT)
    assert [made.episode(i).meta["prompt"] for i in range(len(made))] == [f"dream_{i}" for i in range(CLIPS) if i != 5]


@pytest.mark.parametrize("shared", [{}, {"shard": 0, "num_shards": 2}])
def test_labels_that_were_killed_midway_go_on(dreams, alone, tmp_path, shared):
    child = multiprocessing.get_context("fork").Process(
        target=labelled, args=(Counting(last="dream_4"), dreams, tmp_path), kwargs=shared
    )
    child.start()
    child.join()
    parts = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert child.exitcode == -signal.SIGKILL and parts == ["000000.npz", "000001.npz"][: 1 if shared else 2]
    (tmp_path / "parts" / ".000002.0a1b.partial.npz").write_bytes(b"half")  # as a kill while it is written leaves it
    again = Counting()
    manifest = labelled(again, dreams, tmp_path, **shared)
    if shared:  # the batches of the other share
        assert again.given == ["dream_4", "dream_8"]
        manifest = labelled(again := Counting(), dreams, tmp_path, shard=1, num_shards=2)
    assert again.given == (["dream_2", "dream_3", "dream_6", "dream_7"] if shared else
                           ["dream_4", "dream_6", "dream_7", "dream_8"])  # fmt: skip
    require_same(tmp_path, manifest, alone)
