import numpy as np
import pytest

from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.video.tiling import describe, fit, resize, tile, untile

H, W = 6, 10


def robot(names: tuple[str, ...], grid: tuple = ()) -> Embodiment:
    views = tuple(View(name=n, key=f"observation.images.{n}", height=H, width=W) for n in names)
    return Embodiment(name="r", robot_hz=20, views=views, action=(Part(name="a", start=0, stop=1),), grid=grid)


@pytest.mark.parametrize("grid", [(), (("a", "b"), ("c", None)), (("c",), ("a",), ("b",))])
def test_tile_and_untile_are_inverse(grid):
    r, rng = robot(("a", "b", "c"), grid), np.random.default_rng(0)
    views = {n: rng.integers(1, 256, (2, 5, H, W, 3), dtype=np.uint8) for n in ("c", "a", "b")}
    canvas = tile(r, views)
    assert canvas.shape == (2, 5, *r.canvas, 3)
    back = untile(r, canvas)
    assert list(back) == ["a", "b", "c"]
    assert all(np.array_equal(back[n], views[n]) for n in views)
    for i, row in enumerate(r.grid):
        for j, name in enumerate(row):
            cell = canvas[..., i * H : (i + 1) * H, j * W : (j + 1) * W, :]
            assert np.array_equal(cell, views[name]) if name else not cell.any()


def test_a_canvas_in_words():
    assert describe(robot(("a",))) == ""
    assert describe(robot(("a", "b", "c"), (("a", "b"), ("c", None)))) == (
        "The video shows 3 views of one robot: top left is the view 'a', top right is the view 'b', bottom left is the "
        "view 'c', bottom right is black.")  # fmt: skip
    assert "left is the view 'a', centre is the view 'b', right is" in describe(robot(("a", "b", "c")))


def test_errors():
    r = robot(("a", "b"))
    with pytest.raises(ValueError, match="'b'.*missing"):
        tile(r, {"a": np.zeros((H, W, 3), np.uint8)})
    with pytest.raises(ValueError, match="'a' is"):
        tile(r, {n: np.zeros((H, W + 1, 3), np.uint8) for n in "ab"})
    with pytest.raises(ValueError, match="canvas"):
        untile(r, np.zeros((H, W, 3), np.uint8))


def test_resize_averages_and_keeps_flat_pictures():
    flat = np.full((3, 24, 40, 3), 77, np.uint8)
    assert np.array_equal(resize(flat, 7, 11), np.full((3, 7, 11, 3), 77, np.uint8))
    assert resize(flat, 24, 40) is flat
    # one bright pixel of an 8x8 block keeps its light: nothing is skipped
    frame = np.zeros((1, 64, 64, 3), np.uint8)
    frame[0, 21, 35] = 255
    assert resize(frame, 8, 8).sum() == pytest.approx(255 * 3 / 64, rel=0.6)
    ramp = np.broadcast_to(np.arange(0, 240, 5, dtype=np.uint8)[None, :, None], (6, 48, 3))
    small = resize(ramp, 6, 12)
    assert np.all(np.diff(small[3, :, 0].astype(int)) > 0)


def test_a_wide_picture_in_a_square_view():
    """Columns 0 to 15 of a 12 x 16 picture tell where they are; each fit shows other ones, none turns or moves them."""
    wide = np.broadcast_to(10 * np.arange(16, dtype=np.uint8)[None, :, None], (12, 16, 3))
    squeezed, cropped, padded = (fit(wide, 6, 6, how) for how in ("squeeze", "crop", "pad"))
    assert np.array_equal(squeezed, resize(wide, 6, 6))
    assert np.array_equal(cropped, resize(wide[:, 2:14], 6, 6))
    assert np.array_equal(padded[1:5], resize(wide, 4, 6)) and not padded[[0, 5]].any()
    film = np.stack([wide, 255 - wide])
    for how in ("squeeze", "crop", "pad"):
        assert np.array_equal(fit(film, 5, 9, how)[1], fit(film[1], 5, 9, how))
        assert fit(film, 12, 16, how).tolist() == film.tolist()  # what is of the view's size stays as it is
    with pytest.raises(ValueError, match="fitted by 'stretch'; expected one of squeeze, crop, pad"):
        fit(wide, 6, 6, "stretch")
