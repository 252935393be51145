"""Exports against their source, against the format as written down, and against what GR00T's loaders do with it."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.manifest import read_json
from dreamgen.data import statistics
from dreamgen.data.export import export_dataset
from dreamgen.data.files_v3 import Files as FilesV3
from dreamgen.data.groot import modality, relative_stats
from dreamgen.data.inspection import inspect
from dreamgen.data.layout import read_layout
from dreamgen.data.ledger import Ledger
from dreamgen.data.lerobot import Dataset
from dreamgen.data.stored_statistics import StoredStatistics
from dreamgen.data.writer import write_dataset
from dreamgen.video.mp4 import encode, read_mp4
from dreamgen.video.remux import Joined, cut

N = 3
VIEW = View(name="eye", key="observation.images.eye", height=16, width=24)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Datasets by name, each written once for this file."""
    return tmp_path_factory.mktemp("exports"), {}


@pytest.fixture
def source(made, robot, make_episodes):
    root, _ = made
    if not (root / "source").exists():
        write_dataset(root / "source", make_episodes(N), robot)
    return Dataset(root / "source", robot)


@pytest.fixture
def exported(made, source):
    root, done = made

    def make(format: str) -> Dataset:
        if format not in done:
            done[format] = export_dataset(source, root / format, format=format, horizon=4)
        assert done[format] == {"episodes": N, "frames": 7 + 9 + 11, "encoded": 0, "left_out": [], "unknown_states": 0}
        return Dataset(root / format, source.robot)

    return make


def test_v2_0_is_read(exported, source, tmp_path):
    """v2.0 differs from v2.1 by its version and by statistics in one file; it is never written."""
    old = tmp_path / "old"
    shutil.copytree(exported("v2.1").root, old)
    info = json.loads((old / "meta/info.json").read_text())
    (old / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v2.0"}))
    (old / "meta/episodes_stats.jsonl").unlink()
    (old / "meta/stats.json").write_text("{}")
    data = Dataset(old, source.robot)
    assert data.version == "v2.0" and len(data) == N
    for i in range(N):
        assert np.array_equal(source.episode(i).action, data.episode(i).action)
        assert all(np.array_equal(data.views(i)[name], frames) for name, frames in source.views(i).items())


@pytest.mark.parametrize("format", ["v3.0", "v2.1", "groot"])
def test_everything_survives(exported, source, format):
    data = exported(format)
    assert data.version == ("v3.0" if format == "v3.0" else "v2.1") and data.mended == []
    for i in range(N):
        a, b = source.episode(i), data.episode(i)
        assert np.array_equal(a.action, b.action) and np.array_equal(a.state, b.state) and a.meta == b.meta
        assert a.instruction == b.instruction and a.extra.keys() == b.extra.keys()
        assert all(np.array_equal(a.extra[name], b.extra[name]) for name in a.extra)
        for name, frames in source.views(i).items():
            assert np.array_equal(data.views(i)[name], frames)
    (data.root / "meta/provenance.jsonl").rename(data.root / "meta/elsewhere")
    try:  # the episode list tells it too, for programs that know nothing of ours
        assert [Dataset(data.root, source.robot).episode(i).meta["seed"] for i in range(N)] == [0, 1, 2]
    finally:
        (data.root / "meta/elsewhere").rename(data.root / "meta/provenance.jsonl")


def test_v3_of_v3_is_the_same(exported, source):
    data = exported("v3.0")
    for file in ("meta/info.json", "meta/tasks.parquet"):
        assert (data.root / file).read_bytes() == (source.root / file).read_bytes(), file
    ours, theirs = (json.loads((d.root / "meta/stats.json").read_text()) for d in (data, source))
    for name, stats in theirs.items():  # those of pictures are of decoded ones
        assert all(np.allclose(ours[name][key], stats[key], atol=0.02 if "images" in name else 0) for key in stats)


def test_layout_is_that_of_v21(exported):
    root = exported("v2.1").root
    info = json.loads((root / "meta/info.json").read_text())
    assert (info["codebase_version"], info["total_videos"], info["total_chunks"]) == ("v2.1", 2 * N, 1)
    table = pq.read_table(root / info["data_path"].format(episode_chunk=0, episode_index=1))
    assert set(table.schema.names) == {name for name, f in info["features"].items() if f["dtype"] != "video"}
    assert table["index"].to_pylist() == list(range(7, 16)) and table["frame_index"].to_pylist() == list(range(9))
    lines = {name: [json.loads(line) for line in (root / f"meta/{name}.jsonl").read_text().splitlines()]
             for name in ("episodes", "tasks", "episodes_stats")}  # fmt: skip
    assert [(e["episode_index"], e["length"], e["source"]) for e in lines["episodes"]] == [
        (0, 7, "dream"), (1, 9, "dream"), (2, 11, "dream")]  # fmt: skip
    assert lines["tasks"][2] == {"task_index": 2, "task": "push the block 2"}
    stats = lines["episodes_stats"][1]["stats"]
    assert stats["action"].keys() == {"min", "max", "mean", "std", "count"} and stats["action"]["count"] == [9]
    assert np.shape(stats["observation.images.side"]["mean"]) == (3, 1, 1)


def test_groot_finds_its_parts(exported, source):
    """As LeRobotSingleDataset slices them: statistics of a column by the entries of a part, texts by their index."""
    root = exported("groot").root
    modality, stats, info = (json.loads((root / f"meta/{n}.json").read_text()) for n in ("modality", "stats", "info"))
    actions, table = source.actions(), pq.read_table(root / "data/chunk-000/episode_000002.parquet")
    for kind, parts, values in (("state", source.robot.state, source.states()),
                                ("action", source.robot.action, actions)):  # fmt: skip
        for part in parts:
            said = modality[kind][part.name]
            at = np.arange(said["start"], said["end"])
            found = {key: np.array(value)[at] for key, value in stats[said["original_key"]].items()}
            assert np.allclose(found["q99"], np.quantile(values[:, part.slice].astype(float), 0.99, 0))
            assert said["absolute"] == (part.kind != "delta") and np.dtype(said["dtype"]).kind == "f"
    view = modality["video"]["side"]["original_key"]
    feature = info["features"][view]
    assert feature["shape"][feature["names"].index("channel")] == 3 and feature["video_info"]["video.fps"] == 20
    tasks = {r["task_index"]: r["task"] for r in map(json.loads, (root / "meta/tasks.jsonl").open())}
    for name, text in (("human.action.task_description", "push the block 2"), ("human.validity", "valid")):
        column = modality["annotation"][name]["original_key"]
        assert {tasks[k] for k in table[column].to_pylist()} == {text}
    assert not (root / "meta/relative_stats.json").exists()  # its only arm part is a delta


def test_every_camera_has_a_name_of_its_own(robot):
    """Views their own, whatever the keys of other cameras end with."""
    (view,) = robot.views[:1]
    robot = replace(robot, views=(replace(view, name="front", key="observation.images.cam_high"),), grid=())
    cameras = ["observation.images.front", "observation.images.cam_high", "left.rgb", "right.rgb"]
    found = modality(robot, cameras, [])["video"]
    assert {name: part["original_key"] for name, part in found.items()} == {
        "observation.images.front": "observation.images.front", "front": "observation.images.cam_high",
        "rgb": "left.rgb", "right.rgb": "right.rgb"}  # fmt: skip


def test_relative_statistics():
    """Per step of the chunk, of the action less the state at the chunk's start, by brute force."""
    rng = np.random.default_rng(0)
    robot = Embodiment(name="arm", robot_hz=5, views=(VIEW,), state=(Part(name="grip", start=0, stop=1),
                       Part(name="arm", start=1, stop=3)), action=(Part(name="arm", start=0, stop=2, moves="arm"),
                       Part(name="close", start=2, stop=3, kind="binary", moves="grip", limits=(-1, 1))))  # fmt: skip
    states, actions = ([rng.normal(size=(n, 3)) for n in (6, 2, 9)] for _ in range(2))
    found = relative_stats(robot, states, actions, 4)
    assert list(found) == ["arm"]
    chunks = np.stack([a[t : t + 4, :2] - s[t, 1:] for s, a in zip(states, actions, strict=True)
                       for t in range(len(a) - 3)])  # fmt: skip
    assert np.allclose(found["arm"]["q01"], np.quantile(chunks, 0.01, axis=0))
    assert np.allclose(found["arm"]["std"], chunks.std(0)) and np.shape(found["arm"]["max"]) == (4, 2)
    assert relative_stats(robot, states, actions, 10) == {}


def test_unknown_format(source, tmp_path):
    with pytest.raises(ValueError, match="format is 'v4'; expected one of v3.0, v2.1, groot"):
        export_dataset(source, tmp_path, format="v4")


def with_b_frames(frames: np.ndarray, path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"bf": "2", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_pieces_with_b_frames_join_and_part(tmp_path):
    rng, pieces = np.random.default_rng(0), []
    for k, n in enumerate((9, 5)):
        path = tmp_path / f"{k}.mp4"
        with_b_frames(np.cumsum(rng.integers(0, 9, (n, 32, 64, 3)), 0).astype(np.uint8), path)
        pieces.append((path.read_bytes(), read_mp4(path)))
    with Joined(tmp_path / "all.mp4", Fraction(25)) as file:
        assert [file.add(data) for data, _ in pieces] == [(0, 9), (9, 14)]
    assert np.array_equal(read_mp4(tmp_path / "all.mp4"), np.concatenate([frames for _, frames in pieces]))
    assert np.array_equal(read_mp4(tmp_path / "all.mp4", [10, 3])[0], pieces[1][1][1])
    with av.open(str(tmp_path / "all.mp4")) as container:
        assert container.streams.video[0].average_rate == 25
    (tmp_path / "second.mp4").write_bytes(cut(tmp_path / "all.mp4", 9, 5))
    assert np.array_equal(read_mp4(tmp_path / "second.mp4"), pieces[1][1])
    assert cut(tmp_path / "all.mp4", 4, 5) is None  # does not begin with a key frame


def test_a_piece_that_reorders_deeper_begins_a_file(tmp_path, robot):
    """Three frames are too few for this encoder to reorder any."""
    robot, rng, pieces = replace(robot, views=robot.views[:1], grid=()), np.random.default_rng(0), []
    for k, n in enumerate((3, 9, 3, 5)):
        path = tmp_path / f"{k}.mp4"
        with_b_frames(np.cumsum(rng.integers(0, 9, (n, 32, 64, 3)), 0).astype(np.uint8), path)
        pieces.append((path.read_bytes(), read_mp4(path)))
    shallow, deep = pieces[0][0], pieces[1][0]
    with Joined(tmp_path / "all.mp4") as file:
        file.add(shallow)
        assert file.fits(shallow) and not file.fits(deep)
        with pytest.raises(ValueError, match=r"reorders its frames deeper \(1\) than the first one \(0\)"):
            file.add(deep)
    files = FilesV3(tmp_path, Ledger(rate=Fraction(20)), robot_type="arm", contract=None)
    placed = [files._join("eye", data) for data, _ in pieces]
    for video in files._videos.values():
        video.close()
    assert [place["videos/eye/file_index"] for place in placed] == [0, 1, 1, 1]
    shown = [read_mp4(tmp_path / f"videos/eye/chunk-000/file-00{k}.mp4") for k in range(2)]
    assert np.array_equal(shown[0], pieces[0][1])
    assert np.array_equal(shown[1], np.concatenate([frames for _, frames in pieces[1:]]))


def test_a_part_within_a_group_is_encoded_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr("dreamgen.data.export.cut", lambda *_: None)
    result = export_dataset(source, tmp_path / "again", format="v2.1")
    assert result["encoded"] == 2 * N
    frames = Dataset(tmp_path / "again", source.robot).views(1)["side"]
    assert np.abs(frames.astype(int) - source.views(1)["side"]).max() <= 3


@pytest.mark.parametrize("format", ["v3.0", "groot"])
def test_what_is_told_of_a_camera_comes_along(source, robot, tmp_path, monkeypatch, format):
    side, told = "observation.images.side", {"video.is_depth_map": True, "depth_scale": 0.001, "video.channels": 1}
    shutil.copytree(source.root, tmp_path / "d")
    (tmp_path / "d/meta/dreamgen.json").unlink()
    info = json.loads((tmp_path / "d/meta/info.json").read_text())
    info["features"][side]["info"] |= told | {"has_audio": True, "audio.codec": "aac", "video.codec": "other"}
    info["features"][side]["shape"][2] = 1
    (tmp_path / "d/meta/info.json").write_text(json.dumps(info))
    eye = replace(robot, views=robot.views[:1], grid=())
    data = Dataset(tmp_path / "d", eye)
    assert export_dataset(data, tmp_path / "e", format=format)["left_out"] == []
    made = json.loads((tmp_path / "e/meta/info.json").read_text())["features"]
    assert made[side]["shape"] == [40, 56, 1] and made[side]["info"].items() >= told.items()
    assert (made[side]["info"]["video.codec"], made[side]["info"]["has_audio"]) == ("h264", False)
    assert (
        "audio.codec" not in made[side]["info"] and not made["observation.images.front"]["info"]["video.is_depth_map"]
    )
    assert not [f for f in inspect(tmp_path / "e", eye, pictures=False)[0] if f.check == "video"]
    monkeypatch.setattr("dreamgen.data.export.cut", lambda *_: None)  # colours are encoded again, depths are not
    again = export_dataset(data, tmp_path / "again", format=format)
    assert (again["episodes"], again["encoded"], again["left_out"]) == (N, N, [side])


@pytest.mark.parametrize("flag", ["video.is_depth_map", "is_depth_map"])  # lerobot of old, and of today
def test_statistics_of_depths_are_those_that_the_dataset_tells(source, robot, tmp_path, caplog, flag):
    """In their own unit and of one channel, not of what their packets look like as colours of 8 bits."""
    side, root, rng = "observation.images.side", tmp_path / "d", np.random.default_rng(0)
    shutil.copytree(source.root, root)
    (root / "meta/dreamgen.json").unlink()
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][side]["info"] |= {flag: True, "depth_unit": "mm"}
    (root / "meta/info.json").write_text(json.dumps(info))
    depths, path = (
        [rng.normal(900, 90, (5 + i, 1)) for i in range(N)],
        root / "meta/episodes/chunk-000/file-000.parquet",
    )
    rows = pq.read_table(path).to_pylist()
    for row, values in zip(rows, depths, strict=True):
        own = statistics.of_numbers(values)
        row |= {f"stats/{side}/{kind}": [[value]] if kind != "count" else value for kind, value in own.items()}
    pq.write_table(pa.Table.from_pylist(rows), path)
    data = Dataset(root, replace(robot, views=robot.views[:1], grid=()))
    export_dataset(data, tmp_path / "e")
    stored = StoredStatistics(read_layout(tmp_path / "e"))
    for i in range(N):
        assert stored.get(i)[side] == {
            k.split("/")[-1]: v for k, v in rows[i].items() if k.startswith(f"stats/{side}/")
        }
    whole, true = read_json(tmp_path / "e/meta/stats.json")[side], statistics.of_numbers(np.concatenate(depths))
    assert whole["count"] == true["count"] and np.shape(whole["mean"]) == (1, 1, 1)
    for kind in ("min", "max", "mean", "std"):
        assert np.allclose(whole[kind], true[kind])
    assert min(np.ravel(d["q50"])[0] for d in map(statistics.of_numbers, depths)) <= np.ravel(whole["q50"])[0]
    del rows[1][f"stats/{side}/count"]
    pq.write_table(pa.Table.from_pylist([rows[0], {**rows[1], f"stats/{side}/count": None}, *rows[2:]]), path)
    export_dataset(Dataset(root, data.robot), tmp_path / "f", format="v2.1")
    assert f"tells no statistics of the depths of '{side}' for 1 of {N} episodes" in caplog.text
    assert side not in StoredStatistics(read_layout(tmp_path / "f")).get(0)


def test_other_encodings_begin_a_file(tmp_path):
    black = np.zeros((2, 32, 48, 3), np.uint8)
    with Joined(tmp_path / "a.mp4") as file:
        file.add(encode(black, 20))
        assert file.fits(encode(black, 20)) and not file.fits(encode(black, 20, codec="av1"))
