from fractions import Fraction

import numpy as np
import pytest
import torch

from dreamgen.video.metrics import psnr, ssim
from dreamgen.video.mp4 import count_frames, encode, enlarge, read_mp4, write_mp4
from dreamgen.video.opened import OpenVideo, is_even
from dreamgen.video.remux import Joined

T, H, W = 13, 40, 56


def moving_blocks(t: int = T, h: int = H, w: int = W) -> tuple[np.ndarray, np.ndarray]:
    """A grey ramp with coloured 6-pixel squares, and where they are."""
    ramp = np.linspace(80, 150, h)[:, None, None] + np.linspace(0, 20, w)[None, :, None]
    frames = np.repeat(np.broadcast_to(ramp, (h, w, 3))[None], t, 0).astype(np.uint8)
    mask = np.zeros(frames.shape[:3], bool)
    for k, colour in enumerate([(220, 30, 30), (30, 60, 220), (40, 190, 50)]):
        for i in range(t):
            y, x = 3 + 11 * k, 5 + 9 * k + i
            frames[i, y : y + 6, x : x + 6], mask[i, y : y + 6, x : x + 6] = colour, True
    return frames, mask


def mean_square(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a.astype(float) - b.astype(float)) ** 2).mean())


def test_round_trip_keeps_small_coloured_blocks(tmp_path):
    frames, mask = moving_blocks()
    write_mp4(tmp_path / "a.mp4", frames, 10)
    back = read_mp4(tmp_path / "a.mp4")
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert 10 * np.log10(255**2 / mean_square(back, frames)) > 40
    assert 10 * np.log10(255**2 / mean_square(back[mask], frames[mask])) > 34
    assert count_frames(tmp_path / "a.mp4") == T


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_same_frames_same_bytes(codec):
    frames, _ = moving_blocks(5, 64, 70)
    data = encode(frames, "50/3", codec=codec)
    assert data == encode(frames.copy(), "50/3", codec=codec)
    assert codec != "h264" or b"mbtree=0" in data  # x264 writes its settings; with the tree one in 60 runs differs


@pytest.mark.parametrize("width", [64, 96])  # decord alone cannot read 96
@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_frames_by_index(tmp_path, codec, width):
    level = np.arange(23, dtype=np.uint8) * 10
    frames = np.broadcast_to(level[:, None, None, None], (23, 64, width, 3)).copy()
    write_mp4(tmp_path / "a.mp4", frames, 20, codec=codec, gop=7)
    rows = [22, 3, 3, 0, 15]
    back = read_mp4(tmp_path / "a.mp4", rows)
    assert np.abs(back.mean(axis=(1, 2, 3)) - level[rows]).max() < 4
    assert read_mp4(tmp_path / "a.mp4", []).shape == (0, 64, width, 3)


def test_enlarged_420_keeps_colours(tmp_path):
    frames, mask = moving_blocks()
    for name, shown in (("a", frames), ("b", enlarge(frames))):
        write_mp4(tmp_path / f"{name}.mp4", shown, 10, pix_fmt="yuv420p")
    plain, large = read_mp4(tmp_path / "a.mp4"), read_mp4(tmp_path / "b.mp4")[:, ::2, ::2]
    assert mean_square(large[mask], frames[mask]) < mean_square(plain[mask], frames[mask]) / 4


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_joined_pieces_are_the_pieces(tmp_path, codec):
    pieces = [moving_blocks(t, 64, 80)[0] // k for t, k in ((5, 1), (12, 2), (3, 3))]
    data = [encode(piece, 10, codec=codec) for piece in pieces]
    with Joined(tmp_path / "all.mp4") as joined:
        spans = [joined.add(piece) for piece in data]
    assert spans == [(0, 5), (5, 17), (17, 20)]
    alone = []
    for piece in data:
        (tmp_path / "one.mp4").write_bytes(piece)
        alone.append(read_mp4(tmp_path / "one.mp4"))
    assert np.array_equal(read_mp4(tmp_path / "all.mp4"), np.concatenate(alone))
    assert np.array_equal(read_mp4(tmp_path / "all.mp4", [18, 6]), np.stack([alone[2][1], alone[1][1]]))
    with pytest.raises(ValueError, match="another size"), Joined(tmp_path / "bad.mp4") as joined:
        joined.add(data[0])
        joined.add(encode(moving_blocks(2, 40, 56)[0], 10, codec=codec))


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(ValueError, match="a.mp4 is missing"):
        read_mp4(path)
    frames, _ = moving_blocks(9)
    write_mp4(path, frames, 10)
    with pytest.raises(ValueError, match=r"a\.mp4 has 9 frames; frame 9"):
        read_mp4(path, [0, 9])
    with pytest.raises(ValueError, match=r"frame -1"):
        read_mp4(path, [-1])
    whole = path.read_bytes()
    for cut in (0, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="a.mp4.*truncated"):
            read_mp4(path)
    path.write_bytes(b"this is text, and a good deal of it, but no video at all")
    with pytest.raises(ValueError, match="a.mp4"):
        count_frames(path)
    start = whole.index(b"mdat") + 4
    middle = (start + whole.index(b"moov")) // 2
    path.write_bytes(whole[:start] + b"\0" * (middle - start) + whole[middle:])
    with pytest.raises(ValueError, match="a.mp4 cannot be decoded"):
        read_mp4(path)


@pytest.mark.usefixtures("untyped")
def test_bad_frames():
    frames, _ = moving_blocks(2)
    for bad in (frames[:0], frames.astype(float), frames[0], frames[..., :2]):
        with pytest.raises(ValueError, match="expected uint8"):
            encode(bad, 10)
    with pytest.raises(ValueError, match="even"):
        encode(frames[:, :-1], 10, pix_fmt="yuv420p")
    with pytest.raises(ValueError, match="codec"):
        encode(frames, 10, codec="theora")


def test_write_leaves_nothing_half_written(tmp_path):
    with pytest.raises(ValueError):
        write_mp4(tmp_path / "a.mp4", np.zeros((0, 8, 8, 3), np.uint8), 10)
    write_mp4(tmp_path / "b.mp4", np.zeros((1, 8, 8, 3), np.uint8), 10)
    assert [path.name for path in tmp_path.iterdir()] == ["b.mp4"]


@pytest.mark.usefixtures("untyped")
def test_metrics():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 200, (3, 20, 24, 3), dtype=np.uint8)
    assert psnr(a, a) == pytest.approx(100) and ssim(a, a) == pytest.approx(1, abs=1e-5)
    assert psnr(a, a + np.uint8(5)) == pytest.approx(20 * np.log10(255 / 5))
    noisy = np.clip(a.astype(int) + rng.integers(-60, 61, a.shape), 0, 255).astype(np.uint8)
    assert ssim(a, noisy) < 0.95
    flat = np.full((2, 20, 24, 3), 220, np.uint8)
    flat[:, 8:12, 9:14] = 30
    with torch.autocast("cpu", torch.bfloat16):  # as in a validation while training
        mixed = ssim(flat, np.roll(flat, 1, 1))
    assert mixed == ssim(flat, np.roll(flat, 1, 1)) and 0.5 < mixed < 1
    with pytest.raises(ValueError, match="one size"):
        psnr(a, a[:, :, :-1])


@pytest.mark.parametrize("shape", [(64, 96), (40, 56), (16, 24)])
@pytest.mark.parametrize("kind", ["h264", "B-frames", "av1"])
def test_frames_by_index_and_by_decord_are_the_same(tmp_path, shape, kind):
    import av

    rng, path = np.random.default_rng(3), tmp_path / "a.mp4"
    frames = np.cumsum(rng.integers(0, 9, (27, *shape, 3)), 0).astype(np.uint8)
    if kind == "B-frames":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(50, 3), options={"bf": "3", "g": "7"})
            stream.width, stream.height, stream.pix_fmt = shape[1], shape[0], "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    else:
        write_mp4(path, frames, Fraction(50, 3), codec=kind)
    assert is_even(path)
    whole = read_mp4(path)
    kept = OpenVideo(path)
    asked = ([0], [26], [9, 3, 3], [25, 26], [0, 8, 16, 24], [20, 6], [7, 8], [9], [10, 12], list(range(27)), [])
    for rows in (*asked, *([k] for k in range(27)), *([k] for k in reversed(range(27)))):
        assert np.array_equal(kept.read(rows), whole[np.array(rows, int)]), rows
        assert np.array_equal(OpenVideo(path).read(rows), whole[np.array(rows, int)]), rows
    for row in (27, -1):
        with pytest.raises(ValueError, match=f"a.mp4 has 27 frames; frame {row} was asked for"):
            kept.read([3, row])
    path.write_bytes(b"no video")
    with pytest.raises(ValueError, match="a.mp4 .*no mp4 file"):
        OpenVideo(path)
    assert not is_even(path)


def test_a_video_that_stands_still_for_a_while_is_not_even(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for k in range(9):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * k, np.uint8), format="rgb24")
            frame.pts, frame.time_base = k + 5 * (k > 4), Fraction(1, 20)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert not is_even(tmp_path / "a.mp4")


def test_a_spoilt_part_of_a_file_does_not_spoil_the_rest(tmp_path):
    frames, _ = moving_blocks(30)
    write_mp4(tmp_path / "a.mp4", frames, 10, gop=5)
    whole, data = read_mp4(tmp_path / "a.mp4"), bytearray((tmp_path / "a.mp4").read_bytes())
    import av

    with av.open(str(tmp_path / "a.mp4")) as container:
        entry = container.streams.video[0].index_entries[10]
        data[entry.pos : entry.pos + entry.size] = bytes(entry.size)
    (tmp_path / "a.mp4").write_bytes(data)
    kept = OpenVideo(tmp_path / "a.mp4")
    for _ in range(2):
        assert np.array_equal(kept.read([7, 9]), whole[[7, 9]])
        with pytest.raises(ValueError, match="a.mp4 cannot be decoded"):
            kept.read([9, 10, 14])
        assert np.array_equal(kept.read([15, 16]), whole[[15, 16]])  # the next episode of the file
        assert np.array_equal(kept.read([18, 29]), whole[[18, 29]])
