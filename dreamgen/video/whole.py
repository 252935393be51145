"""Whether a video file is there to its last byte, by the lengths that it tells of its own parts; nothing is decoded."""

from pathlib import Path
from typing import BinaryIO

EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # what a Matroska file and its body begin with


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
