"""Videos as mp4 files: the same frames give the same bytes, frame k is read back as frame k.

Why 4:4:4: with the usual 4:2:0 a colour covers 2x2 pixels. On 64-pixel frames with 6-pixel coloured blocks the blocks
come back at 20 dB whatever the quality setting, with 4:4:4 at 40 dB (crf 10, whole frame 32 and 43 dB), in as many
bytes. decord, ffmpeg and torchcodec read 4:4:4; many browsers do not: for a page write `enlarge`d frames with
`pix_fmt="yuv420p"`, which keeps one colour per original pixel.
"""

import contextlib
import io
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from jaxtyping import UInt8

from dreamgen.core.manifest import replacing

if TYPE_CHECKING:
    import decord

# encoder, default quality, default pixel format, and options: no B-frames, so that stored order is shown order;
# "veryfast" takes 28 ms for 36 frames of 64 pixels where the default takes 71, in as many bytes at 1 dB less; no
# macroblock tree: x264's AVX-512 code for it gives small frames now and then other bytes (1 of 60), for 9% in bytes
ENCODERS = {
    "h264": ("libx264", 10, "yuv444p", {"bf": "0", "preset": "veryfast", "mbtree": "0"}),
    "av1": ("libsvtav1", 20, "yuv420p", {"svtav1-params": "lp=1"}),
}
DENSE = 4
HIDDEN = 2  # flag of a frame that an edit list hides (AVINDEX_DISCARD_FRAME)
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # what a Matroska file and its body begin with
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


def require_whole(path: Path) -> None:
    """Raise ValueError if `path` is missing or is no whole mp4, mov, mkv or webm file. Decodes nothing."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"video {path} is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        matroska = file.read(4) == EBML
        if not (_segment_is_whole if matroska else _boxes_are_whole)(file, size):
            raise ValueError(f"video {path} ({size} bytes) is truncated or no {path.suffix[1:] or 'video'} file")


def _boxes_are_whole(file: BinaryIO, size: int) -> bool:
    """Whether the boxes of an mp4 or mov file fill it exactly."""
    at, kinds = 0, set()
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        length = int.from_bytes(head[8:16], "big") if length == 1 else length if length else size - at
        if length < 8:
            break
        kinds.add(head[4:8])
        at += length
    return at == size and {b"moov", b"mdat"} <= kinds  # a mov of before 2005 has no ftyp


def _segment_is_whole(file: BinaryIO, size: int) -> bool:
    """Whether a Matroska file (mkv, webm) is as long as its segment says; one that was streamed does not say."""
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(12)
        name = 9 - head[0].bit_length()  # leading zeros tell how many bytes a number has
        if name > 4 or len(head) <= name:
            break
        count = 9 - head[name].bit_length()
        unknown = 2 ** (7 * count) - 1  # the largest number, which means that nobody says
        length = int.from_bytes(head[name : name + count], "big") & unknown
        at += name + count + length
        if head[:name] == SEGMENT:
            return length == unknown or at <= size
    return False


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


def require_turned(path: Path) -> None:
    """ValueError for a video that players mirror or turn by less than a quarter; quarters, by which phones write their
    videos sideways, are applied by whatever reads here. One that cannot be decoded is left to its reader."""
    import av

    with contextlib.suppress(IndexError, StopIteration, av.FFmpegError), av.open(str(path)) as container:
        _turns(next(container.decode(video=0)), path)


def _turns(frame: Any, path: Path) -> int:
    """Quarter turns against the clock by which an av frame is shown, as its display matrix says."""
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return 0
    a, b, _, c, d = np.frombuffer(matrix, "<i4")[:5].tolist()
    if frame.rotation % 90 or a * d <= b * c:
        raise ValueError(f"video {path} is to be shown mirrored, or turned by {frame.rotation} degrees; write it anew "
                         f"as it is to be seen (ffmpeg -i {path.name} upright.mp4)")  # fmt: skip
    return frame.rotation // 90 % 4


def read_frames(reader: "decord.VideoReader", rows: Sequence[int] | np.ndarray, path: Path) -> np.ndarray:
    """Frames `rows` (t h w 3) uint8 of an open reader, in any order; `path` is for the error."""
    import decord

    rows = np.asarray(rows, dtype=np.int64)
    if rows.size == 0:
        return np.zeros((0, *reader[0].shape[:2], 3), np.uint8)
    if rows.min() < 0 or rows.max() >= len(reader):
        raise ValueError(f"video {path} has {len(reader)} frames; frame {rows.min() if rows.min() < 0 else rows.max()} "
                         f"was asked for")  # fmt: skip
    unique, back = np.unique(rows, return_inverse=True)
    if unique[-1] - unique[0] < DENSE * len(unique):
        # in one run without gaps: each gap costs decord a seek
        unique, back = np.arange(unique[0], unique[-1] + 1), rows - unique[0]
    try:
        return reader.get_batch(unique.tolist()).asnumpy()[back]
    except (RuntimeError, decord.DECORDError) as error:
        if "size must exactly match" in str(error):
            return _decode(path, unique)[back]
        raise ValueError(f"video {path} cannot be decoded: {str(error).strip().splitlines()[-1]}") from error


def is_even(path: Path) -> bool:
    """Whether frame k of an mp4 file is shown k periods after its first one, by its index; False where that is unknown.
    Nothing is decoded."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            listed, period = [(entry.timestamp, entry.flags) for entry in stream.index_entries], float(_period(stream))
            count = stream.frames
    except (IndexError, OSError, av.FFmpegError):
        return False
    if not count or len(listed) != count or any(flags & HIDDEN for _, flags in listed):
        return False
    times = np.array([time for time, _ in listed], dtype=np.float64)
    return bool(np.abs(times - times[0] - np.arange(count) * period).max() <= 1)


def key_frames(path: Path) -> np.ndarray:
    """Numbers (n,) of the frames of a file from which its decoding can begin, ascending, by its index; the first alone
    where that is unknown. Nothing is decoded."""
    import av

    with av.open(str(path)) as container:
        keys = [k for k, entry in enumerate(container.streams.video[0].index_entries) if entry.is_keyframe]
    return np.array(keys or [0], dtype=np.int64)


def read_once(path: Path, rows: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "t h w 3"]:
    """Frames `rows` of an even file (`is_even`), in any order. Only what they need is read, where `open_mp4` reads the
    file whole; the frames are the same. ValueError names the file if it is missing or undecodable, or lacks a row."""
    import av

    rows = np.asarray(rows, dtype=np.int64)
    unique, back = np.unique(rows if rows.size else [0], return_inverse=True)
    try:
        return _decode(path, unique)[back[: rows.size]]
    except (IndexError, OSError, av.FFmpegError) as error:
        raise ValueError(f"video {path} cannot be decoded: {error}") from error


def _decode(path: Path, rows: np.ndarray) -> np.ndarray:
    """Frames `rows` (ascending) by PyAV; also for widths (16, 24, 32, 48, 96, 144) at which decord takes the padding of
    a line for a fourth channel (dmlc/decord issues 93 and 336)."""
    import av
    from av.video.reformatter import VideoReformatter

    wanted, found, convert = set(rows.tolist()), dict[int, np.ndarray](), VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        start, period = stream.start_time or 0, _period(stream)
        at, frames = -1, container.decode(stream)
        for row in rows.tolist():
            if row > at + DENSE:
                container.seek(start + round(row * period), stream=stream)
                frames = container.decode(stream)  # one generator a run: a second one would flush the decoder again
            while row not in found:
                frame = next(frames, None)
                if frame is None:
                    raise ValueError(f"video {path} cannot be decoded: it ends before frame {row}")
                at = round(((frame.pts or 0) - start) / period)
                if at in wanted:
                    # decord turns what is to be shown turned, PyAV does not
                    shown = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
                    found[at] = np.rot90(shown, _turns(frame, path))
    return np.stack([found[row] for row in rows.tolist()])


def _period(stream: Any) -> Fraction:
    """Ticks of an av stream from one frame to the next, by its index where that lists them all."""
    index, count = stream.index_entries, stream.frames
    if count > 1 and len(index) == count:
        return Fraction(index[count - 1].timestamp - index[0].timestamp, count - 1)
    return 1 / (Fraction(stream.average_rate or 1) * Fraction(stream.time_base or 1))


def read_mp4(path: Path, rows: Sequence[int] | np.ndarray | None = None) -> UInt8[np.ndarray, "t h w 3"]:
    """Frames `rows` of an mp4 file, all of them by default.

    Raises ValueError naming the file: missing, truncated, undecodable, row out of range.
    """
    reader = open_mp4(path)
    return read_frames(reader, np.arange(len(reader)) if rows is None else rows, path)
