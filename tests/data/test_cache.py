"""The cache: computed once, in any order of kills; another content, another folder."""

import numpy as np
import pytest

from dreamgen.data.cache import Cache


def fill(cache: Cache, calls: list) -> None:
    def compute(items: range) -> np.ndarray:
        calls.append(list(items))
        return np.array([[k, k * k] for k in items], np.float32)

    list(cache.build(compute))


def test_built_once_and_read_back(tmp_path):
    calls: list = []
    cache = Cache(tmp_path, {"vae": 1}, count=7, size=3)
    fill(cache, calls)
    fill(cache, calls)
    assert calls == [[0, 1, 2], [3, 4, 5], [6]] and len(cache) == 7
    assert cache.take(np.array([6, 0, 5])).tolist() == [[6, 36], [0, 0], [5, 25]]


def test_a_killed_build_goes_on_where_it_stopped(tmp_path):
    cache = Cache(tmp_path, "key", count=7, size=3)
    build = cache.build(lambda items: np.array(list(items), np.float32))
    next(build)
    build.close()
    calls: list = []
    fill(Cache(tmp_path, "key", count=7, size=3), calls)
    assert calls == [[3, 4, 5], [6]]


def test_other_content_is_another_cache(tmp_path):
    a, b = (Cache(tmp_path, {"vae": value}, count=2) for value in (1, 2))
    assert a.root != b.root and Cache(tmp_path, {"vae": 1}, count=2).root == a.root


def test_files_are_open_within_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("dreamgen.data.cache.OPEN", 2)
    cache = Cache(tmp_path, "key", count=9, size=1)
    fill(cache, [])
    assert cache.take(np.array([8, 0, 4, 8])).tolist() == [[8, 64], [0, 0], [4, 16], [8, 64]]
    assert cache._shard.cache_info().currsize == 2


def test_shards_of_another_size_are_said(tmp_path):
    fill(Cache(tmp_path, "key", count=7, size=3), [])
    with pytest.raises(ValueError, match=r"000001.npy holds 3 items, expected 2: .* Delete the folder"):
        Cache(tmp_path, "key", count=7, size=2)[2]


def test_a_wrong_count_is_said(tmp_path):
    with pytest.raises(ValueError, match="1 items for 2"):
        list(Cache(tmp_path, 0, count=2).build(lambda items: np.zeros((1, 3))))
