"""Videos as mp4 files: the same frames give the same bytes, frame k is read back as frame k.

Why 4:4:4: with the usual 4:2:0 a colour covers 2x2 pixels. On 64-pixel frames with 6-pixel coloured blocks the blocks
come back at 20 dB whatever the quality setting, with 4:4:4 at 40 dB (crf 10, whole frame 32 and 43 dB), in as many
bytes. decord, ffmpeg and torchcodec read 4:4:4; many browsers do not: for a page write `enlarge`d frames with
`pix_fmt="yuv420p"`, which keeps one colour per original pixel.
"""

import io
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from jaxtyping import UInt8

from dreamgen.core.manifest import replacing
from dreamgen.video.opened import DENSE, OpenVideo, require_rows
from dreamgen.video.whole import require_whole

if TYPE_CHECKING:
    import decord

# encoder, default quality, default pixel format, and options: no B-frames, so that stored order is shown order;
# "veryfast" takes 28 ms for 36 frames of 64 pixels where the default takes 71, in as many bytes at 1 dB less; no
# macroblock tree: x264's AVX-512 code for it gives small frames now and then other bytes (1 of 60), for 9% in bytes
ENCODERS = {
    "h264": ("libx264", 10, "yuv444p", {"bf": "0", "preset": "veryfast", "mbtree": "0"}),
    "av1": ("libsvtav1", 20, "yuv420p", {"svtav1-params": "lp=1"}),
}
BT601, LIMITED = 6, 1  # what the colour conversion below computes; said in the file so that no player guesses


def encode(
    frames: UInt8[np.ndarray, "t h w 3"],
    fps: str | int | float | Fraction,
    *,
    codec: str = "h264",
    crf: int | None = None,
    gop: int = 10,
    pix_fmt: str | None = None,
) -> bytes:
    """An mp4 file of RGB frames, near-lossless by default, encoded by one thread (deterministic).

    codec: "h264" or "av1"; crf: quality, lower is better (default 10 for h264, 20 for av1); gop: frames from one key
    frame to the next; pix_fmt: "yuv444p" (default for h264) or "yuv420p" (needs even sizes; all that av1 has).

    Raises ValueError for frames that are no (t h w 3) uint8 with t > 0, and for odd sizes where they do not fit.
    """
    import av
    from av.video.reformatter import VideoReformatter

    if codec not in ENCODERS:
        raise ValueError(f"codec is '{codec}'; expected one of {', '.join(ENCODERS)}")
    encoder, quality, pixels, options = ENCODERS[codec]
    pixels = pix_fmt or pixels
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 (t h w 3) with t, h, w > 0")
    height, width = frames.shape[1:3]
    if pixels == "yuv420p" and (height % 2 or width % 2):
        raise ValueError(f"frames are {height}x{width}; yuv420p needs even sizes")
    options = options | {"crf": str(quality if crf is None else crf)}
    os.environ.setdefault("SVT_LOG", "1")  # errors only: the AV1 encoder writes its settings to stderr otherwise
    buffer, convert = io.BytesIO(), VideoReformatter()  # one conversion table for all frames
    with av.open(buffer, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(100000)
        stream = cast(av.VideoStream, container.add_stream(encoder, rate=rate, options=options))
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        context = stream.codec_context
        context.thread_count, context.gop_size = 1, gop
        context.colorspace, context.color_range = BT601, LIMITED
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(convert.reformat(picture, format=pixels, dst_colorspace=BT601, threads=1)))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_mp4(
    path: Path,
    frames: UInt8[np.ndarray, "t h w 3"],
    fps: str | int | float | Fraction,
    *,
    codec: str = "h264",
    crf: int | None = None,
    gop: int = 10,
    pix_fmt: str | None = None,
) -> None:
    """Write RGB frames to an mp4 file that is whole or absent. Arguments: see `encode`."""
    data = encode(frames, fps, codec=codec, crf=crf, gop=gop, pix_fmt=pix_fmt)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(data)


def enlarge(frames: UInt8[np.ndarray, "t h w 3"], factor: int = 2) -> UInt8[np.ndarray, "t H W 3"]:
    """Each pixel as a block of `factor` x `factor`: small frames for browsers, see the module's first lines."""
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def count_frames(path: Path) -> int:
    """Frames of an mp4 file by its index, nothing is decoded. ValueError if it is missing, truncated or no video."""
    import av

    require_whole(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video")
            return container.streams.video[0].frames
    except av.FFmpegError as error:
        raise ValueError(f"video {path} cannot be opened: {error}") from error


def open_mp4(path: Path) -> "decord.VideoReader":
    """A decord reader with one thread, also of mov, mkv and webm. ValueError names the file if it is missing, truncated
    or undecodable."""
    import decord

    require_whole(path)
    try:
        return decord.VideoReader(str(path), num_threads=1)
    except (RuntimeError, decord.DECORDError) as error:
        raise ValueError(f"video {path} cannot be decoded: {str(error).strip().splitlines()[-1]}") from error


def frame_times(reader: "decord.VideoReader", path: Path) -> np.ndarray:
    """Seconds from the first frame of an open reader to each of its frames (n,) float64; `path` is for the error.

    Raises ValueError for a file that does not tell them: they must increase.
    """
    times = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
    if not (np.isfinite(times).all() and (np.diff(times) > 0).all()):
        raise ValueError(f"video {path} does not tell when each of its {len(times)} frames is shown, so its rate is "
                         f"unknown; write it anew with a rate (ffmpeg -r)")  # fmt: skip
    return times - times[:1]


def read_frames(reader: "decord.VideoReader", rows: Sequence[int] | np.ndarray, path: Path) -> np.ndarray:
    """Frames `rows` (t h w 3) uint8 of an open reader, in any order; `path` is for the error."""
    import decord

    rows = np.asarray(rows, dtype=np.int64)
    if rows.size == 0:
        return np.zeros((0, *reader[0].shape[:2], 3), np.uint8)
    require_rows(rows, len(reader), path)
    unique, back = np.unique(rows, return_inverse=True)
    if unique[-1] - unique[0] < DENSE * len(unique):
        # in one run without gaps: each gap costs decord a seek
        unique, back = np.arange(unique[0], unique[-1] + 1), rows - unique[0]
    try:
        return reader.get_batch(unique.tolist()).asnumpy()[back]
    except (RuntimeError, decord.DECORDError) as error:
        if "size must exactly match" in str(error):
            # of widths 16, 24, 32, 48, 96 and 144 decord takes the padding of a line for a fourth channel (dmlc/decord
            # issues 93 and 336)
            return OpenVideo(path).read(unique)[back]
        raise ValueError(f"video {path} cannot be decoded: {str(error).strip().splitlines()[-1]}") from error


def read_mp4(path: Path, rows: Sequence[int] | np.ndarray | None = None) -> UInt8[np.ndarray, "t h w 3"]:
    """Frames `rows` of an mp4 file, all of them by default.

    Raises ValueError naming the file: missing, truncated, undecodable, row out of range.
    """
    reader = open_mp4(path)
    return read_frames(reader, np.arange(len(reader)) if rows is None else rows, path)
