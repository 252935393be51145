"""All views of a robot on one canvas, and back: world models see one picture."""

import numpy as np
from jaxtyping import UInt8

from dreamgen.core.embodiment import FITS, Embodiment


def tile(robot: Embodiment, views: dict[str, np.ndarray]) -> np.ndarray:
    """Views {name: (... h w 3)} laid out on the robot's grid, (... H W 3); empty cells are black.

    Raises ValueError if a view is missing or is not of the embodiment's size.
    """
    for view in robot.views:
        if view.name not in views:
            raise ValueError(f"view '{view.name}' of '{robot.name}' is missing; got {sorted(views)}")
        if views[view.name].shape[-3:] != (view.height, view.width, 3):
            raise ValueError(f"view '{view.name}' is {views[view.name].shape[-3:]}; embodiment '{robot.name}' expects "
                             f"({view.height}, {view.width}, 3)")  # fmt: skip
    some = views[robot.views[0].name]
    black = np.zeros_like(some)
    rows = [np.concatenate([views[n] if n else black for n in row], axis=-2) for row in robot.grid]
    return np.concatenate(rows, axis=-3)


def untile(robot: Embodiment, canvas: np.ndarray) -> dict[str, np.ndarray]:
    """The inverse of `tile`: (... H W 3) to {view: (... h w 3)}; copies nothing.

    Raises ValueError if the canvas is not of the embodiment's size.
    """
    if canvas.shape[-3:] != (*robot.canvas, 3):
        raise ValueError(f"canvas is {tuple(canvas.shape[-3:])}; embodiment '{robot.name}' expects "
                         f"{(*robot.canvas, 3)}")  # fmt: skip
    h, w = robot.views[0].height, robot.views[0].width
    cells = {n: (i, j) for i, row in enumerate(robot.grid) for j, n in enumerate(row) if n}
    return {
        view.name: canvas[..., i * h : (i + 1) * h, j * w : (j + 1) * w, :]
        for view in robot.views
        for i, j in [cells[view.name]]
    }


def describe(robot: Embodiment) -> str:
    """Where the views lie on the canvas, in words for a video model's prompt; "" for a single view.

    For instance "The video shows 2 views of one robot: left is the view 'front', right is the view 'wrist'."
    """
    rows, columns = len(robot.grid), len(robot.grid[0])
    if len(robot.views) == 1:
        return ""
    high = _places(rows, "top", "middle", "bottom")
    wide = _places(columns, "left", "centre", "right")
    words = []
    for i, row in enumerate(robot.grid):
        for j, name in enumerate(row):
            place = " ".join(word for word in (high[i], wide[j]) if word)
            words.append(f"{place} is " + (f"the view '{name}'" if name else "black"))
    return f"The video shows {len(robot.views)} views of one robot: {', '.join(words)}."


def _places(count: int, first: str, middle: str, last: str) -> list[str]:
    """Names of rows or columns; none where there is one, numbers where more than one lies between."""
    if count == 1:
        return [""]
    between = [middle] if count == 3 else [f"{middle} {k}" for k in range(1, count - 1)]
    return [first, *between, last]


def resize(frames: UInt8[np.ndarray, "*b h w 3"], height: int, width: int) -> UInt8[np.ndarray, "*b H W 3"]:
    """Frames at another size: bilinear, and averaged over what a smaller pixel covers."""
    import torch
    from torch.nn.functional import interpolate

    if frames.shape[-3:-1] == (height, width):
        return frames
    flat = frames.reshape(-1, *frames.shape[-3:])
    out = np.empty((len(flat), height, width, 3), np.uint8)
    for i, frame in enumerate(flat):
        x = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
        y = interpolate(x, (height, width), mode="bilinear", antialias=True, align_corners=False)
        out[i] = y[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
    return out.reshape(*frames.shape[:-3], height, width, 3)


def fit(frames: UInt8[np.ndarray, "*b h w 3"], height: int, width: int, how: str) -> UInt8[np.ndarray, "*b H W 3"]:
    """Pictures of any shape at the size of a view, as its `fit` says: `squeeze` resizes each side by itself, `crop`
    takes the largest middle part of that shape, `pad` shows all of it between black bars.

    Raises ValueError for another `how`.
    """
    if how not in FITS:
        raise ValueError(f"pictures are to be fitted by '{how}'; expected one of {', '.join(FITS)}")
    h, w = frames.shape[-3:-1]
    if how == "crop":
        scale = min(h / height, w / width)
        ch, cw = round(height * scale), round(width * scale)
        top, left = (h - ch) // 2, (w - cw) // 2
        frames = frames[..., top : top + ch, left : left + cw, :]
    if how != "pad":
        return resize(frames, height, width)
    scale = min(height / h, width / w)
    ph, pw = max(1, round(h * scale)), max(1, round(w * scale))
    top, left = (height - ph) // 2, (width - pw) // 2
    out = np.zeros((*frames.shape[:-3], height, width, 3), np.uint8)
    out[..., top : top + ph, left : left + pw, :] = resize(frames, ph, pw)
    return out
