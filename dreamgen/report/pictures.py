"""Clips and frames as text that a page can hold: H.264 in 4:2:0, enlarged so that small pictures keep their colours."""

import base64
import io
from fractions import Fraction

import numpy as np
from jaxtyping import UInt8

from dreamgen.video.mp4 import encode, enlarge

WANTED = 192  # pixels of height that an embedded clip has at least


def even(frames: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t H W 3"]:
    """Frames enlarged by a whole factor to about `WANTED` pixels of height, with even sides."""
    factor = max(1, round(WANTED / frames.shape[1]))
    frames = enlarge(frames, factor) if factor > 1 else frames
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def beside(*clips: UInt8[np.ndarray, "_ h _ 3"]) -> UInt8[np.ndarray, "t h W 3"]:
    """Clips of one height side by side; shorter ones hold their last frame."""
    length = max(len(clip) for clip in clips)
    held = [np.concatenate([clip, np.repeat(clip[-1:], length - len(clip), axis=0)]) for clip in clips]
    return np.concatenate(held, axis=2)


def clip_uri(frames: UInt8[np.ndarray, "t h w 3"], fps: str | Fraction) -> str:
    """An mp4 as a data URI."""
    data = encode(even(frames), fps, crf=23, gop=50, pix_fmt="yuv420p")
    return "data:video/mp4;base64," + base64.b64encode(data).decode()


def frame_uri(frame: UInt8[np.ndarray, "h w 3"]) -> str:
    """A PNG as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
