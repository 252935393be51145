"""Digests of a large folder: the same as without a memory, and only what changed is read again."""

import os
from pathlib import Path

import pytest

from dreamgen.core import manifest
from dreamgen.core.manifest import FILE, RUN, Stage, fingerprint, is_complete, require_complete, tree_digest, write_json


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read; each call of `tree_digest` is as in a process of its own."""
    names, whole = list[str](), manifest.file_digest

    def noted(path: Path) -> str:
        manifest._digest_of.cache_clear()
        names.append(path.name)
        return whole(path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest, "STORED", 20)
    monkeypatch.setattr(manifest, "file_digest", noted)
    return names


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a", "b", "c/d"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the text of {name}")
        os.utime(path, (1e9, 1e9))
    return tmp_path / "tree"


@pytest.mark.parametrize("text", ["[1]", '{"id": "mine", "version": 3}', "{", '"a text"', "\xff"])
def test_a_manifest_of_ones_own_is_a_file_like_any_other(tree: Path, text: str) -> None:
    before = fingerprint(tree)
    for name in (FILE, RUN):
        (tree / "c" / name).write_text(text, encoding="latin-1")
    below = fingerprint(tree)
    (tree / FILE).write_text(text, encoding="latin-1")
    assert not is_complete(tree) and len({before, below, fingerprint(tree)}) == 3
    with pytest.raises(ValueError, match="the input .* is unfinished"):
        require_complete(tree, "the input")
    with pytest.raises(ValueError, match="manifest.json is no stage's; choose another `step` or `stage.out`"):
        Stage(tree, "dream", config={})


def test_what_stages_say_of_their_folders_is_no_part_of_a_digest(tree: Path) -> None:
    before = fingerprint(tree)
    for name in (FILE, RUN):
        write_json(tree / "c" / name, {"id": "0", "stage": "dream", "config": {}, "seconds": 3.0})
    assert fingerprint(tree) == before


def stored(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.json"))


def test_only_what_changed_is_read_again(tree: Path, tmp_path: Path, read: list[str], monkeypatch) -> None:
    first = tree_digest(tree)
    assert read == ["a", "b", "d"] and len(stored(tmp_path)) == 1
    read.clear()
    assert tree_digest(tree) == first and read == []
    (tree / "b").write_text("the text of B")  # as long as before
    second = tree_digest(tree)
    assert second != first and read == ["b"]
    read.clear()
    assert tree_digest(tree) == second and read == ["b"]  # just written: it may be written again at the same time
    os.utime(tree / "b", (1e9, 1e9 + 5))
    (tree / "a").rename(tree / "e")
    read.clear()
    moved = tree_digest(tree)
    assert moved not in (first, second) and read == ["b", "e"]
    monkeypatch.setattr(manifest, "STORED", 2**30)  # without a memory
    assert tree_digest(tree) == moved


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', ""])
def test_a_store_that_cannot_be_read_is_made_anew(tree: Path, tmp_path: Path, read: list[str], text: str) -> None:
    first = tree_digest(tree)
    good = stored(tmp_path)[0].read_text()
    stored(tmp_path)[0].write_text(text)
    assert tree_digest(tree) == first and stored(tmp_path)[0].read_text() == good


def test_where_nothing_can_be_kept_all_is_read(tree: Path, tmp_path: Path, read: list[str]) -> None:
    (tmp_path / "cache").write_text("a file")
    assert tree_digest(tree) == tree_digest(tree) and len(read) == 6


def test_what_an_interrupted_call_read_is_kept(tree: Path, tmp_path: Path, read: list[str], monkeypatch) -> None:
    whole = manifest.file_digest

    def interrupted(path: Path) -> str:
        if path.name == "d":
            raise KeyboardInterrupt
        return whole(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(manifest, "file_digest", interrupted)
        tree_digest(tree)
    read.clear()
    tree_digest(tree)
    assert read == ["d"]


def test_small_folders_leave_no_trace(tree: Path, tmp_path: Path, read: list[str], monkeypatch) -> None:
    monkeypatch.setattr(manifest, "STORED", 2**26)
    tree_digest(tree)
    assert len(read) == 3 and not stored(tmp_path)
