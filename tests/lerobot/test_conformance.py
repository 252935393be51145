"""Our datasets in the lerobot package, and its datasets in our reader. `make test-lerobot` builds what this needs."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.data.export import export_dataset
from dreamgen.data.inspection import inspect
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset

HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("LEROBOT_PYTHON", HERE.parents[1] / ".venv-lerobot/bin/python"))
if not PYTHON.is_file():
    pytest.skip("no environment with lerobot: `make test-lerobot` builds one", allow_module_level=True)

H, W, N, HZ = 48, 64, 4, 20
ROBOT = Embodiment(
    name="twoview", robot_hz=HZ,
    views=tuple(View(name=n, key=f"observation.images.{n}", height=H, width=W) for n in ("front", "side")),
    state=(Part(name="pose", start=0, stop=3),), action=(Part(name="move", start=0, stop=4),),
)  # fmt: skip
ROWS = [0, 8, 17, 29]
DELTAS = {"observation.images.front": [-0.1, 0.0, 0.05], "action": [0.0, 0.05, 0.1, 0.15], "observation.state": [-0.05]}


def episode(i: int) -> Episode:
    """Smooth pictures that tell episode and row; values of a random walk."""
    rng, rows = np.random.default_rng(i), 7 + 2 * i
    x = np.linspace(0, 1, W)[None, None, :, None]
    level = 20 + 50 * i + 4 * np.arange(rows)[:, None, None, None] + 40 * x * np.ones((1, H, 1, 3))
    front = level.clip(0, 255).astype(np.uint8)
    return Episode(
        instruction=f"push the block {i % 3}", state=rng.normal(size=(rows, 3)).astype(np.float32),
        action=rng.normal(size=(rows, 4)).astype(np.float32), video={"front": front, "side": 255 - front},
        extra={"label_spread": rng.random((rows, 4), np.float32), "flag": rng.random((rows, 1)) > 0.5},
        meta={"source": "dream" if i % 2 else "real", "seed": i},
    )  # fmt: skip


GIVEN = [episode(i) for i in range(N)]


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Path:
    """A folder of datasets of both kinds, and what lerobot found in ours."""
    root = tmp_path_factory.mktemp("conformance")
    write_dataset(root / "h264", GIVEN, ROBOT)
    write_dataset(root / "av1", GIVEN, ROBOT, codec="av1")
    write_dataset(root / "split", GIVEN, ROBOT, video_mb=1e-6, data_mb=1e-6, chunks_size=3)
    export_dataset(Dataset(root / "h264", ROBOT), root / "v21", format="v2.1")
    export_dataset(Dataset(root / "v21", ROBOT), root / "back", format="v3.0")
    given = {"fps": HZ, "episodes": N}
    for i, e in enumerate(GIVEN):
        given |= {f"{i}/task": e.instruction, f"{i}/action": e.action, f"{i}/state": e.state}
        given |= {f"{i}/video/{view.key}": e.video[view.name] for view in ROBOT.views}
    np.savez(root / "given.npz", **given)
    jobs = [{"do": "read", "root": str(root / name), "out": str(root / f"{name}.npz"), "rows": ROWS, "deltas": DELTAS}
            for name in ("h264", "av1", "split", "back")]  # fmt: skip
    jobs += [{"do": "write", "root": str(root / f"their_{codec}"), "data": str(root / "given.npz"), "codec": codec}
             for codec in ("av1", "h264")]  # fmt: skip
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run([str(PYTHON), str(HERE / "peer.py"), str(root / "jobs.json")], capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
                                            "HF_HOME": str(root / "hub")}, timeout=1200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    if told["format"] != "v3.0":
        pytest.skip(f"lerobot {told['lerobot']} speaks {told['format']}; v3.0 needs 0.4 or newer")
    return root


def read(root: Path, name: str) -> dict[str, np.ndarray]:
    """What lerobot found."""
    error = root / f"{name}.npz.error"
    assert not error.is_file(), error.read_text()
    with np.load(root / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.mark.parametrize("name", ["h264", "av1", "split", "back"])
def test_lerobot_reads_what_we_write(there: Path, name: str) -> None:
    found, ours = read(there, name), Dataset(there / name, ROBOT)
    lengths = [len(e.action) for e in GIVEN]
    starts = np.cumsum([0, *lengths])
    assert found["length"] == starts[-1] and found["episodes"] == N
    assert np.array_equal(found["column/action"], np.concatenate([e.action for e in GIVEN]))
    assert np.array_equal(found["column/label_spread"], np.concatenate([e.extra["label_spread"] for e in GIVEN]))
    assert np.array_equal(found["column/flag"].ravel(), np.concatenate([e.extra["flag"] for e in GIVEN]).ravel())
    for row in ROWS:
        i = int(np.searchsorted(starts, row, side="right")) - 1
        at, e, item = int(row - starts[i]), GIVEN[i], f"item/{row}/"
        assert found[item + "task"] == e.instruction and found[item + "episode_index"] == i
        assert np.allclose(found[item + "observation.state"], e.state[at])
        mine = ours.views(i, [at])
        for view in ROBOT.views:
            picture = np.transpose(found[item + view.key], (1, 2, 0)) * 255
            assert np.abs(picture - mine[view.name][0]).mean() < 2
            assert np.abs(picture - e.video[view.name][at].astype(float)).mean() < 4
        window = f"window/{row}/"
        offsets = at + np.arange(4)
        last = len(e.action) - 1
        assert np.allclose(found[window + "action"], e.action[np.minimum(offsets, last)])
        assert np.array_equal(found[window + "action_is_pad"], offsets > last)
        shown = np.clip(at + np.array([-2, 0, 1]), 0, last)
        pictures = np.transpose(found[window + "observation.images.front"], (0, 2, 3, 1)) * 255
        assert np.abs(pictures - ours.views(i, shown)["front"]).mean() < 2


@pytest.mark.parametrize("name", ["h264", "back"])
def test_statistics_are_what_lerobot_normalises_by(there: Path, name: str) -> None:
    found = read(there, name)
    action = np.concatenate([e.action for e in GIVEN]).astype(float)
    for key, value in {"mean": action.mean(0), "std": action.std(0), "q99": np.quantile(action, 0.99, 0)}.items():
        assert np.allclose(found[f"stats/action/{key}"], value, atol=1e-6)
    pixels = np.concatenate([e.video["side"].reshape(-1, 3) for e in GIVEN]) / 255
    assert found["stats/observation.images.side/mean"].shape == (3, 1, 1)
    assert np.allclose(found["stats/observation.images.side/mean"].ravel(), pixels.mean(0), atol=0.02)


def test_lerobot_filters_by_provenance(there: Path) -> None:
    found = read(there, "h264")
    if "sources" not in found:
        pytest.skip("this release of lerobot has no episode_filter")
    assert found["sources"].tolist() == ["real", "dream", "real", "dream"] and found["dreams"].tolist() == [1, 3]


@pytest.mark.parametrize("codec", ["av1", "h264"])
def test_we_read_what_lerobot_writes(there: Path, codec: str) -> None:
    root = there / f"their_{codec}"
    error = Path(f"{root}.error")
    assert not error.is_file(), error.read_text()
    data = Dataset(root, ROBOT)
    assert len(data) == N and not data.skipped and data.mended == []
    assert data.info["features"]["observation.images.front"]["info"]["video.codec"] == codec
    for i, e in enumerate(GIVEN):
        assert np.array_equal(data.episode(i).action, e.action) and np.array_equal(data.episode(i).state, e.state)
        assert data.instruction(i) == e.instruction
        rows = [len(e.action) - 1, 0, 3]
        for name, frames in data.views(i, rows).items():
            assert np.abs(frames.astype(float) - e.video[name][rows]).mean() < 6
    found, counts = inspect(root, ROBOT)
    assert counts == {"episodes": N, "frames": sum(len(e.action) for e in GIVEN)}
    assert [f for f in found if f.level == "error"] == []
    export_dataset(data, there / f"from_{codec}", format="groot")
    again = Dataset(there / f"from_{codec}", ROBOT)
    assert np.array_equal(again.views(2)["side"], data.views(2)["side"])
