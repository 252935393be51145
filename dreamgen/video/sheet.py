"""Clips as one picture: frames of a clip in a grid, and several clips below each other with captions."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from dreamgen.video.tiling import resize

EDGE, LINE = 2, 14  # pixels between frames, height of a caption
WHITE, INK = 255, (20, 20, 20)


def evenly(frames: int, count: int) -> np.ndarray:
    """`count` frame numbers spread evenly over a clip, first and last among them; all where there are fewer."""
    return np.unique(np.linspace(0, frames - 1, min(count, frames)).round().astype(np.int64))


def grid(video: UInt8[np.ndarray, "t h w 3"], *, count: int = 8, columns: int = 4,
         height: int = 128) -> UInt8[np.ndarray, "H W 3"]:  # fmt: skip
    """`count` frames of a clip row by row, each `height` pixels high, white between them."""
    chosen = video[evenly(len(video), count)]
    h, w = chosen.shape[1:3]
    chosen = resize(chosen, height, round(w * height / h))
    columns = min(columns, len(chosen))
    rows = -(-len(chosen) // columns)
    blank = np.full((rows * columns - len(chosen), *chosen.shape[1:]), WHITE, np.uint8)
    cells = np.pad(np.concatenate([chosen, blank]), ((0, 0), (0, EDGE), (0, EDGE), (0, 0)), constant_values=WHITE)
    lines = [np.concatenate(list(cells[r * columns : (r + 1) * columns]), axis=1) for r in range(rows)]
    return np.concatenate(lines)[:-EDGE, :-EDGE]


def captioned(rows: Sequence[tuple[str, UInt8[np.ndarray, "_ _ 3"]]]) -> UInt8[np.ndarray, "H W 3"]:
    """Pictures below each other, each under its caption."""
    from PIL import Image, ImageDraw

    width = max(picture.shape[1] for _, picture in rows)
    height = sum(LINE + picture.shape[0] + 2 * EDGE for _, picture in rows)
    sheet = Image.new("RGB", (width, height), (WHITE,) * 3)
    draw, at = ImageDraw.Draw(sheet), 0
    for text, picture in rows:
        draw.text((2, at + 1), text, fill=INK)
        sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), (0, at + LINE))
        at += LINE + picture.shape[0] + 2 * EDGE
    return np.asarray(sheet)


def png(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A PNG file's bytes."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
