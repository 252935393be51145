"""One camera, one geometry: a recording, a video file and a photo show the same part of the scene at the same place."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import FITS, Embodiment, Part, View
from dreamgen.data.layout import CONTRACT
from dreamgen.data.lerobot import Dataset
from dreamgen.data.prompts import FolderPrompts
from dreamgen.data.video_folder import VideoFolder
from dreamgen.data.writer import write_dataset
from dreamgen.video.mp4 import encode, read_mp4, write_mp4
from dreamgen.video.opened import OpenVideo
from dreamgen.video.tiling import fit

CAMERA = View(name="front", key="observation.images.front", height=48, width=80)
RECORDED = Embodiment(name="arm", robot_hz="20", views=[CAMERA], action=[Part(name="a", start=0, stop=1)])


def seen_as(how: str, *names: str) -> Embodiment:
    views = [replace(CAMERA, name=name, key=f"observation.images.{name}", height=32, width=32, fit=how)
             for name in names]  # fmt: skip
    return replace(RECORDED, views=views, grid=())


@pytest.fixture
def scene() -> np.ndarray:
    """A smooth picture that is no mirror of itself, (h w 3)."""
    down, right = np.mgrid[0:48, 0:80]
    return np.stack([3 * right, 5 * down, 200 - right - down], -1).astype(np.uint8)


@pytest.mark.parametrize("how", FITS)
def test_recordings_videos_and_photos_are_fitted_alike(tmp_path: Path, scene: np.ndarray, how: str) -> None:
    robot, wanted = seen_as(how, "front"), fit(scene, 32, 32, how)
    film, zeros = np.repeat(scene[None], 4, 0), np.zeros((4, 1), np.float32)
    episode = Episode(instruction="go", state=zeros[:, :0], action=zeros, video={"front": film})
    write_dataset(tmp_path / "recorded", [episode], RECORDED)
    (tmp_path / "recorded" / CONTRACT).unlink()  # as one that others made
    (tmp_path / "videos").mkdir()
    write_mp4(tmp_path / "videos" / "a.mp4", film, 20)
    (tmp_path / "photos").mkdir()
    Image.fromarray(scene).save(tmp_path / "photos" / "a.png")
    photo = FolderPrompts(folder=tmp_path / "photos", robot=robot, instructions=["go"])()[0].image
    assert np.array_equal(photo, wanted)
    for data in (Dataset(tmp_path / "recorded", robot), VideoFolder(tmp_path / "videos", robot)):
        assert np.abs(data.canvas(0, [2])[0].astype(int) - wanted).max() <= 12  # encoded


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_what_a_phone_wrote_sideways_enters_upright(tmp_path: Path, scene: np.ndarray, turns: int) -> None:
    """A photo tells it by its EXIF orientation, a video by its display matrix."""
    robot, stored = seen_as("crop", "front"), np.rot90(scene, -turns)  # turned back `turns` times, it is the scene
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x0112] = {1: 8, 2: 3, 3: 6}[turns]
    Image.fromarray(stored).save(tmp_path / "photos" / "a.png", exif=exif)
    photo = FolderPrompts(folder=tmp_path / "photos", robot=robot, instructions=["go"])()[0].image
    assert np.array_equal(photo, fit(scene, 32, 32, "crop"))
    cos, sin = (round(65536 * f(np.pi / 2 * turns)) for f in (np.cos, np.sin))
    path = tmp_path / "videos" / "a.mp4"

    def shown(*matrix: int) -> VideoFolder:
        data = bytearray(encode(np.repeat(stored[None], 4, 0), 20))
        at = data.index(b"tkhd") + 44
        data[at : at + 20] = struct.pack(">5i", *matrix)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return VideoFolder(path.parent, robot)

    for other, size in ((scene, (48, 80)), (np.pad(scene, ((0, 8), (0, 8), (0, 0)), "edge"), (56, 88))):
        stored = np.rot90(other, -turns)  # decord reads the second one, PyAV those of the first size, and `OpenVideo`
        data = shown(cos, -sin, 0, sin, cos)
        assert np.abs(data.canvas(0, [2])[0].astype(int) - fit(other, 32, 32, "crop")).max() <= 12  # encoded
        assert OpenVideo(path).read([2]).shape[1:3] == size
        assert np.abs(OpenVideo(path).read([2])[0].astype(int) - read_mp4(path, [2])[0]).max() <= 3
    with pytest.raises(ValueError, match="a.mp4 is to be shown mirrored.*ffmpeg -i a.mp4 upright.mp4"):
        shown(-cos, sin, 0, sin, cos)


def test_several_views_take_a_photo_each(tmp_path: Path, scene: np.ndarray) -> None:
    robot = seen_as("crop", "front", "wrist")
    listed = FolderPrompts(folder=tmp_path, robot=robot, instructions=["go"])
    Image.fromarray(scene).save(tmp_path / "table.png")
    with pytest.raises(ValueError, match=r"table.png shows none of the views .* table.front.png, table.wrist.png"):
        listed()
    (tmp_path / "table.png").rename(tmp_path / "table.front.png")
    with pytest.raises(ValueError, match=r"no picture of the view wrist for the first frame 'table' .*table.front.png"):
        listed()
    Image.fromarray(scene[:, ::-1]).save(tmp_path / "table.wrist.png")
    (tmp_path / "table.txt").write_text("open the drawer")
    (made,) = listed()
    assert made.pair == "table" and made.instruction == "open the drawer" and made.image.shape == (32, 64, 3)
    assert np.array_equal(made.image[:, :32], fit(scene, 32, 32, "crop"))
    assert np.array_equal(made.image[:, 32:], fit(scene[:, ::-1], 32, 32, "crop"))
    Image.fromarray(scene).save(tmp_path / "table.side.png")
    with pytest.raises(ValueError, match="table.side.png shows none of the views"):
        listed()
