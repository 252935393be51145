"""Writing in one piece, whoever else writes."""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from dreamgen.core.manifest import Stage, replacing, settle, write_json
from dreamgen.stages.sharing import sweep


def test_processes_of_one_number_on_two_machines_do_not_meet(tmp_path):
    path = tmp_path / "a.npy"
    with replacing(path) as one, replacing(path) as other:
        assert one != other and {one.parent, other.parent} == {tmp_path} and one.suffix == ".npy"
        one.write_text("one")
        other.write_text("other")
        assert not path.exists()
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]  # the last to end


def test_what_a_kill_leaves_is_swept(tmp_path):
    with replacing(tmp_path / "a.npy") as name:
        name.touch()
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "b.npy") as other:
        other.touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    name.touch()  # of a process that was killed
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.fixture
def done(monkeypatch) -> list[tuple[str, str]]:
    """What is synced and named, in order."""
    told, fsync, replace = [], os.fsync, os.replace

    def synced(handle: int) -> None:
        told.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def named(old: Path, new: Path) -> None:
        told.append(("name", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    return told


def test_what_has_its_name_is_on_the_disk(tmp_path, done):
    with replacing(tmp_path / "a.npy") as name:
        name.write_text("whole")
    assert done == [("sync", name.name), ("name", "a.npy"), ("sync", tmp_path.name)]


def test_a_manifest_is_written_when_all_of_its_folder_is_on_the_disk(tmp_path, done):
    with Stage(tmp_path / "out", "made", config={}) as run:
        (run.out / "model").mkdir()
        (run.out / "model/weights.bin").write_bytes(b"weights")
        (run.out / "gone").symlink_to(tmp_path / "nowhere")
        run.finish()
    before = done[: done.index(("name", "manifest.json"))]
    assert {("sync", name) for name in ("weights.bin", "model", "out", tmp_path.name)} <= set(before)


@pytest.mark.parametrize(("number", "raised"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_tell_is_believed_and_a_broken_one_is_not(number, raised, tmp_path, monkeypatch):
    def fails(handle: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no") if raised else nullcontext():
        write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").exists() != raised


HOLDER = """
import sys, time
from dreamgen.core.manifest import Stage
with Stage(sys.argv[1], "train", config={}):
    print("begun", flush=True)
    time.sleep(600)
"""


def test_two_runs_do_not_write_into_one_folder_and_a_killed_one_frees_it(tmp_path):
    """Its children, which may outlive it for a moment, hold nothing."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "begun\n"
        with pytest.raises(ValueError, match=f"is being written by another run .process {other.pid} on .* wait for it"):
            Stage(tmp_path, "train", config={})
        Stage(tmp_path, "train", config={}, shared=True)
        Stage(tmp_path, "train", config={}, writes=False)
        other.kill()
    with Stage(tmp_path, "train", config={}) as run:
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    again = Stage(tmp_path, "train", config={})
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    again.finish()
    assert run.id == again.id and [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_run_holds_its_folder_until_its_manifest_is_there(tmp_path):
    """Also once all that is in the folder is on the disk."""
    other = [sys.executable, "-c", HOLDER.replace("time.sleep(600)", ""), tmp_path]
    with Stage(tmp_path, "train", config={}) as run:
        (tmp_path / "weights.bin").write_bytes(b"weights")
        settle(tmp_path)
        refused = subprocess.run(other, capture_output=True, text=True)
        assert f"is being written by another run (process {os.getpid()} on" in refused.stderr and not refused.stdout
        run.finish()
    assert subprocess.run(other, capture_output=True, text=True).stdout == "begun\n"


def test_a_setting_that_is_null_is_no_other_configuration(tmp_path):
    with Stage(tmp_path, "dream", config={"steps": 3, "model": {"path": "a"}}) as run:
        done = run.finish(clips=2)
    with Stage(tmp_path, "dream", config={"steps": 3, "model": {"path": "a", "level": None}, "more": None}) as run:
        assert run.complete and run.manifest()["id"] == done["id"]
    with pytest.raises(ValueError, match="another configuration .config.model.level: None -> 0.1"):
        Stage(tmp_path, "dream", config={"steps": 3, "model": {"path": "a", "level": 0.1}})
