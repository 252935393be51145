"""Requests with one part in another's place: each is answered in few words, and takes little beyond its own size."""

import tracemalloc
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgpack
import numpy as np
import pytest

from dreamgen.serve.asked import going_on
from dreamgen.serve.groot import GrootServer, to_groot
from dreamgen.serve.messages import keys, to_message
from dreamgen.serve.openpi import OpenpiServer
from dreamgen.serve.wire import pack_groot, pack_openpi, unpack_groot, unpack_openpi
from tests.serve.test_served_realtime import Going
from tests.serve.toy import ROBOT, A, H, W, observations

pytest.importorskip("websockets"), pytest.importorskip("zmq")
N = 1 << 17
ODD = {
    "bytes": b"\0" * N, "text": "\1" * N, "key": {b"\0" * N: 1}, "quotes": "\\'" * N, "no rows": np.zeros((2**40, 0)),
    "number": np.array(3.0), "numbers": np.zeros(N, np.uint8), "steps": np.zeros((N // A, A), np.uint8),
    "pictures": np.zeros((1, N // (H * W * 3), H, W, 3), np.uint8), "batch": np.zeros((N // (H * W * 3), 1, H, W, 3)),
    "words": np.array(["a" * N]), "large": 2**64 - 1, "inf": float("inf"), "none": None, "true": True, "float": 1.5,
    "ext": msgpack.ExtType(5, b"a" * N), "time": msgpack.Timestamp(1, 1), "scalar": np.uint64(2**64 - 1), "list": [[1]],
    "deep": msgpack.unpackb(b"\x91" * 900 + b"\1"), "deep map": msgpack.unpackb(b"\x81\xa1a" * 900 + b"\1"),
}  # fmt: skip


def placed(value: Any, odd: Any) -> Iterator[Any]:
    """`value` with `odd` in the place of each of its parts, and of itself."""
    yield odd
    if isinstance(value, dict):
        yield from ({**value, key: made} for key, part in value.items() for made in placed(part, odd))
    if isinstance(value, list):
        yield from ([*value[:k], made, *value[k + 1 :]] for k, part in enumerate(value) for made in placed(part, odd))


SEEN, REST = observations(2), np.ones((2, A), np.float32)
GOOD = {
    "openpi": {**to_message(SEEN[0], keys(ROBOT), ROBOT), "seed": 3, "realtime": going_on([REST], 1, "guided", 0.5)},
    "groot": {"endpoint": "get_action", "data": {
        "observation": to_groot(SEEN, ROBOT),
        "options": {"seed": [3, 4], "realtime": going_on([REST, REST], 1, "guided", 0.5)}}},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("protocol", GOOD)
def test_a_part_in_the_place_of_another_costs_a_few_words(protocol: str, odd: str):
    server = {"openpi": OpenpiServer, "groot": GrootServer}[protocol]
    pack, unpack = (pack_openpi, unpack_openpi) if protocol == "openpi" else (pack_groot, unpack_groot)
    with server(Going(), port=0) as made:
        ask = partial(made._answer, before=None) if protocol == "openpi" else partial(made._reply, frames=1)
        for message in placed(GOOD[protocol], ODD[odd]):
            frame = pack(message)
            tracemalloc.start()
            reply = ask(frame)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            told = reply if isinstance(reply, str) else unpack(reply)
            told = told["error"] if isinstance(told, dict) and "error" in told else told
            assert not isinstance(told, str) or (len(told) < 900 and "failed" not in told), told
            assert peak < 9 * len(frame) + 500_000
