"""Datasets whose pictures lie in the tables (dtype `image`), as openpi's conversions write them."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dreamgen.core.manifest import read_json
from dreamgen.data.export import export_dataset
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.stages.describe import describe
from dreamgen.stages.validate import validate

FRONT = "observation.images.front"


def png(picture: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def stored(tmp_path, robot, make_episodes):
    """A v3.0 dataset of others: the front view, a colour and a depth camera lie in its table, the side view is a video;
    root, and a function that changes its table."""
    root, episodes = tmp_path / "stored", list(make_episodes(3))
    write_dataset(root, episodes, robot)
    (root / "meta/dreamgen.json").unlink()
    info = json.loads((root / "meta/info.json").read_text())
    path = root / "data/chunk-000/file-000.parquet"
    front = np.concatenate([episode.video["front"] for episode in episodes])
    front[:, 0, 0] = (9, 80, 200)
    depth = np.full((8, 9), 40000, np.uint16)
    table = pq.read_table(path)
    for name, cells in (
        (FRONT, map(png, front)),
        ("wrist", [png(front[0, :9, :7])] * 27),
        ("depth", [png(depth)] * 27),
    ):
        table = table.append_column(name, pa.array(list(cells)))
        info["features"][name] = {"dtype": "image", "shape": [40, 56, 3], "names": ["height", "width", "channels"]}
    pq.write_table(table.replace_schema_metadata(None), path, row_group_size=4)
    (root / "meta/info.json").write_text(json.dumps(info))

    def change(row: int, cell: dict | None) -> None:
        cells = table[FRONT].to_pylist()
        cells[row] = cell
        at = table.column_names.index(FRONT)
        pq.write_table(table.set_column(at, FRONT, pa.array(cells)), path, row_group_size=4)

    return root, [front[:7], front[7:16], front[16:]], change


def test_they_are_read_as_they_were_stored(stored, robot):
    root, front, _ = stored
    for megabytes in (0, 512):
        data = Dataset(root, robot, cache_mb=megabytes)
        for i in range(3):
            assert np.array_equal(data.views(i)["front"], front[i])
        assert np.array_equal(data.views(1, [8, 0, 5, 5])["front"], front[1][[8, 0, 5, 5]])
        assert data.views(1, [])["front"].shape == (0, 40, 56, 3)
        assert np.abs(data.views(1, [3])["side"].astype(int) - (255 - front[1][[3]]))[:, 1:].max() <= 3


def test_they_may_be_files_of_their_own_and_broken_ones_are_named(stored, robot):
    root, front, change = stored
    (root / "images").mkdir()
    Image.fromarray(front[1][2]).save(root / "images/a.png")
    change(9, {"bytes": None, "path": "images/a.png"})
    assert np.array_equal(Dataset(root, robot).views(1)["front"], front[1])
    for cell, words in (({"bytes": b"no", "path": None}, "cannot identify"), (None, "its row holds NoneType"),
                        ({"bytes": None, "path": "images/b.png"}, "No such file"),
                        (png(np.zeros((4, 4), np.uint16)), "of mode I;16; expected 8 bits"),
                        (png(front[0][0, :8]), "have the sizes")):  # fmt: skip
        change(9, cell)
        data = Dataset(root, robot, cache_mb=0)
        data.views(0)
        with pytest.raises(ValueError, match=f"(?s)^episode 1 of .*'{FRONT}'.*{words}.*leave the episode out"):
            data.views(1, [1, 2])
    table = pq.read_table(root / "data/chunk-000/file-000.parquet")
    pq.write_table(table.drop_columns([FRONT]), root / "data/chunk-000/file-000.parquet")
    with pytest.raises(ValueError, match=f"has no column '{FRONT}', whose pictures view 'front' shows"):
        Dataset(root, robot)


def test_a_table_of_very_many_row_groups_is_read_once(stored, robot, monkeypatch):
    """Its footer, too, which names every column of every group; and no slice passes through the groups again."""
    root, front, _ = stored
    path = root / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=1)
    assert pq.read_metadata(path).num_row_groups == 27
    footers, read, opened = [], pq.read_metadata, pq.ParquetFile
    monkeypatch.setattr(pq, "read_metadata", lambda of: footers.append(of) or read(of))
    monkeypatch.setattr(pq, "ParquetFile", lambda of, metadata=None: opened(of, metadata=metadata))
    data = Dataset(root, robot, cache_mb=0)
    for i in range(3):
        assert np.array_equal(data.frames(i, FRONT, np.arange(len(front[i]))[::-1]), front[i][::-1])
        assert {column.num_chunks for column in data.table(i).columns} == {1}
        assert data.table(i)["episode_index"].unique().to_pylist() == [i]
    assert footers == [path]
    pq.write_table(pq.read_table(path).slice(9), path, row_group_size=1)  # written anew: read anew
    assert np.array_equal(data.frames(0, FRONT, np.arange(7)), front[1][2:])


def test_they_are_described_checked_and_exported_as_video(stored, robot, tmp_path):
    root, front, change = stored
    text = describe(str(root), out=tmp_path / "described", record={})["results"]["text"]
    assert f"key: {FRONT}" in text and "observation.images.side" in text
    told = validate(str(root), robot=robot, out=tmp_path / "checked", record={})["results"]
    assert told["errors"] == 0 and "meta/stats.json has none of 'observation.images.front'" not in told["table"]
    data = Dataset(root, robot)
    done = export_dataset(data, tmp_path / "out")
    assert (done["encoded"], done["left_out"]) == (6, ["depth"])
    made = Dataset(tmp_path / "out", robot)
    features = read_json(tmp_path / "out/meta/info.json")["features"]
    assert features[FRONT]["dtype"] == features["wrist"]["dtype"] == "video" and features["wrist"]["shape"] == [9, 7, 3]
    for i in range(3):
        assert np.abs(made.views(i)["front"].astype(int) - front[i])[:, 4:].max() <= 3
    change(9, None)
    told = validate(str(root), robot=robot, out=tmp_path / "checked", record={})["results"]
    assert told["errors"] == 1
    (error,) = [f for f in read_json(tmp_path / "checked/findings.json")["findings"] if f["level"] == "error"]
    assert error["episodes"] == [1] and "at row 2 cannot be used: its row holds NoneType" in error["what"]
