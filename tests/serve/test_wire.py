"""Frames to the byte, there and back, and frames made to hurt."""

import io
import pickle
import struct

import numpy as np
import pytest

from dreamgen.serve import wire
from dreamgen.serve.wire import load_npy, pack_groot, pack_openpi, peek, unpack_groot, unpack_openpi

msgpack = pytest.importorskip("msgpack")


class Touches:
    """Says so when it is unpickled."""

    hits: list = []

    def __reduce__(self):
        return Touches.hits.append, (1,)


def golden_openpi() -> bytes:
    def binary(text: bytes) -> bytes:
        return b"\xc4" + bytes([len(text)]) + text

    array = (b"\x84" + binary(b"__ndarray__") + b"\xc3" + binary(b"data") + binary(b"\x01\x02")
             + binary(b"dtype") + b"\xa3|u1" + binary(b"shape") + b"\x92\x01\x02")  # fmt: skip
    scalar = (b"\x83" + binary(b"__npgeneric__") + b"\xc3" + binary(b"data") + b"\xcb" + struct.pack(">d", 1.5)
              + binary(b"dtype") + b"\xa3<f4")  # fmt: skip
    return b"\x82" + b"\xa1a" + array + b"\xa1n" + scalar


def golden_groot() -> bytes:
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2), }"
    head += b" " * (128 - 10 - len(head) - 1) + b"\n"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + b"\x01\x02"
    return b"\x81\xa1a\x82\xb1__ndarray_class__\xc3\xa6as_npy\xc4" + bytes([len(npy)]) + npy


def test_golden_bytes():
    value = {"a": np.array([[1, 2]], np.uint8)}
    both = {**value, "n": np.float32(1.5)}
    assert pack_openpi(both) == golden_openpi() and pack_groot(value) == golden_groot()
    back = unpack_openpi(golden_openpi())
    assert back["a"].tolist() == [[1, 2]] and back["a"].dtype == np.uint8
    assert type(back["n"]) is np.float32 and back["n"] == 1.5
    assert unpack_groot(golden_groot())["a"].tolist() == [[1, 2]]


@pytest.mark.parametrize("pair", [(pack_openpi, unpack_openpi), (pack_groot, unpack_groot)])
def test_round_trip(pair):
    pack, unpack = pair
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, (2, 3, 5), dtype=np.uint8), rng.normal(size=(4, 0)), np.array(3.5, np.float16),
              np.array([True, False]), np.array(["go", "left"]), rng.normal(size=(3, 5)).astype(">f4"),
              np.asfortranarray(rng.normal(size=(3, 4)))]  # fmt: skip
    back = unpack(pack({"text": "go", "list": [1, 2.5, None], "arrays": arrays}))
    assert back["text"] == "go" and back["list"] == [1, 2.5, None]
    for a, b in zip(arrays, back["arrays"], strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
        b[...] = b  # its own memory


def test_npy_as_numpy_reads_it():
    for array in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array("x")):
        file = io.BytesIO()
        np.save(file, array)
        assert np.array_equal(load_npy(file.getvalue()), np.load(io.BytesIO(file.getvalue())))


def openpi_array(mark: bytes = b"__ndarray__", **changes) -> bytes:
    node = {"data": b"\0" * 8, "dtype": "<f4", "shape": [2], **changes}
    return msgpack.packb({mark: True} | {key.encode(): value for key, value in node.items() if value is not None})


def saved(array, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


def groot_array(data) -> bytes:
    return msgpack.packb({"__ndarray_class__": True, "as_npy": data})


HOSTILE_OPENPI = {
    "objects": openpi_array(dtype="|O", shape=[1]),
    "structure": openpi_array(dtype="i4,O", shape=[1]),
    "huge": openpi_array(shape=[10**12]),
    "overflow": openpi_array(data=b"", shape=[2**62, 2**62]),
    "values of no bytes": openpi_array(data=b"", dtype="|S0", shape=[2**34]),
    "letters of no bytes": openpi_array(data=b"", dtype="<U0", shape=[2**34]),
    "negative": openpi_array(shape=[-1]),
    "too little": openpi_array(data=b"\0" * 7),
    "no data": openpi_array(data=None),
    "text as data": openpi_array(data="12345678"),
    "shape of text": openpi_array(shape="ab"),
    "dimensions": openpi_array(data=b"\0" * 4, shape=[1] * 99),
    "scalar": openpi_array(b"__npgeneric__", dtype="|O"),
    "scalar value": openpi_array(b"__npgeneric__", data={}),
    "scalar of so many bytes": openpi_array(b"__npgeneric__", dtype="|S", data=7),
    "scalar of as many bytes each": openpi_array(b"__npgeneric__", dtype="|S", data=[b"a" * 7, b"", b""]),
    "scalar of a list": openpi_array(b"__npgeneric__", data=[1, 2]),
    "shape of bytes": openpi_array(shape=b"\2"),
}
HOSTILE_GROOT = {
    "pickle": groot_array(pickle.dumps(Touches())),
    "pickle in npy": groot_array(saved(np.array([Touches()], object), allow_pickle=True)),
    "zip": groot_array(npz()),
    "huge": groot_array(saved(np.zeros(3)).replace(b"(3,), }      ", b"(3000000,), }")),
    "values of no bytes": groot_array(saved(np.zeros(3, "S3")).replace(b"|S3", b"|S0")[:-9]),
    "promises more": groot_array(saved(np.zeros(3))[:-1]),
    "holds more": groot_array(saved(np.zeros(3)) + b"\0"),
    "structure": groot_array(saved(np.zeros(2, "i4,f4"))),
    "header": groot_array(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 3000),
    "version": groot_array(b"\x93NUMPY\x09\x00"),
    "no bytes": groot_array("text"),
    "nothing": msgpack.packb({"__ndarray_class__": True}),
}
RUBBISH = {
    "empty": b"", "never used": b"\xc1", "cut": golden_openpi()[:20], "more": golden_openpi() + b"\1",
    "deep": b"\x91" * 5000 + b"\1", "long list": b"\xdd\xff\xff\xff\xff", "long text": b"\xdb\xff\xff\xff\xff",
    "map of lists": b"\x81\x90\1", "not utf-8": b"\xa2\xff\xfe", "pickle": pickle.dumps(Touches()),
    "maps": b"\xdd\x00\x02\x00\x00" + b"\x80" * 2**17,
    "lists of lists": b"\xdc\x04\x00" + (b"\xdc\x00\xff" + b"\x90" * 255) * 1024,
    "numbers": msgpack.packb(list(range(100_000))), "large map": b"\xdf\x00\x01\x00\x00" + b"\1" * 2**17,
    "lists that are announced": b"\xdc\xff\xff" * 500, "cut map": b"\xde\x01", "cut number": b"\x92\xcb\0\0",
}  # fmt: skip


@pytest.mark.parametrize("name", [*HOSTILE_OPENPI, *RUBBISH])
def test_hostile_openpi_frames(name):
    with pytest.raises(ValueError, match="malformed"):
        unpack_openpi({**RUBBISH, **HOSTILE_OPENPI}[name])
    assert Touches.hits == []


@pytest.mark.parametrize("name", [*HOSTILE_GROOT, *RUBBISH])
def test_hostile_groot_frames(name):
    with pytest.raises(ValueError, match="malformed"):
        unpack_groot({**RUBBISH, **HOSTILE_GROOT}[name])
    assert Touches.hits == []


def count(value) -> int:
    below = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return 1 + sum(map(count, below))


def test_values_are_counted_as_msgpack_reads_them(monkeypatch):
    numbers = [sign * 2**n - (sign > 0) for n in range(64) for sign in (-1, 1) if n or sign > 0]
    texts = ["a" * n for n in (0, 31, 32, 255, 256, 2**16)]
    ext = [msgpack.ExtType(5, b"a" * n) for n in (0, 1, 2, 3, 4, 8, 16, 17, 255, 256, 2**16)]
    lists = [list(range(n)) for n in (0, 15, 16, 2**16)]
    maps = [{str(i): [{}] for i in range(n)} for n in (0, 15, 16, 300)]
    value = [numbers, texts, [text.encode() for text in texts], ext, lists, maps, [None, True, False, 1.5]]
    frame, held = msgpack.packb(value), count(value)
    monkeypatch.setattr(wire, "VALUES", held)
    assert count(unpack_groot(frame)) == held
    monkeypatch.setattr(wire, "VALUES", held - 1)
    with pytest.raises(ValueError, match=f"malformed: it holds {held} values or more; expected at most {held - 1}"):
        unpack_openpi(frame)


def test_one_value_is_read_without_the_rest():
    hostile = msgpack.unpackb(HOSTILE_GROOT["huge"])
    frame = msgpack.packb({"endpoint": "ping", "data": {"a": [hostile] * 3}, "api_token": "k"})
    assert peek(frame, "api_token") == "k" and peek(frame, "seed") is None
    for name in ("empty", "cut", "never used", "deep", "maps", "large map", "numbers", "lists that are announced"):
        with pytest.raises(ValueError, match="malformed"):
            peek(RUBBISH[name], "api_token")


def test_random_damage_never_gets_through_as_another_error():
    rng = np.random.default_rng(0)
    for good, unpack in ((golden_openpi(), unpack_openpi), (golden_groot(), unpack_groot)):
        for _ in range(400):
            frame = bytearray(good)
            for at in rng.integers(0, len(frame), rng.integers(1, 4)):
                frame[at] = rng.integers(256)
            try:
                unpack(bytes(frame))
            except ValueError:
                pass


def test_what_cannot_be_sent():
    for pack in (pack_openpi, pack_groot):
        for value in (np.array([object()]), {1, 2}, np.zeros(1, complex)):
            with pytest.raises(ValueError, match="sent"):
                pack({"a": value})
