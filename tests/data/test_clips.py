import json

import numpy as np
import pytest

from dreamgen.core.clip import Clip
from dreamgen.data.clips import ClipFolder


def clip(name: str, **change) -> Clip:
    video = np.broadcast_to((20 * np.arange(5, dtype=np.uint8))[:, None, None, None], (5, 18, 64, 3)).copy()
    values = {
        "id": name, "video": video, "video_hz": "50/3", "instruction": "lift the block", "seed": 9, "pair": "p3",
        "state": np.array([0.1, -2.5], np.float32), "origin": {"sim": "tabletop", "seed": 7}, "scores": {"video": 0.5},
    }  # fmt: skip
    return Clip(**values | change)


def test_round_trip(tmp_path):
    folder = ClipFolder(tmp_path / "clips")
    assert folder.ids() == [] and not folder.has("b-1")
    for name in ("b-1", "a=2.x"):
        folder.write(clip(name))
    assert folder.ids() == ["a=2.x", "b-1"] and folder.has("b-1") and len(folder) == 2
    given, back = clip("b-1"), folder.read("b-1")
    assert np.abs(back.video.astype(int) - given.video).max() <= 3
    assert np.array_equal(back.state, given.state) and back.state.dtype == np.float32
    for key in ("id", "video_hz", "instruction", "seed", "pair", "origin", "scores"):
        assert getattr(back, key) == getattr(given, key)


def test_same_clip_same_bytes(tmp_path):
    for name in ("x", "y"):
        ClipFolder(tmp_path / name).write(clip("c"))
    for file in ("c.mp4", "c.json"):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()


def test_a_clip_without_json_is_not_there(tmp_path):
    folder = ClipFolder(tmp_path)
    folder.write(clip("c"))
    (tmp_path / "c.json").unlink()
    assert folder.ids() == [] and not folder.has("c")
    with pytest.raises(ValueError, match="clip 'c' is not in"):
        folder.read("c")


def test_errors(tmp_path):
    folder = ClipFolder(tmp_path)
    for name in ("../c", "", ".c", "a b", "a/b"):
        with pytest.raises(ValueError, match="not fit for a file name"):
            folder.write(clip(name))
    with pytest.raises(ValueError, match="expected uint8"):
        folder.write(clip("c", video=np.zeros((0, 8, 8, 3), np.uint8)))
    assert folder.ids() == []
    folder.write(clip("c"))
    (tmp_path / "c.json").write_text(json.dumps(folder.info("c") | {"frames": 6}))
    with pytest.raises(ValueError, match="5 frames, its json says 6; delete c.json beside it and .*manifest.json"):
        folder.read("c")
    (tmp_path / "c.mp4").write_bytes((tmp_path / "c.mp4").read_bytes()[:99])
    with pytest.raises(ValueError, match="c.mp4.*truncated or no mp4 file; delete c.json"):
        folder.read("c")
