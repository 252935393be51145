"""Statistics that are read in chunks against numpy on all numbers at once."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamgen.data import statistics, stored_statistics
from dreamgen.data.export import export_dataset
from dreamgen.data.layout import read_layout
from dreamgen.data.lerobot import Dataset
from dreamgen.data.stored_statistics import StoredStatistics
from dreamgen.data.writer import write_dataset

LEVELS = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def numbers(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    values = np.stack([rng.normal(5, 2, 613), -np.exp(rng.normal(0, 9, 613)), rng.choice([-1.5, 0.0, 3.0], 613)], 1)
    values[40:90, 0] = values[40, 0]
    if kind == "int64":
        return rng.integers(-(2**40), 2**40, (613, 3))
    return (values > 0) if kind == "bool" else values.astype(kind)


@pytest.mark.parametrize("kind", ["float32", "float64", "int64", "bool"])
def test_chunks_are_the_whole(kind):
    values = numbers(kind)
    found = statistics.of_chunks(lambda: iter([values[:7], values[7:400], values[400:]]))
    for name, level in LEVELS.items():
        assert np.array_equal(found[name], np.quantile(values.astype(np.float64), level, axis=0)), name
    assert np.array_equal(found["min"], values.min(0)) and np.array_equal(found["max"], values.max(0))
    assert np.allclose(found["mean"], values.astype(float).mean(0), rtol=1e-12)
    assert np.allclose(found["std"], values.astype(float).std(0), rtol=1e-9)
    assert found["count"] == [613]


def test_stored_numbers_that_do_not_fit(tmp_path, monkeypatch):
    values, paths = numbers("float32"), []
    for k, part in enumerate((values[:250], values[250:])):
        column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), 3)
        paths.append(tmp_path / f"{k}.parquet")
        pq.write_table(pa.table({"x": column}), paths[-1], row_group_size=60)
    whole = statistics.of_stored(paths, "x", 3)
    monkeypatch.setattr(statistics, "WHOLE", 200)
    chunked = statistics.of_stored(paths, "x", 3)
    for name in whole:
        assert np.allclose(whole[name], chunked[name], rtol=1e-12), name


def test_a_histogram_counts_every_pixel_once(monkeypatch):
    frames = np.random.default_rng(1).integers(0, 256, (2, 11, 7, 3), dtype=np.uint8)
    monkeypatch.setattr(statistics, "PIXELS", 40)
    found = statistics.histogram(frames)
    assert all(found[c, level] == (frames[..., c] == level).sum() for c in range(3) for level in range(256))


def test_one_row():
    assert statistics.of_chunks(lambda: iter([np.float32([[4.0, -2.5]])]))["q90"] == [4.0, -2.5]


@pytest.mark.parametrize("format", ["v3.0", "v2.1"])
def test_those_of_an_episode_are_looked_up_and_few_are_held(robot, make_episodes, tmp_path, monkeypatch, format):
    write_dataset(tmp_path / "d", make_episodes(7), robot)
    data = Dataset(tmp_path / "d", robot)
    export_dataset(data, tmp_path / "e", format=format)
    layout, passes, each = read_layout(tmp_path / "e"), [], StoredStatistics._blocks
    monkeypatch.setattr(stored_statistics, "BLOCK", 3)
    monkeypatch.setattr(StoredStatistics, "_blocks", lambda self, **kind: passes.append(kind) or each(self, **kind))
    found = StoredStatistics(layout)
    for order, read in ((range(7), 2), ((6, 0, 5, 5), 3)):  # the episodes that there are, and then the statistics
        for i in order:
            assert found.get(i)["action"].items() <= statistics.of_numbers(data.episode(i).action).items()
            assert found.get(i)["observation.images.side"]["count"] == [7 + 2 * i] and len(found._block) <= 3
        assert len(passes) == read
    assert found.get(7) == {}
    assert StoredStatistics(layout, {"action"}).get(4).keys() == {"action"}


def test_the_episode_list_is_read_without_its_statistics_a_part_at_a_time(robot, make_episodes, tmp_path, monkeypatch):
    """Files in which the episodes lie in another order; one path is held for all episodes of a file."""
    write_dataset(tmp_path, make_episodes(7), robot)
    whole, path = read_layout(tmp_path).entries, tmp_path / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([6, 2, 3]), path)
    pq.write_table(table.take([1, 5, 0, 4]), path.with_name("file-001.parquet"))
    asked, batches = [], pq.ParquetFile.iter_batches

    def watched(self, **how):
        asked.append(how)
        return batches(self, **how)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    monkeypatch.setattr("dreamgen.data.layout.ROWS", 2)
    entries = read_layout(tmp_path).entries
    assert entries == whole and len({id(entry.data) for entry in entries}) == 1
    assert len({id(path) for entry in entries for path, _, _ in entry.videos.values()}) == 2
    assert {how["batch_size"] for how in asked} == {2}
    assert not [name for how in asked for name in how["columns"] if name.startswith("stats/")]
