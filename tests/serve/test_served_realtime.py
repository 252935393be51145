"""Chunks that go on from the last one, through a server: the same to the bit as without it."""

import re

import numpy as np
import pytest

from dreamgen.policies.realtime import RealTime
from dreamgen.serve.asked import answer, going_on
from dreamgen.serve.clients import GrootPolicy, OpenpiPolicy
from dreamgen.serve.groot import GrootServer
from dreamgen.serve.openpi import OpenpiServer
from tests.policies.toy import B, observations, policy
from tests.serve.toy import ROBOT, STEPS, A, Mean
from tests.serve.toy import observations as toy_observations

pytest.importorskip("websockets"), pytest.importorskip("zmq")
SIDES = {"openpi": (OpenpiServer, OpenpiPolicy), "groot": (GrootServer, GrootPolicy)}


@pytest.mark.parametrize("mode", ["guided", "trained"])
@pytest.mark.parametrize("protocol", SIDES)
def test_a_served_policy_goes_on_from_the_last_chunk(protocol, mode):
    server, client = SIDES[protocol]
    model = policy(prefix=2, euler_steps=3).eval()
    with server(model, port=0) as made, client(made.address, robot=model.robot) as remote:
        assert remote.prefix == 2
        n = B if protocol == "groot" else 1  # one question at a time over openpi: the same rows, then, one by one
        far, near = RealTime(remote, delay=2, mode=mode), RealTime(model, delay=2, mode=mode)
        memories = [[{} for _ in range(n)] for _ in range(2)]
        for now, seen in ((0, observations()[:n]), (3, observations()[::-1][:n])):
            chunks = [p.act(seen, range(now, now + n), m, now) for p, m in zip((far, near), memories, strict=True)]
            np.testing.assert_array_equal(*chunks)
        assert np.abs(chunks[0] - model.act(seen, range(now, now + n))).max() > 1e-3  # it made a difference
        with pytest.raises(ValueError, match="prefixes of up to 2 steps; delay is 3"):
            RealTime(remote, delay=3, mode="trained")


@pytest.mark.parametrize("protocol", SIDES)
def test_a_policy_that_cannot_go_on_says_so(protocol):
    server, client = SIDES[protocol]
    seen = toy_observations(1)
    with server(Mean(), port=0) as made, client(made.address, robot=ROBOT) as remote:
        with pytest.raises(ValueError, match="cannot go on from a chunk"):
            RealTime(remote, delay=1)
        with pytest.raises(ValueError, match="policy served here cannot go on"):
            remote.proceed(seen, [0], [np.zeros((1, A))], delay=1, mode="guided", beta=5.0)
        np.testing.assert_allclose(remote.act(seen, [0]), Mean().act(seen, [0]))  # the connection goes on


class Going(Mean):
    """The mean, and what came of the last chunk."""

    prefix = 1

    def proceed(self, observations, seeds, rests, *, delay, mode, beta) -> np.ndarray:
        assert mode == "guided" and all(rest.dtype == np.float32 for rest in rests)
        return self.act(observations, seeds) + np.array([rest.sum() for rest in rests])[:, None, None] + delay + beta


REST = np.ones((2, A), np.float32)
GOOD = going_on([REST, REST[:0]], 1, "guided", 0.5)
BAD = {
    "no map": (3, "realtime is 3; expected a map"),
    "keys": ({**GOOD, "more": 1}, "realtime is .*more.*; expected a map of rests, delay, mode, beta"),
    "one rest": ({**GOOD, "rests": [REST]}, "no list of 2 rests"),
    "text": ({**GOOD, "rests": ["a", REST]}, "a rest of a chunk is str"),
    "width": ({**GOOD, "rests": [REST[:, 1:], REST]}, rf"a rest of a chunk is \(2, {A - 1}\)"),
    "long": ({**GOOD, "rests": [np.ones((STEPS + 1, A)), REST]}, f"at most {STEPS} steps of {A} finite"),
    "nan": ({**GOOD, "rests": [REST * np.nan, REST]}, "finite"),
    "words": ({**GOOD, "rests": [np.full((2, A), "x"), REST]}, "a rest of a chunk is"),
    "delay": ({**GOOD, "delay": 1.5}, "delay 1.5"),
    "switch": ({**GOOD, "delay": True}, "delay True"),
    "huge": ({**GOOD, "rests": [np.full((2, A), 1e300), REST]}, "finite"),
    "beta": ({**GOOD, "beta": float("inf")}, "beta inf"),
    "beta that overflows": ({**GOOD, "beta": 1e308}, "beta 1e.308; expected .* a number from 0 to 1000"),
    "beta of many digits": ({**GOOD, "beta": 10**400}, "a number from 0 to 1000"),
    "beta below 0": ({**GOOD, "beta": -0.1}, "beta -0.1"),
    "beta that is none": ({**GOOD, "beta": float("nan")}, "beta nan"),
    "mode": ({**GOOD, "mode": 4}, "mode 4"),
    "long mode": ({**GOOD, "mode": "guided" * 11}, "mode 'guided.{54}', beta 0.5; expected a whole number, a word"),
}


class Overflowing(Going):
    def act(self, observations, seeds):
        return super().act(observations, seeds) * np.inf


@pytest.mark.parametrize("asked", [None, GOOD])
def test_actions_that_are_no_numbers_are_not_sent(asked):
    with pytest.raises(ArithmeticError, match="its actions are not finite numbers"):
        answer(Overflowing(), toy_observations(2), [0, 1], asked)


def test_what_is_asked_reaches_the_policy():
    seen, seeds = toy_observations(2), [0, 1]
    want = Mean().act(seen, seeds) + np.array([2.0 * A, 0])[:, None, None] + 1.5
    np.testing.assert_allclose(answer(Going(), seen, seeds, GOOD), want, rtol=1e-6)
    np.testing.assert_allclose(answer(Going(), seen, seeds, None), Mean().act(seen, seeds))


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_named(name):
    asked, want = BAD[name]
    with pytest.raises(ValueError) as raised:
        answer(Going(), toy_observations(2), [0, 1], asked)
    assert re.search(want, str(raised.value)), raised.value


@pytest.mark.parametrize("client", [OpenpiPolicy, GrootPolicy])
def test_how_a_policy_acts_is_said_where_it_is_served(client):
    with pytest.raises(ValueError, match="nowhere acts as its server says; set compile, euler_steps there"):
        client.load("nowhere", robot=ROBOT, euler_steps=2, compile="default", speaks=None)
    server = next(server for server, known in SIDES.values() if known is client)
    with server(Mean(), port=0) as made, client.load(made.address, euler_steps=None, compile=None) as policy:
        assert policy.horizon == STEPS
