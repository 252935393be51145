"""Video files read by number through PyAV: what their index tells, and frames of one that stays open."""

import contextlib
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dreamgen.video.whole import require_whole

DENSE = 4  # frames that are decoded and dropped rather than looked for
HIDDEN = 2  # flag of a frame that an edit list hides (AVINDEX_DISCARD_FRAME)


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


def require_rows(rows: np.ndarray, count: int, path: Path) -> None:
    if rows.min() < 0 or rows.max() >= count:
        raise ValueError(f"video {path} has {count} frames; frame {rows.min() if rows.min() < 0 else rows.max()} was "
                         f"asked for")  # fmt: skip


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
        stream = container.streams.video[0]
        keys = [k for k, entry in enumerate(stream.index_entries) if entry.is_keyframe]
        listed = len(stream.index_entries) == stream.frames  # an index of key frames alone does not number them
    return np.array(keys if keys and listed else [0], dtype=np.int64)


class OpenVideo:
    """An even file (`is_even`) that stays open: frames by number through PyAV, by one thread, where decord decodes and
    converts all between two key frames. Where frames go on behind the last ones, it goes on too and does not seek.

    Raises ValueError naming the file if it is missing or undecodable.
    """

    def __init__(self, path: Path) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        require_whole(path)
        self._path, self._convert = Path(path), VideoReformatter()
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (IndexError, av.FFmpegError) as error:
            raise ValueError(f"video {path} cannot be decoded: {error}") from error
        self._stream.codec_context.thread_count = 1
        self._start, self._period = self._stream.start_time or 0, _period(self._stream)
        self._frames, self._at = self._container.decode(self._stream), -1.0

    def read(self, rows: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "t h w 3"]:
        """Frames `rows`, in any order, the same as `read_frames` gives. ValueError for a row that there is not, or that
        cannot be decoded; names the file."""
        import av

        rows = np.asarray(rows, dtype=np.int64)
        unique, back = np.unique(rows if rows.size else [0], return_inverse=True)
        require_rows(unique, self._stream.frames or unique[-1] + 1, self._path)
        try:
            return self._decode(unique.tolist())[back[: rows.size]]
        except (ValueError, OSError, av.FFmpegError) as error:
            self._at = math.inf  # wherever it stands now, the next rows are looked for
            raise ValueError(f"video {self._path} cannot be decoded: {error}") from error

    def _decode(self, rows: list[int]) -> np.ndarray:
        wanted, found = set(rows), dict[int, np.ndarray]()
        for row in rows:
            if not self._at < row <= self._at + DENSE:
                self._container.seek(self._start + round(row * self._period), stream=self._stream)
                self._frames = self._container.decode(self._stream)
            while row not in found:
                frame = next(self._frames, None)
                if frame is None:
                    raise ValueError(f"it ends before frame {row}")
                self._at = round(((frame.pts or 0) - self._start) / self._period)
                if self._at in wanted:
                    # decord turns what is to be shown turned, PyAV does not
                    shown = self._convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
                    found[self._at] = np.rot90(shown, _turns(frame, self._path))
        return np.stack([found[row] for row in rows])


def _period(stream: Any) -> Fraction:
    """Ticks of an av stream from one frame to the next, by its index where that lists them all."""
    index, count = stream.index_entries, stream.frames
    if count > 1 and len(index) == count:
        return Fraction(index[count - 1].timestamp - index[0].timestamp, count - 1)
    return 1 / (Fraction(stream.average_rate or 1) * Fraction(stream.time_base or 1))
