"""A folder of video files as a dataset: which frame each row shows, what of a picture is seen, what is refused."""

import pickle
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from dreamgen.core.clip import read_prompts
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, View
from dreamgen.core.manifest import fingerprint, write_json
from dreamgen.data.buckets import ClipPool
from dreamgen.data.lerobot import Dataset
from dreamgen.data.prompts import DatasetPrompts
from dreamgen.data.recordings import Recordings, noted
from dreamgen.data.video_folder import VideoFolder, is_video_folder

ROBOT = Embodiment(name="eye", robot_hz="20", views=[View(name="eye", key="eye", height=32, width=48, fit="crop")])
CODECS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx-vp9"}
LEVEL = 8  # of grey, from one frame to the next


def write(path: Path, frames: int = 25, fps: str | int = 30, times: list[int] | None = None) -> None:
    """Frames of 64 x 120 pixels whose middle says in grey which one they are; what is too wide is white.
    times: of the frames, in milliseconds, in place of a rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix[1:]], rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = 120, 64, "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(frames):
            picture = np.full((64, 120, 3), 255, np.uint8)
            picture[:, 12:-12] = LEVEL * k
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def shown(video: np.ndarray) -> list[int]:
    """Which frames these are, told by their grey away from the border."""
    assert video.shape[1:] == (32, 48, 3)
    return (video[:, 4:-4, 4:-4].mean((1, 2, 3)) / LEVEL).round().astype(int).tolist()


@pytest.mark.parametrize("ending", CODECS)
@pytest.mark.parametrize("fps", [24, 30, "30000/1001"])
def test_a_row_shows_the_frame_of_its_time(tmp_path, ending, fps):
    write(tmp_path / f"a.{ending}", fps=fps)
    data, rate = VideoFolder(tmp_path, ROBOT, video_hz="10"), Fraction(fps)
    tick = Fraction(1, 1000 if ending in ("mkv", "webm") else 90000)
    times = [int(k / rate / tick + Fraction(1, 2)) * tick for k in range(25)]
    seen = [[n for n in range(25) if times[n] <= Fraction(k, 20) + Fraction(7, 10000)] for k in range(60)]
    rows = [max(some) for some in seen]
    rows = rows[: int((times[24] + Fraction(7, 10000)) * 20) + 1]
    if fps in (24, 30):
        assert rows == [k * fps // 20 for k in range(24 * 20 // fps + 1)]
    assert data.length(0) == len(rows) and shown(data.canvas(0)) == rows
    clock = Clock(robot_hz="20", video_hz="10", frames=5)
    assert shown(data.canvas(0, 3 + clock.rows)) == rows[3:12:2]
    assert shown(VideoFolder(tmp_path, ROBOT, cache_mb=0).canvas(0, [9, 2, 9])) == [rows[9], rows[2], rows[9]]


def test_times_that_are_not_even_are_kept(tmp_path):
    write(tmp_path / "a.mkv", 6, times=[0, 100, 150, 400, 450, 500])
    assert shown(VideoFolder(tmp_path, ROBOT).canvas(0)) == [0, 0, 1, 2, 2, 2, 2, 2, 3, 4, 5]


def test_what_is_too_wide_is_cut_and_views_lie_as_on_the_canvas(tmp_path):
    write(tmp_path / "a.mp4")
    two = Embodiment(
        name="two", robot_hz="20", views=[View(name=n, key=n, height=32, width=24, fit="crop") for n in ("l", "r")]
    )
    for robot in (ROBOT, two):
        data = VideoFolder(tmp_path, robot)
        assert data.canvas(0, [0])[0].max() < 60  # nothing of the white border but what encoding smears
        assert data.views(0, [0])[robot.views[0].name].shape == (1, 32, robot.views[0].width, 3)


def test_videos_stand_in_order_with_their_instructions(tmp_path):
    write(tmp_path / "b/last.webm")
    write(tmp_path / "a.mp4")
    write(tmp_path / "b/first.mkv")
    write(tmp_path / "b/.hidden.mp4")
    (tmp_path / "a.txt").write_text("  open the\n drawer\n")
    data = VideoFolder(tmp_path, ROBOT)
    assert [data.episode(i).meta["video"] for i in range(len(data))] == ["a.mp4", "b/first.mkv", "b/last.webm"]
    assert data.instruction(0) == "open the drawer" and not data.has_actions
    assert np.isnan(data.episode(0).action).all() and not data.first_state(0).size
    with pytest.raises(ValueError, match="first.mkv has no instruction.*write one into first.txt.*data.instruction="):
        data.instruction(1)
    told = VideoFolder(tmp_path, ROBOT, instruction="push")
    assert [told.instruction(i) for i in range(3)] == ["open the drawer", "push", "push"]
    assert VideoFolder(tmp_path, ROBOT, episodes=[2]).episode(0).meta["video"] == "b/last.webm"
    again = pickle.loads(pickle.dumps(told))
    assert np.array_equal(again.canvas(2, [4]), told.canvas(2, [4]))
    pool = ClipPool([told], Clock(robot_hz="20", video_hz="10", frames=5))
    assert shown(pool.frames(1)) == [1, 4, 7, 10, 13] and pool.instruction(1) == "open the drawer"
    clip = Recordings(data, Clock(robot_hz="20", video_hz="10", frames=2), "name").read("episode_000002")
    assert clip.origin == {"video": "b/last.webm", "dataset": "name", "episode": 2, "row": 0}
    assert shown(clip.video) == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    prompts = read_prompts(DatasetPrompts(dataset=data, instructions=["push", "pull"])())
    assert [p.instruction for p in prompts] == ["push", "pull", "push"]  # none has one of these
    origin = {"video": "b/first.mkv", "dataset": fingerprint(data.root), "episode": 1, "row": 0}
    assert prompts[1].origin == origin and shown(prompts[1].image[None]) == [0]


def bad(root: Path, name: str) -> str:
    """Put a bad video into `root`; what is said of it."""
    path = root / "bad.mkv"
    if name == "truncated mkv" or name == "truncated mov":
        path = path.with_suffix(f".{name[-3:]}")
        write(path)
        path.write_bytes(path.read_bytes()[:-200])
        return rf"bad.{name[-3:]} \(\d+ bytes\) is truncated or no {name[-3:]} file"
    if name == "no video":
        path.with_suffix(".webm").write_text("words")
        return "is truncated or no webm file"
    if name == "no times":
        write(path, 4, times=[0, 0, 0, 500])
        return "does not tell when each of its 4 frames is shown, so its rate is unknown"
    if name == "short":
        write(path.with_suffix(".webm"), 3)
        return "has 3 frames in 0.07 s, too few for a clip: two frames at 10 Hz need 0.10 s"
    if name == "slow":
        write(path, 20, fps=5)
        return "has 5.0 frames a second, and 10 are to be seen"
    write(path)
    path.with_suffix(".txt").write_bytes(b"" if name == "empty text" else b"\xff\xfe\x00")
    return "bad.txt is empty" if name == "empty text" else "bad.txt is no UTF-8 text"


BAD = ["truncated mkv", "truncated mov", "no video", "no times", "short", "slow", "empty text", "no text"]


@pytest.mark.parametrize("name", BAD)
def test_bad_videos_are_named_or_left_out(tmp_path, name):
    write(tmp_path / "good.mp4")
    match = bad(tmp_path, name)
    with pytest.raises(ValueError, match=match) as error:
        VideoFolder(tmp_path, ROBOT, video_hz="10")
    assert "\n" not in str(error.value) and "skip_bad=true" in str(error.value)
    data = VideoFolder(tmp_path, ROBOT, video_hz="10", skip_bad=True)
    assert len(data) == 1 and data.index(0) == 1 and list(data.skipped) == [0]
    (row,) = noted(data)["skipped"]
    assert row["episode"] == 0 and row["dataset"] == tmp_path.name


def test_a_video_that_does_not_decode_is_named(tmp_path):
    write(tmp_path / "a.mp4")
    whole = bytearray((tmp_path / "a.mp4").read_bytes())
    at = whole.index(b"mdat") + 4
    whole[at : at + 900] = bytes(900)
    (tmp_path / "a.mp4").write_bytes(whole)
    with pytest.raises(ValueError, match="a.mp4 cannot be decoded.*copy it again, or take it out"):
        VideoFolder(tmp_path, ROBOT).canvas(0)


def test_what_is_no_folder_of_videos_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder"):
        VideoFolder(tmp_path / "nowhere", ROBOT)
    with pytest.raises(ValueError, match="holds no video file .mp4, mkv, webm, mov., nor does any folder in it"):
        VideoFolder(tmp_path, ROBOT)
    for file, said in (
        ("stage/run.json", "is what a stage wrote"),
        ("lerobot/meta/info.json", "open it with data=video"),
    ):
        root = tmp_path / file.split("/")[0]
        write(root / "clips/a.mp4")
        write_json(tmp_path / file, {"id": "0", "stage": "dream", "config": {}})
        assert not is_video_folder(root)
        with pytest.raises(ValueError, match=said):
            VideoFolder(root, ROBOT)
    write(tmp_path / "plain/a.mp4")
    write_json(tmp_path / "plain/manifest.json", [{"id": 7, "file": "a.mp4"}])  # of one's own
    assert is_video_folder(tmp_path / "plain") and len(fingerprint(tmp_path / "plain")) == 16
    with pytest.raises(ValueError, match="open it with data=video_folder if it holds video files"):
        Dataset(tmp_path / "plain", ROBOT)
    with pytest.raises(ValueError, match="has no episode 7; it lists 1 episodes"):
        VideoFolder(tmp_path / "plain", ROBOT, episodes=[7])
