"""Datasets that others wrote: v2.0 and v2.1 made here by hand, and the real GR-1 recording; clean, dirty and broken."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from tests.data.v2_files import change_info, change_table, write_lines
from tests.data.video_only import strip

GR1 = Path(__file__).parents[2].parent / "shared/data/gr1_pick_place"


def test_v21(v2, robot):
    root, episodes = v2
    dataset = Dataset(root, robot)
    assert len(dataset) == 3 and dataset.mended == [] and dataset.version == "v2.1"
    for i, given in enumerate(episodes):
        assert dataset.instruction(i) == given.instruction
        assert np.array_equal(dataset.episode(i).action, given.action)
        assert np.array_equal(dataset.episode(i).state, given.state)
        assert np.abs(dataset.views(i, [2, 5])["front"].astype(int) - given.video["front"][[2, 5]]).max() <= 3


def test_dirt_is_mended_and_said(v2, robot):
    root, episodes = v2
    info = json.loads((root / "meta/info.json").read_text())
    absent = {"observation.images.absent": {"dtype": "video", "shape": [9, 9, 3]}}
    lost = {"force": {"dtype": "float32", "shape": [2]}}
    change_info(root, total_frames=999, splits={"train": "0:100"}, features=info["features"] | absent | lost)

    def late(table):
        table.pop("frame_index")
        return table | {"timestamp": [t + 0.05 for t in table["timestamp"]]}

    for i in range(3):
        change_table(root, i, late)
    change_table(root, 1, lambda table: table | {"timestamp": [2 * t for t in table["timestamp"]]})
    dataset = Dataset(root, robot)
    said = "\n".join(dataset.mended)
    for words in (
        "total_frames 999, found 27",
        "split 'train' is 0:100, found 3",
        "'observation.images.absent' is listed",
        "no frame_index",
        "one period late; used row / rate (2 episodes)",
        "not row / rate",
        "'force' is listed and has no column",
    ):
        assert words in said, words
    assert np.array_equal(dataset.episode(2).action, episodes[2].action)


def test_instruction_is_the_annotated_one(v2, robot):
    """GR00T datasets list the validity as a task too."""
    root, episodes = v2
    write_lines(root / "meta/tasks.jsonl", [{"task_index": 0, "task": "valid"}, {"task_index": 4, "task": "open it"}])
    key = "annotation.human.action.task_description"
    for i in range(3):
        change_table(root, i, lambda t: t | {key: [4] * len(t["action"]), "task_index": [0] * len(t["action"])})
    dataset = Dataset(root, robot)
    assert [dataset.instruction(i) for i in range(3)] == ["open it"] * 3


def set_nan(table):
    table["action"][4][1] = float("nan")
    return table


def truncate(root):
    path = root / "videos/chunk-000/observation.images.side/episode_000001.mp4"
    path.write_bytes(path.read_bytes()[:-40])


def other_video(root):
    videos = root / "videos/chunk-000/observation.images.side"
    shutil.copy(videos / "episode_000000.mp4", videos / "episode_000001.mp4")


BAD = {
    r"'action' holds nan at row 4, entry 1 \(part 'move'\)": lambda r: change_table(r, 1, set_nan),
    r"'action' is \(9, 3\); expected \(9, 4\)": lambda r: change_table(
        r, 1, lambda t: t | {"action": [row[:3] for row in t["action"]]}
    ),
    "'action' has rows of different widths": lambda r: change_table(
        r, 1, lambda t: t | {"action": [t["action"][0][:2], *t["action"][1:]]}
    ),
    "no column 'observation.state'": lambda r: change_table(
        r, 1, lambda t: {k: v for k, v in t.items() if k != "observation.state"}
    ),
    "zero length": lambda r: change_table(r, 1, lambda t: {k: v[:0] for k, v in t.items()}),
    "episode_000001.mp4 is missing": lambda r: (
        r / "videos/chunk-000/observation.images.front/episode_000001.mp4"
    ).unlink(),
    "episode_000001.mp4.*truncated": truncate,
    "9 rows and 7 frames": other_video,
    "episode_000001.parquet is missing": lambda r: (r / "data/chunk-000/episode_000001.parquet").unlink(),
    "episode_000001.parquet cannot be read": lambda r: (r / "data/chunk-000/episode_000001.parquet").write_text("no"),
    "instruction is ''": lambda r: write_lines(
        r / "meta/tasks.jsonl",
        [{"task_index": k, "task": "" if k == 1 else f"push the block {k}"} for k in range(3)],
    ),
    "instruction is 7": lambda r: write_lines(
        r / "meta/tasks.jsonl",
        [{"task_index": k, "task": 7 if k == 1 else f"push the block {k}"} for k in range(3)],
    ),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_episode(v2, robot, words):
    root, episodes = v2
    BAD[words](root)
    with pytest.raises(ValueError, match=f"(?s)^episode 1 of .*({words}).*skip_bad=true"):
        Dataset(root, robot)
    dataset = Dataset(root, robot, skip_bad=True)
    assert len(dataset) == 2 and list(dataset.skipped) == [1] and [dataset.index(i) for i in range(2)] == [0, 2]
    assert np.array_equal(dataset.episode(1).action, episodes[2].action)
    assert abs(dataset.views(1, [3])["front"].mean() - (60 + 9)) < 3


def test_video_without_actions(v2, robot, tmp_path):
    from dataclasses import replace

    root = strip(v2[0], tmp_path / "video")
    with pytest.raises(ValueError, match="no feature 'observation.state'"):
        Dataset(root, robot)
    with pytest.raises(ValueError, match="no feature 'action'.*data=video"):
        Dataset(strip(v2[0], tmp_path / "states", "action"), robot)
    video, states = Dataset(root, robot, actions=False), Dataset(tmp_path / "states", robot, actions=False)
    assert np.isnan(video.episode(1).action).all() and video.episode(1).action.shape == (9, 4)
    assert np.isnan(video.episode(1).state).all() and video.first_state(1).size == 0 and video.length(2) == 11
    assert video.episode(0).meta["action_known"] is False and video.instruction(2) == v2[1][2].instruction
    assert np.array_equal(states.first_state(1), v2[1][1].state[0])
    assert np.array_equal(video.canvas(1, [4]), Dataset(v2[0], robot).canvas(1, [4]))
    assert np.isnan(Dataset(v2[0], robot, actions=False).episode(0).action).all()  # nor are they looked at
    with pytest.raises(ValueError, match="stage.real reads actions, and .* without them"):
        video.require_actions("stage.real")
    with pytest.raises(ValueError, match="without them .actions=false"):
        video.actions()
    alone = Dataset(root, replace(robot, action=(), state=()))
    assert alone.has_actions is False and alone.robot.action_dim == 0 and alone.episode(1).action.shape == (9, 0)


def test_bad_dataset(v2, robot, tmp_path):
    root, _ = v2
    info = json.loads((root / "meta/info.json").read_text())
    for key, words in (("video_path", "lists the videos .*front.* lacks video_path; copy or export"),
                       ("data_path", "lacks data_path; copy or export")):  # fmt: skip
        (root / "meta/info.json").write_text(json.dumps({k: v for k, v in info.items() if k != key}))
        with pytest.raises(ValueError, match=words):
            Dataset(root, robot)
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="nowhere does not exist"):
        Dataset(tmp_path / "nowhere", robot)
    with pytest.raises(ValueError, match="no finished LeRobot dataset"):
        Dataset(tmp_path, robot)
    change_info(root, codebase_version="v1.6")
    with pytest.raises(ValueError, match="v1.6.*expected v2.0, v2.1 or v3.0"):
        Dataset(root, robot)
    change_info(root, codebase_version="v2.1")
    shutil.move(root / "videos/chunk-000/observation.images.side", tmp_path / "side")
    with pytest.raises(ValueError, match="'observation.images.side' .view 'side'.*no video of it is on disk"):
        Dataset(root, robot, skip_bad=True)
    shutil.rmtree(root / "videos")
    (root / "meta/info.json").write_text("{")
    with pytest.raises(ValueError, match="info.json is not valid JSON"):
        Dataset(root, robot)


def test_what_is_held_out_is_left_out(v2, robot):
    def taken(**which) -> list[int]:
        dataset = Dataset(v2[0], robot, **which)
        return [dataset.index(i) for i in range(len(dataset))]

    assert taken() == taken(leave_out=[]) == [0, 1, 2] and taken(leave_out=[1]) == [0, 2]
    assert taken(episodes=[0, 1], leave_out=[1, 2]) == [0]
    with pytest.raises(ValueError, match="has no episode 7; it lists 3 episodes"):
        taken(leave_out=[1, 7])
    with pytest.raises(ValueError, match="no usable episode .all are left out"):
        taken(leave_out=[0, 1, 2])


def test_a_root_may_begin_at_home(v2, robot, monkeypatch):
    monkeypatch.setenv("HOME", str(v2[0].parent))
    assert Dataset(f"~/{v2[0].name}", robot).root == v2[0]


def test_all_bad(v2, robot):
    root, _ = v2
    for i in range(3):
        change_table(root, i, set_nan)
    with pytest.raises(ValueError, match="no usable episode .episode 0: 'action' holds nan"):
        Dataset(root, robot, skip_bad=True)


def test_smaller_views(v2, robot):
    from dataclasses import replace

    small = replace(robot, views=tuple(replace(view, height=20, width=28) for view in robot.views))
    dataset = Dataset(v2[0], small)
    assert dataset.canvas(2, [1, 4]).shape == (2, 20, 56, 3)
    assert abs(dataset.views(2, [4])["front"].mean() - (60 + 12)) < 3


def test_truncated_v3_names_the_episode(tmp_path, robot, make_episodes):
    write_dataset(tmp_path, make_episodes(3), robot, video_mb=1e-6)
    path = tmp_path / "videos/observation.images.side/chunk-000/file-002.mp4"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="episode 2 of .*file-002.mp4.*truncated"):
        Dataset(tmp_path, robot)
    assert list(Dataset(tmp_path, robot, skip_bad=True).skipped) == [2]


def test_rows_of_another_episode_are_refused(tmp_path, robot, make_episode):
    """The list of v3.0 lacks the first episode of a file: what follows would be cut out one episode too early."""
    write_dataset(tmp_path, (make_episode(i, rows=9) for i in range(3)), robot)
    path = tmp_path / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.slice(1), path)
    with pytest.raises(ValueError, match="episode 1 of .*rows 0 to 8 of .*file-000.parquet are those of episode 0"):
        Dataset(tmp_path, robot)
    pq.write_table(rows.drop_columns(["data/chunk_index", "videos/observation.images.side/from_timestamp"]), path)
    with pytest.raises(ValueError, match="lacks the columns data/chunk_index, videos/.*side/from_timestamp; copy"):
        Dataset(tmp_path, robot)


def test_pictures_that_cannot_be_decoded_name_the_episode(tmp_path, robot, make_episodes, monkeypatch):
    write_dataset(tmp_path, make_episodes(3), robot)
    path = tmp_path / "videos/observation.images.side/chunk-000/file-000.mp4"
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4
    data[at : data.index(b"moov") - 4] = bytes(data.index(b"moov") - 4 - at)
    path.write_bytes(data)
    dataset = Dataset(tmp_path, robot, skip_bad=True)  # its packets are all there
    with pytest.raises(ValueError, match="episode 2 of .*file-000.mp4 cannot be decoded.*`episodes` of the dataset"):
        dataset.views(2, [3])


@pytest.mark.skipif(not GR1.is_dir(), reason="the real GR-1 recording is not on this machine")
@pytest.mark.parametrize(("name", "size"), [("gr1", 256), ("gr1_64", 64)])
def test_gr1(name, size):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base=None):
        robot = instantiate(compose(f"embodiment/{name}").embodiment, _convert_="all")
    parts = json.loads((GR1 / "meta/modality.json").read_text())
    for key, mine in (("state", robot.state), ("action", robot.action)):
        assert {p.name: {"start": p.start, "end": p.stop} for p in mine} == parts[key]
    dataset = Dataset(GR1, robot, cache_mb=0)
    assert [dataset.length(i) for i in range(len(dataset))] == [416, 470, 470, 412, 328]
    assert dataset.instruction(3) == "pick the salt from the counter and place it in the plate"
    said = "\n".join(dataset.mended)
    for words in ("0:100", "observation.images.egoview", "no frame_index", "one period late", "'valid'"):
        assert words in said
    stats = json.loads((GR1 / "meta/stats.json").read_text())["action"]
    assert (dataset.actions() >= np.array(stats["min"]) - 1e-5).all()
    assert (dataset.actions() <= np.array(stats["max"]) + 1e-5).all()
    assert dataset.canvas(4, [0, 9, 3]).shape == (3, size, size, 3)
