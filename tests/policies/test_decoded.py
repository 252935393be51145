"""Pictures that memory does not hold: each run of a video is decoded once, whatever is drawn."""

import errno
import multiprocessing
import os
import shutil
import signal
import threading
from types import SimpleNamespace

import av
import numpy as np
import pytest

from dreamgen.core.clip import Episode
from dreamgen.data.export import export_dataset
from dreamgen.data.lerobot import Dataset
from dreamgen.data.video_folder import VideoFolder
from dreamgen.data.writer import write_dataset
from dreamgen.engine.state import states_gb
from dreamgen.engine.train import train
from dreamgen.policies import decoded
from dreamgen.policies.chunks import Chunks
from dreamgen.video.mp4 import write_mp4
from dreamgen.video.opened import key_frames
from tests.engine.test_processes import forked
from tests.policies.test_feed import feed
from tests.policies.toy import STEPS, A, D, H, W, batch, policy, robot

ROWS, GOP = (17, 9, 24), 7


@pytest.fixture(scope="module", params=["v3.0", "v2.1"])
def data(request, tmp_path_factory) -> Dataset:
    rng, root = np.random.default_rng(2), tmp_path_factory.mktemp("decoded")

    def episode(n: int) -> Episode:
        level = rng.integers(0, 256, (2, 1, H, W, 3), dtype=np.uint8).repeat(n, 1)
        level[:, :, :4, :4] = 4 * np.arange(n)[:, None, None, None]  # little moves: no key frames but those asked for
        return Episode(instruction="go", state=rng.normal(size=(n, D)).astype(np.float32), meta={},
                       action=rng.normal(size=(n, A)).astype(np.float32),
                       video={view.name: level[k] for k, view in enumerate(robot().views)})  # fmt: skip

    write_dataset(root / "made", map(episode, ROWS), robot(), gop=GOP)
    export_dataset(Dataset(root / "made", robot()), root / request.param, format=request.param)
    return Dataset(root / request.param, robot(), cache_mb=0)


def drawn(chunks: Chunks) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    places = [chunks.at(int(k)) for k in rng.integers(len(chunks), size=40)]
    return [chunks.pictures(*place) for place in places]


def test_each_run_is_decoded_once_and_pictures_are_the_same(data, tmp_path, monkeypatch):
    asked, read = [], Dataset.views
    monkeypatch.setattr(Dataset, "views", lambda self, i, rows: asked.append((i, list(rows))) or read(self, i, rows))
    again = Chunks(data, horizon=STEPS, memory_gb=0.0)
    truth = drawn(again)
    assert len(asked) == 40  # without a folder every time
    asked.clear()
    chunks = Chunks(data, horizon=STEPS, memory_gb=0.0, folder=tmp_path / "run")
    for found, expected in zip(drawn(chunks), truth, strict=True):
        assert np.array_equal(found, expected)
    runs = [(i, list(range(a, min(a + GOP, n)))) for i, n in enumerate(ROWS) for a in range(0, n, GOP)]
    assert sorted(asked) == runs and drawn(chunks)[3].shape == (2, H, W, 3) and len(asked) == len(runs)
    assert list((tmp_path / "run").iterdir()) == []  # the file has no name: nothing is left, whatever ends the process


def test_long_runs_are_decoded_some_rows_at_a_time(data, tmp_path, monkeypatch):
    truth = drawn(Chunks(data, horizon=STEPS, memory_gb=0.0))
    monkeypatch.setattr(decoded, "ROWS", 3)
    found = drawn(Chunks(data, horizon=STEPS, memory_gb=0.0, folder=tmp_path))
    assert all(np.array_equal(a, b) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("memory_gb", [0.0, 1.0])
def test_forks_share_what_is_decoded(data, tmp_path, memory_gb):
    """In memory and in the file, also where nothing was asked for before they were made."""
    chunks = Chunks(data, horizon=STEPS, memory_gb=memory_gb, folder=tmp_path)
    truth = drawn(Chunks(data, horizon=STEPS, memory_gb=0.0))
    assert chunks.held_gb == pytest.approx(bool(memory_gb) * sum(ROWS) * 2 * H * W * 3 / 1e9)
    forked(2, lambda rank: drawn(chunks))
    chunks.dataset = chunks._decoded.dataset = None  # nothing can be decoded here
    assert all(np.array_equal(a, b) for a, b in zip(drawn(chunks), truth, strict=True))


@pytest.mark.parametrize("full", ["from the start", "later"])
def test_a_full_disk_costs_time_alone(data, tmp_path, monkeypatch, caplog, full):
    caplog.set_level("INFO")
    truth, written = drawn(Chunks(data, horizon=STEPS, memory_gb=0.0)), []

    def write(*what) -> int:
        written.append(what)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "no space")
        return save(*what)

    save = os.pwrite
    monkeypatch.setattr(os, "pwrite", write)
    if full == "from the start":
        monkeypatch.setattr(decoded.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    found = drawn(Chunks(data, horizon=STEPS, memory_gb=0.0, folder=tmp_path))
    assert all(np.array_equal(a, b) for a, b in zip(found, truth, strict=True))
    assert "are decoded whenever they are drawn" in caplog.text and len(written) == (0 if full != "later" else 3)


def test_files_promise_the_disk_once_and_leave_room_for_the_states(data, tmp_path, monkeypatch):
    """A file takes the disk as it fills, so what is free does not tell what it will take."""
    size, free = sum(ROWS) * 2 * H * W * 3, [0.0]
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    how = dict(memory_gb=0.0, folder=tmp_path, reserve_gb=1e-6)
    for room, kept in ((1.5, [0, 0, 0]), (2.5, [1, 0, 0]), (3.5, [1, 1, 0]), (4.5, [1, 1, 1])):
        free[0] = (room - 1) * size + 1000
        made = feed(policy(), real=[data] * 3, options=dict(how))
        assert [round(1e9 * chunks.kept_gb / size) for chunks in made.chunks] == kept
        assert made.options["reserve_gb"] == pytest.approx(1e-6 + sum(kept) * size / 1e9)


def test_a_training_writes_no_more_than_is_reserved(tmp_path):
    """Two states, one beside the other, and the result."""
    model = policy(align_weight=0.3, align_layer=2, future_tokens=3, head_width=64, heads=4)
    state, how = tmp_path / "training", dict(lr=1e-2, warmup=1, precision="fp32", checkpoint_every=1, log_every=1)
    train(model, lambda step: batch(), out=tmp_path, steps=1, ema=0.9, **how)
    model.save(tmp_path)
    once = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    taken = 2 * once + (tmp_path / "model.safetensors").stat().st_size
    assert 0.8e9 * states_gb(model) < taken < 1e9 * states_gb(model)


@pytest.mark.parametrize("after", [0.0, 0.5, 1.0])
def test_what_a_killed_process_was_keeping_is_decoded_again(data, tmp_path, monkeypatch, after):
    """Killed before, in the middle and at the end of the second write; pictures are noise: half of one would show."""
    chunks, written, save = Chunks(data, horizon=STEPS, memory_gb=0.0, folder=tmp_path), [], os.pwrite
    truth = drawn(Chunks(data, horizon=STEPS, memory_gb=0.0))
    chunks.pictures(0, 0)

    def write(file: int, what: bytes, at: int) -> int:
        written.append(at)
        if len(written) < 2:
            return save(file, what, at)
        save(file, what[: int(after * len(what))], at)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", write)
        child = multiprocessing.get_context("fork").Process(target=drawn, args=(chunks,))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    asked, read = [], Dataset.views
    monkeypatch.setattr(Dataset, "views", lambda self, i, rows: asked.append((i, rows[0])) or read(self, i, rows))
    assert all(np.array_equal(a, b) for a, b in zip(drawn(chunks), truth, strict=True))
    runs = sum(-(-n // GOP) for n in ROWS)
    assert len(set(asked)) == len(asked) == runs - 2  # all but the two that were kept whole
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ending", "runs"), [("mp4", 5), ("mkv", 1)])
def test_video_files_are_decoded_run_by_run_too(tmp_path, monkeypatch, ending, runs):
    """At another rate than the robot's: 40 frames, a key frame every 8, seen in 20 rows. An mkv lists no frames."""
    rng, one = np.random.default_rng(4), robot(views=robot().views[:1], grid=())
    for k in range(2):
        frames = rng.integers(0, 256, (1, 32, 40, 3), dtype=np.uint8).repeat(40, 0)
        frames[:, :4, :4] = 4 * np.arange(40)[:, None, None, None]
        write_mp4(tmp_path / f"made/{k}.mp4", frames, 40, gop=8)
        with av.open(str(tmp_path / f"made/{k}.mp4")) as source, av.open(str(tmp_path / f"{k}.{ending}"), "w") as file:
            stream = file.add_stream_from_template(source.streams.video[0])
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = stream
                    file.mux(packet)
    shutil.rmtree(tmp_path / "made")
    data, asked, read = VideoFolder(tmp_path, one, cache_mb=0), [], Dataset.views
    truth = drawn(Chunks(data, horizon=STEPS, memory_gb=0.0))
    monkeypatch.setattr(Dataset, "views", lambda self, i, rows: asked.append((i, list(rows))) or read(self, i, rows))
    chunks = Chunks(data, horizon=STEPS, memory_gb=0.0, folder=tmp_path / "run")
    assert all(np.array_equal(a, b) for a, b in zip(drawn(chunks), truth, strict=True))
    rows = np.array_split(np.arange(20), runs)
    assert sorted(asked) == [(i, run.tolist()) for i in range(2) for run in rows]


@pytest.mark.parametrize("how", [dict(memory_gb=0.0), dict(memory_gb=0.0, folder="kept"), dict(memory_gb=1.0)])
def test_episodes_are_decoded_by_several_threads(data, tmp_path, monkeypatch, how):
    """Those that are kept by none; rows stay in the order in which they are asked for."""
    how = {key: tmp_path / value if key == "folder" else value for key, value in how.items()}
    places = [(2, 20), (0, 3), (2, 1), (0, 3)]
    truth = [Chunks(data, horizon=STEPS, memory_gb=0.0).pictures(*place) for place in places]
    both, read, threads = threading.Barrier(2, timeout=60), Dataset.views, set()

    def views(self, i: int, rows) -> dict[str, np.ndarray]:
        threads.add(threading.current_thread().name)
        if i not in seen:
            seen.add(i)
            both.wait()  # each waits for the other one
        return read(self, i, rows)

    chunks, seen = Chunks(data, horizon=STEPS, **how), set()
    monkeypatch.setattr(Dataset, "views", views)
    assert np.array_equal(chunks.batch(places)["pictures"], np.stack(truth)) and len(threads) == 2
    threads.clear()
    assert np.array_equal(chunks.batch(places)["pictures"], np.stack(truth))
    assert bool(threads) == (how == dict(memory_gb=0.0))


def test_key_frames_are_where_decoding_begins(data):
    path, first, _ = data.entry(2).videos[data.robot.views[0].key]
    keys = key_frames(path) - first
    assert [k for k in keys.tolist() if k >= 0] == list(range(0, ROWS[2], GOP))
