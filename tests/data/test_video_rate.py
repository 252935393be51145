"""Labelled dreams at the rate of their pictures: sums, votes and ends in closed form, and where the robot arrives."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dreamgen.core.clip import Clip, Episode, Labels, read_prompts
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.kinematics import follow
from dreamgen.data.export import _outcome, export_dataset
from dreamgen.data.lerobot import Dataset
from dreamgen.data.prompts import DatasetPrompts, key_rows
from dreamgen.data.video_rate import at_video_rate, shown_rows, slowed
from dreamgen.data.writer import write_dataset
from dreamgen.stages.label import labelled_episode

ROBOT = Embodiment(
    name="arm", robot_hz=10, views=(View(name="eye", key="observation.images.eye", height=16, width=24),),
    state=(Part(name="hand", start=0, stop=2), Part(name="lift", start=2, stop=3), Part(name="grip", start=3, stop=4)),
    action=(
        Part(name="move", start=0, stop=2, kind="delta", scale=0.5, moves="hand", limits=(-1, 2)),
        Part(name="lift", start=2, stop=3, moves="lift", limits=(-4, 4)),
        Part(name="close", start=3, stop=4, kind="binary", moves="grip", limits=(-1, 1)),
    ),
)  # fmt: skip


def labelled(hz: str, rows: int, frames: int, seed: int = 0):
    """What `label` makes of a dream whose actions are known; frame k is of the grey 20 k."""
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (rows, 4)).astype(np.float32)
    action[:, 3] = np.sign(action[:, 3])
    state, _ = follow(ROBOT, np.zeros(4), action)
    video = np.broadcast_to((20 * np.arange(frames, dtype=np.uint8))[:, None, None, None], (frames, 16, 24, 3))
    clip = Clip(id=f"d{seed}", video=video.copy(), video_hz=hz, instruction="lift it", state=state[0])
    label = Labels(value=action, spread=rng.uniform(0, 1, action.shape).astype(np.float32))
    return labelled_episode(ROBOT, clip, label, state[:-1], np.ones_like(state[:-1]), {"source": "dream"})


def first(episode: Episode, rows: int) -> Episode:
    parts = {
        name: {key: values[:rows] for key, values in getattr(episode, name).items()} for name in ("video", "extra")
    }
    return replace(episode, state=episode.state[:rows], action=episode.action[:rows], **parts)


@pytest.mark.parametrize(
    ("hz", "ends"), [("5", [0, 2, 4, 6, 8]), ("4", [0, 2, 5, 7, 10]), ("4", [0, 2, 5, 7]), ("10", [0, 1, 2, 3, 4])]
)
def test_actions_of_a_gap(hz, ends):
    given = labelled(hz, ends[-1], len(ends))
    found, rows = at_video_rate(given, ROBOT)
    assert rows.tolist() == ends[:-1] and len(found.action) == len(ends) - 1
    for k, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        gap = given.action[a:b]
        assert np.allclose(found.action[k, :2], gap[:, :2].sum(0), atol=1e-6) and found.action[k, 2] == gap[-1, 2]
        votes = gap[:, 3].sum()
        assert found.action[k, 3] == (np.sign(votes) if votes else gap[-1, 3])
        assert np.allclose(found.extra["label_spread"][k, :2] ** 2, (given.extra["label_spread"][a:b, :2] ** 2).sum(0))
    assert np.array_equal(found.state, given.state[rows]) and found.extra["frame_fresh"].all()
    assert "frame_rows" not in found.meta and found.meta["video_hz"] == hz
    assert np.isclose(found.action[:, :2].sum(), given.action[:, :2].sum(), atol=1e-5)


def test_the_slower_robot_arrives_where_the_robot_did():
    given = labelled("5", 12, 7)
    found, rows = at_video_rate(given, ROBOT)
    slow = slowed(ROBOT, "5")
    fast, _ = follow(ROBOT, np.zeros(4), given.action)
    then, _ = follow(slow, np.zeros(4), found.action)
    assert np.allclose(then[:, :3], fast[[*rows, 12], :3], atol=1e-6)
    assert slow.rate == 5 and slow.action[0].limits == (-2, 4) and slow.action[1:] == ROBOT.action[1:]


def test_a_part_of_a_gap_is_left_out():
    given = labelled("4", 10, 5)
    cut = first(given, 9)
    assert at_video_rate(cut, ROBOT)[1].tolist() == [0, 2, 5]
    with pytest.raises(ValueError, match="it has 1 rows; one gap at 4 Hz needs 2"):
        at_video_rate(first(cut, 1), ROBOT)
    with pytest.raises(ValueError, match="new pictures are not those of 5 Hz"):
        at_video_rate(replace(cut, meta={**cut.meta, "video_hz": "5"}), ROBOT)
    with pytest.raises(ValueError, match="does not tell which of its pictures are new.*rate=robot"):
        at_video_rate(replace(cut, extra={}), ROBOT)


def recorded(rows: int) -> Episode:
    """What a robot recorded, with a new picture in every row; row k is of the grey 20 k."""
    given = labelled("10", rows, rows + 1)
    return replace(given, extra={}, meta={"seed": 4})


def test_recordings_come_to_the_same_rate(tmp_path):
    given, dream = recorded(11), labelled("4", 11, 5)
    found, rows = at_video_rate(given, ROBOT, "4")
    alike, same = at_video_rate(first(dream, 10), ROBOT)
    assert rows.tolist() == same.tolist() == [0, 2, 5, 7] and found.meta == given.meta
    assert np.array_equal(found.action, alike.action) and np.array_equal(found.state, given.state[rows])
    fast = labelled("10", 8, 9)
    slow, rows = at_video_rate(fast, ROBOT, "5")  # of new pictures every second one
    assert rows.tolist() == [0, 2, 4, 6] and slow.meta["video_hz"] == "5"
    with pytest.raises(ValueError, match="new pictures are not those of 10 Hz; export it at the rate of its pictures"):
        at_video_rate(dream, ROBOT, "10")
    write_dataset(tmp_path / "real", [given, recorded(9)], ROBOT)
    source = Dataset(tmp_path / "real", ROBOT)
    assert export_dataset(source, tmp_path / "out", rate=5)["frames"] == 5 + 4
    data = Dataset(tmp_path / "out", slowed(ROBOT, "5"))
    assert np.array_equal(data.episode(0).action, at_video_rate(given, ROBOT, "5")[0].action)
    assert np.abs(data.views(0)["eye"].mean((1, 2, 3)) - 40 * np.arange(5)).max() < 2


def test_what_comes_of_a_step_is_kept():
    reward, done, taken = np.arange(6.0)[:, None], np.array([[False]] * 5 + [[True]]), np.array([0, 2, 5])
    assert _outcome("next.reward", reward, taken).tolist() == [[1.0], [9.0], [5.0]]
    assert _outcome("next.done", done, taken).tolist() == [[False], [False], [True]]


@pytest.mark.parametrize("format", ["v3.0", "v2.1", "groot"])
def test_export(tmp_path, format):
    episodes = [labelled("5", 8, 5), labelled("5", 12, 7, seed=1)]
    write_dataset(tmp_path / "labels", episodes, ROBOT)
    source = Dataset(tmp_path / "labels", ROBOT)
    done = export_dataset(source, tmp_path / "out", format=format, rate="video")
    assert done == {"episodes": 2, "frames": 4 + 6, "encoded": 2, "left_out": [], "unknown_states": 0}
    with pytest.raises(ValueError, match="robot_hz: here 10, saved 5"):
        Dataset(tmp_path / "out", ROBOT)
    data = Dataset(tmp_path / "out", slowed(ROBOT, "5"))
    assert data.info["fps"] == 5 and data.mended == []
    for i, given in enumerate(episodes):
        expected, rows = at_video_rate(given, ROBOT)
        assert np.array_equal(data.episode(i).action, expected.action)
        assert np.array_equal(data.episode(i).state, expected.state) and data.episode(i).meta == expected.meta
        for name, values in expected.extra.items():
            assert np.array_equal(data.episode(i).extra[name], values)
        assert np.allclose(data.table(i)["timestamp"].to_numpy(), np.arange(len(rows)) / 5)
        shown = data.views(i)["eye"].mean((1, 2, 3))  # each picture once
        assert np.abs(shown - 20 * np.arange(len(rows))).max() < 2
        assert np.abs(data.views(i)["eye"].astype(int) - source.views(i, rows)["eye"]).max() <= 3
    if format == "groot":
        modality = json.loads((tmp_path / "out/meta/modality.json").read_text())
        assert modality["action"]["move"]["range"] == [-2, 4]
    if format != "v2.1":
        stats = json.loads((tmp_path / "out/meta/stats.json").read_text())["action"]
        assert np.allclose(stats["max"], data.actions().max(0))


def test_what_is_no_labelled_video_of_one_rate_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rate is 'fast'; expected one of robot, video"):
        write_dataset(tmp_path / "mixed", [labelled("5", 8, 5), labelled("10", 4, 5)], ROBOT)
        export_dataset(Dataset(tmp_path / "mixed", ROBOT), tmp_path / "out", rate="fast")
    with pytest.raises(ValueError, match="have the rates 10, 5, rate=video needs one"):
        export_dataset(Dataset(tmp_path / "mixed", ROBOT), tmp_path / "out", rate="video")
    real = replace(labelled("5", 8, 5), meta={}, extra={})
    write_dataset(tmp_path / "real", [real], ROBOT)
    with pytest.raises(ValueError, match="episode 0 of .*real: it does not tell which of its pictures are new"):
        export_dataset(Dataset(tmp_path / "real", ROBOT), tmp_path / "out", rate="video")
    assert not (tmp_path / "out").exists()


def test_first_frames_within_labelled_video_are_new_pictures(tmp_path):
    """At 4 Hz of 10 Hz frames stand at rows 0, 2, 5 and 7; recordings show a picture of each row."""
    given = labelled("4", 10, 5)
    assert shown_rows(given).tolist() == [0, 0, 2, 2, 2, 5, 5, 7, 7, 7]
    assert shown_rows(replace(given, extra={})).tolist() == list(range(10))
    assert key_rows([0, 0.45, 0.4, 0.9], given) == [0, 2, 7]
    assert key_rows([0, 0.45, 0.9], replace(given, extra={})) == [0, 4, 9]
    write_dataset(tmp_path, [given], ROBOT)
    for commanded in (None, True):
        (found,) = read_prompts(
            DatasetPrompts(dataset=Dataset(tmp_path, ROBOT), keyframes=[0.4], commanded=commanded)()
        )
        assert found.pair == "e000000_r2" and np.allclose(found.state, given.state[2], atol=1e-6)
        assert np.abs(found.image.astype(int) - 20).max() <= 2
    with pytest.raises(ValueError, match="prompts.commanded reads actions"):
        DatasetPrompts(dataset=Dataset(tmp_path, ROBOT, actions=False), keyframes=[0.4], commanded=True)()
