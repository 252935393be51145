"""Frames of the two protocols: msgpack with arrays in it. Nothing is ever unpickled.

openpi  {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [2, 3]}, scalars {b"__npgeneric__": True,
        b"data": value, b"dtype": "<f4"}
GR00T   {"__ndarray_class__": True, "as_npy": the bytes of np.save}

What arrives is not trusted: an array must be of numbers or text, its bytes must be exactly those that its shape asks
for, and a frame holds at most VALUES values, counted before one is made. So a frame makes a few times its own size
(a copy of each array, text at up to four bytes a letter) and some 20 MB at most for the objects. Any frame that is not
of this form is a ValueError.
"""

import io
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

DTYPE = re.compile(r"[<>|=]?[?biufSU]\d{0,9}")  # no objects (pointers), no structures
SCALARS = {"b": bool, "i": int, "u": int, "f": int | float, "S": bytes, "U": str}  # by the kind of a dtype
HEADER = 4096  # bytes of a .npy header
VALUES = 100_000  # of a frame, keys too; an array is four to nine of them, however large
# msgpack, by a value's first byte. FIXED: its bytes. SIZED: (bytes of its length, bytes beside it). COUNTED: (bytes of
# its count, values for each).
FIXED = {0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9, 0xD4: 3, 0xD5: 4,
         0xD6: 6, 0xD7: 10, 0xD8: 18}  # fmt: skip
SIZED = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1), 0xD9: (1, 0), 0xDA: (2, 0),
         0xDB: (4, 0)}  # fmt: skip
COUNTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
VERSIONS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _msgpack() -> Any:
    try:
        import msgpack
    except ImportError:
        raise ValueError("servers need msgpack: pip install -e '.[serve]' in dreamgen's folder") from None
    return msgpack


def _array(data: Any, dtype: np.dtype, shape: Any) -> np.ndarray:
    """An array (its own memory) of bytes that must be exactly as many as `shape` takes."""
    if not isinstance(shape, list | tuple) or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array has a shape of type {type(shape).__name__}; expected a list of at most 32 sizes")
    shape = tuple(shape)
    if not isinstance(data, bytes):
        raise ValueError(f"an array of shape {shape} has data of type {type(data).__name__}; expected bytes")
    if not dtype.itemsize:  # any shape of it takes no bytes to send, and memory to hold
        raise ValueError(f"an array of shape {shape} has the type {dtype}, of no bytes")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} and type {dtype} has {len(data)} bytes of data; expected "
                         f"{math.prod(shape) * dtype.itemsize}")  # fmt: skip
    return np.frombuffer(data, dtype).reshape(shape).copy() if len(data) else np.zeros(shape, dtype)


def _dtype(name: Any) -> np.dtype:
    if not isinstance(name, str) or not DTYPE.fullmatch(name):
        raise ValueError(f"an array has the type {name!r:.60}; expected numbers or text, such as '<f4'")
    return np.dtype(name)


def _scalar(data: Any, dtype: np.dtype) -> np.generic:
    """A number or text of the kind that `dtype` holds: of a number n numpy would make n bytes, of a list an array."""
    if not isinstance(data, SCALARS[dtype.kind]):
        raise ValueError(f"a value of type {dtype} came as {type(data).__name__}")
    with np.errstate(over="ignore"):
        return dtype.type(data)


def _plain(value: np.ndarray | np.generic) -> None:
    if value.dtype.kind not in "?biufSU":
        raise ValueError(f"arrays of type {value.dtype} are not sent; expected numbers or text")


def _openpi_out(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        _plain(value)
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        _plain(value)
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise ValueError(f"a value of type {type(value).__name__} cannot be sent")


def _openpi_in(node: dict) -> Any:
    if b"__ndarray__" in node:
        return _array(node[b"data"], _dtype(node[b"dtype"]), node[b"shape"])
    if b"__npgeneric__" in node:
        return _scalar(node[b"data"], _dtype(node[b"dtype"]))
    return node


def _groot_out(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        _plain(value)
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}
    if isinstance(value, np.generic):
        return value.item()
    raise ValueError(f"a value of type {type(value).__name__} cannot be sent")


def _groot_in(node: dict) -> Any:
    return load_npy(node["as_npy"]) if "__ndarray_class__" in node else node


def load_npy(data: bytes) -> np.ndarray:
    """What `np.load(io.BytesIO(data), allow_pickle=False)` gives for a .npy file, and ValueError for all else.

    np.load itself also opens zip archives, and makes the memory that a header promises before it reads.
    """
    if not isinstance(data, bytes):
        raise ValueError(f"an array came as {type(data).__name__}; expected the bytes of np.save")
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in VERSIONS:
        raise ValueError(f"an array has the .npy version {version}; expected one of {list(VERSIONS)}")
    shape, fortran, dtype = VERSIONS[version](file, max_header_size=HEADER)
    array = _array(data[file.tell() :], _dtype(dtype.str), shape)
    return array.ravel().reshape(shape[::-1]).T if fortran else array


def _require_few(frame: bytes) -> None:
    """ValueError if the value in `frame` holds, or announces, more than VALUES; a cut frame is left to msgpack."""
    at, told, left = 0, 1, 1
    while left and at < len(frame):
        kind, count = frame[at], 0
        if 0x80 <= kind < 0xA0:
            at, count = at + 1, (kind & 15) * (2 if kind < 0x90 else 1)
        elif 0xA0 <= kind < 0xC0:
            at += 1 + (kind & 31)
        elif kind in SIZED:
            size, beside = SIZED[kind]
            at += 1 + size + beside + int.from_bytes(frame[at + 1 : at + 1 + size])
        elif kind in COUNTED:
            size, each = COUNTED[kind]
            at, count = at + 1 + size, each * int.from_bytes(frame[at + 1 : at + 1 + size])
        else:
            at += FIXED.get(kind, 1)
        told, left = told + count, left - 1 + count
        if told > VALUES:
            raise ValueError(f"it holds {told} values or more; expected at most {VALUES}")


def _read(frame: bytes, read: Callable[[Any], Any]) -> Any:
    """What `read` makes of msgpack and a frame of few values; whatever it raises is a ValueError."""
    msgpack = _msgpack()
    try:
        _require_few(frame)
        return read(msgpack)
    except Exception as error:  # what a hostile header makes numpy raise has no end
        reason = str(error) or type(error).__name__
        raise ValueError(f"a frame of {len(frame)} bytes is malformed: {reason:.300}") from None


def _unpack(frame: bytes, hook: Callable) -> Any:
    return _read(frame, lambda msgpack: msgpack.unpackb(frame, object_hook=hook))


def _pack(value: Any, hook: Callable) -> bytes:
    return _msgpack().packb(value, default=hook)


def pack_openpi(value: Any) -> bytes:
    """A frame of the openpi protocol; ValueError for what cannot be sent."""
    return _pack(value, _openpi_out)


def unpack_openpi(frame: bytes) -> Any:
    """The inverse of `pack_openpi`; ValueError for a malformed or hostile frame."""
    return _unpack(frame, _openpi_in)


def pack_groot(value: Any) -> bytes:
    """A frame of the GR00T protocol; ValueError for what cannot be sent."""
    return _pack(value, _groot_out)


def unpack_groot(frame: bytes) -> Any:
    """The inverse of `pack_groot`; ValueError for a malformed or hostile frame."""
    return _unpack(frame, _groot_in)


def peek(frame: bytes, key: str) -> Any:
    """The value under `key` of a frame that holds a map, None if it has none; no other value is made."""

    def read(msgpack: Any) -> Any:
        unpacker, found = msgpack.Unpacker(max_buffer_size=len(frame)), None
        unpacker.feed(frame)
        for _ in range(unpacker.read_map_header()):
            if unpacker.unpack() == key:
                found = unpacker.unpack()
            else:
                unpacker.skip()
        return found

    return _read(frame, read)
