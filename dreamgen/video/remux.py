"""Stream copy: mp4 files joined and cut without a second encoding.

Packet k of a piece whose frames begin at `base` is decoded at `base + k - delay` and shown at `base + rank`, where rank
is its place in time and delay the depth by which the file's first piece reorders (0 without B-frames). So pieces that
reorder no deeper than that one join as well as those without B-frames, and no picture changes.
"""

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from dreamgen.video.whole import require_whole


def frame_rate(stream: Any) -> Fraction:
    """Frames a second of an av stream that has a constant rate."""
    return Fraction(stream.average_rate or 1)


def _timing(packets: list) -> tuple[np.ndarray, int]:
    """Rank in time of each packet, and the depth by which they are reordered."""
    rank = np.argsort(np.argsort([packet.pts for packet in packets], kind="stable"), kind="stable")
    return rank, int((np.arange(len(packets)) - rank).max(initial=0))


def _packets(piece: Any) -> list:
    """The packets of an open piece."""
    return [packet for packet in piece.demux(video=0) if packet.size]


class Joined:
    """One mp4 file put together from encoded pieces by stream copy: no second encoding. Use as a context manager.

    rate: frames a second of the file; default: that of its first piece.
    """

    def __init__(self, path: Path, rate: Fraction | None = None) -> None:
        self.path, self.rate, self.frames, self.bytes = Path(path), rate, 0, 0
        self._container: Any = None
        self._stream: Any = None
        self._head: tuple | None = None
        self._delay = 0

    def fits(self, data: bytes) -> bool:
        """Whether a piece has the size and the encoder's options of those before it, and reorders no deeper than the
        first one."""
        import av

        with av.open(io.BytesIO(data), "r") as piece:
            return self._head is None or (self._head == self._header(piece.streams.video[0])
                                          and _timing(_packets(piece))[1] <= self._delay)  # fmt: skip

    def _header(self, stream: Any) -> tuple:
        return stream.codec_context.name, stream.codec_context.extradata, self.rate or frame_rate(stream)

    def add(self, data: bytes) -> tuple[int, int]:
        """Append one encoded piece; returns its first frame and one past its last in this file.

        Raises ValueError for a piece that does not fit.
        """
        import av

        first = self.frames
        with av.open(io.BytesIO(data), "r") as piece:
            stream = piece.streams.video[0]
            if self._container is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._container = av.open(str(self.path), "w", format="mp4")
                self._stream = self._container.add_stream_from_template(stream, opaque=True)
                self._head = self._header(stream)
                if self.rate is not None:
                    self._stream.time_base = 1 / self.rate
            if self._head != self._header(stream):
                raise ValueError(f"a piece for {self.path} was encoded with another size, rate or option")
            packets = _packets(piece)
            ranks, delay = _timing(packets)
            if first == 0:
                self._delay = delay
            if delay > self._delay:
                raise ValueError(f"a piece for {self.path} reorders its frames deeper ({delay}) than the first one "
                                 f"({self._delay}); begin a file with it")  # fmt: skip
            for k, (packet, rank) in enumerate(zip(packets, ranks.tolist(), strict=True)):
                packet.stream, packet.time_base = self._stream, 1 / self._head[2]
                packet.pts, packet.dts = first + rank, first + k - self._delay
                packet.duration = 1
                self._container.mux(packet)
            self.frames += len(packets)
        self.bytes += len(data)
        return first, self.frames

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def __enter__(self) -> "Joined":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def cut(path: Path, first: int, frames: int) -> bytes | None:
    """Frames [first, first + frames) of an mp4 file as an mp4 file of their own, by stream copy.

    None where that cannot be done without encoding: the part does not begin with a key frame, or frames beyond its
    end are needed or lie between. Raises ValueError for a missing or truncated file.
    """
    import av

    require_whole(path)
    buffer = io.BytesIO()
    with av.open(str(path)) as source:
        stream = source.streams.video[0]
        start, ticks = stream.start_time or 0, 1 / (frame_rate(stream) * Fraction(stream.time_base or 1))
        source.seek(int(start + first * ticks), stream=stream)
        packets, inside = [], []
        for packet in source.demux(stream):
            if not packet.size or packet.pts is None or len(packets) - sum(inside) > 64 and sum(inside):
                break
            at = round((packet.pts - start) / ticks)
            if at < first and not sum(inside):
                continue
            packets.append(packet)
            inside.append(first <= at < first + frames)
            if sum(inside) == frames:
                break
        if len(packets) != frames or not all(inside) or not packets[0].is_keyframe:
            return None
        ranks, delay = _timing(packets)
        if packets[0].pts != min(packet.pts for packet in packets):
            return None
        with av.open(buffer, "w", format="mp4") as target:
            copy: Any = target.add_stream_from_template(stream, opaque=True)
            for k, (packet, rank) in enumerate(zip(packets, ranks.tolist(), strict=True)):
                packet.stream, packet.time_base = copy, 1 / frame_rate(stream)
                packet.pts, packet.dts, packet.duration = rank, k - delay, 1
                target.mux(packet)
    return buffer.getvalue()


def decoded(data: bytes) -> Iterator[np.ndarray]:
    """The frames (h w 3) uint8 of an mp4 file in memory, one by one."""
    import av
    from av.video.reformatter import VideoReformatter

    convert = VideoReformatter()
    with av.open(io.BytesIO(data)) as container:
        for frame in container.decode(video=0):
            yield convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
