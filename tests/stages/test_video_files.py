"""A folder of video files through the stages: latent actions learn from it and label it, a policy is aligned by it."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hydra.errors import InstantiationException

from dreamgen.core.manifest import read_json
from dreamgen.data.lerobot import Dataset
from dreamgen.data.video_folder import VideoFolder
from dreamgen.data.writer import write_dataset
from dreamgen.policies.feed import Feed
from dreamgen.video.mp4 import write_mp4
from idm.latent.model import LatentActions
from jobs.errors import explain
from jobs.recipe import load
from jobs.running import run_stage
from tests.stages.test_policy_stages import ROBOT, episodes, small


def films(root: Path, count: int, size: tuple[int, int] = (80, 120)) -> Path:
    """Noise that drifts, 24 frames a second, of one second and more."""
    rng = np.random.default_rng(7)
    for k in range(count):
        wide = rng.integers(0, 256, (size[0], size[1] + 60, 3), np.uint8)
        frames = np.stack([wide[:, 2 * t :][:, : size[1]] for t in range(24 + k)])
        write_mp4(root / f"part_{k % 2}/film_{k}.mp4", frames, 24)
    return root


def job(name: str, *words: str) -> dict:
    """One stage of the default recipe."""
    return run_stage(load(name, words)[0])


def test_latent_actions_learn_from_a_folder_and_label_it(tmp_path: Path) -> None:
    root, out = films(tmp_path / "films", 4), f"out={tmp_path / 'run'}"
    latent = ["labeler=latent_continuous", "labeler.labelled=0.0"]
    data = ["data=video_folder", f"data.root={root}"]
    (root / "part_1/film_9.webm").write_bytes(b"cut off")
    with pytest.raises(InstantiationException, match="film_9.webm .7 bytes. is truncated or no webm file") as bad:
        job("train_labeler", *latent, *data, out, "stage.world_model=null", "stage.steps=2", "stage.batch_size=2")
    told = explain(bad.value)  # what the command says: the number and the remedy, too
    assert told.startswith("episode 4 of ") and told.endswith("set skip_bad=true to leave it out (at stage.dataset)")
    done = job("train_labeler", *latent, *data, out, "stage.world_model=null", "stage.steps=2", "stage.batch_size=2",
               "skip_bad=true")  # fmt: skip
    assert np.isfinite(done["results"]["held_out_scores"]["change"]["left"])
    (skipped,) = done["results"]["skipped"]
    assert skipped["episode"] == 4 and "film_9.webm" in skipped["reason"]
    assert LatentActions.load(tmp_path / "run/labeler").latent == 16
    common = [*latent, out, f"stage.labeler.path={tmp_path / 'run/labeler'}", "skip_bad=true"]
    with pytest.raises(
        ValueError, match="film_0.mp4 has no instruction, which is needed here; write one into film_0.txt"
    ):
        job("label", *common, f"stage.clips={root}")
    for k in range(4):
        (root / f"part_{k % 2}/film_{k}.txt").write_text(f"film {k}")
    job("label", *common, f"stage.clips={root}")
    robot = LatentActions.load(tmp_path / "run/labeler").robot
    made = Dataset(tmp_path / "run/labels", robot)
    assert sorted(made.instruction(i) for i in range(4)) == [f"film {k}" for k in range(4)]
    assert np.isfinite(made.actions()).all() and made.robot.action_dim == 16
    origins = [made.episode(i).meta["origin"] for i in range(4)]
    assert [origin["video"] for origin in origins] == [f"part_{k % 2}/film_{k}.mp4" for k in (0, 2, 1, 3)]
    assert [origin["episode"] for origin in origins] == [0, 1, 2, 3] and "seed" not in made.episode(0).meta
    assert len(read_json(tmp_path / "run/labels/manifest.json")["results"]["skipped"]) == 1
    (root / "part_0/film_2.txt").unlink()  # an instruction for those that bring none, by the dataset's own setting
    job("label", *common, *data, "data.instruction=look", "stage.clips=${data}", f"stage.out={tmp_path / 'told'}")
    assert [Dataset(tmp_path / "told", robot).instruction(i) for i in range(4)] == [
        "film 0",
        "look",
        "film 1",
        "film 3",
    ]


def test_a_policy_is_aligned_by_a_folder(tmp_path: Path) -> None:
    write_dataset(tmp_path / "real", episodes(6, 1), ROBOT)
    films(tmp_path / "films", 3)
    aligned = partial(small, align_weight=0.3, align_layer=1, future_tokens=3)
    feed = Feed(aligned(), real=Dataset(tmp_path / "real", ROBOT), dreams=[],
                videos=[VideoFolder(tmp_path / "films", ROBOT)], batch_size=8, ratio="1:1", dream_body="dream",
                spread_scale=0.5, options={}, dream_options={"state": "zero"}, seed=0)  # fmt: skip
    batch = feed.at(0)
    assert batch["valid"].any(1).tolist() == [True] * 4 + [False] * 4 and batch["future_known"][4:].any()
