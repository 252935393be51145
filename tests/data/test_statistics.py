"""Statistics that are read in chunks against numpy on all numbers at once."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamgen.data import statistics

LEVELS = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def numbers(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    values = np.stack([rng.normal(5, 2, 613), -np.exp(rng.normal(0, 9, 613)), rng.choice([-1.5, 0.0, 3.0], 613)], 1)
    values[40:90, 0] = values[40, 0]
    if kind == "int64":
        return rng.integers(-(2**40), 2**40, (613, 3))
    return (values > 0) if kind == "bool" else values.astype(kind)


@pytest.mark.parametrize("kind", ["float32", "int64", "bool"])
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


def test_one_row():
    assert statistics.of_chunks(lambda: iter([np.float32([[4.0, -2.5]])]))["q90"] == [4.0, -2.5]
