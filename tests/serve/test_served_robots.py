"""Saved policies behind a server: it says which it is and for which of its robots it acts, and is that one's policy."""

from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.manifest import fingerprint
from dreamgen.policies.policy import FlowPolicy
from dreamgen.policies.realtime import RealTime
from dreamgen.serve.clients import GrootPolicy, OpenpiPolicy
from dreamgen.serve.groot import GrootServer
from dreamgen.serve.openpi import OpenpiServer
from tests.policies.toy import both, crane, crane_observations, observations, policy, robot

pytest.importorskip("websockets"), pytest.importorskip("zmq")
SIDES = {"openpi": (OpenpiServer, OpenpiPolicy), "groot": (GrootServer, GrootPolicy)}


@pytest.mark.parametrize("protocol", SIDES)
def test_each_robot_is_served_its_own_contract_and_chunks(tmp_path: Path, protocol: str):
    both(3, prefix=2).save(tmp_path)
    server, client = SIDES[protocol]
    asked = [(robot(), crane(3), observations(1)), (crane(3), robot(), crane_observations(1, 3))]
    for mine, other, seen in asked:
        model = FlowPolicy.load(tmp_path, robot=mine)
        with server(model, port=0) as made:
            with client(made.address) as remote:  # which takes the robot that it is told of
                assert mine.mismatches(remote.robot.contract()) == []
                chunk = remote.act(seen, [5])
                np.testing.assert_array_equal(chunk, model.act(seen, [5]))
                assert chunk.shape[2] == mine.action_dim
                on = [
                    RealTime(p, delay=2).act(seen, [6], [{"start": 0, "chunk": chunk[0]}], 3) for p in (remote, model)
                ]
                np.testing.assert_array_equal(*on)
            with pytest.raises(ValueError, match=f"name: here {other.name}, saved {mine.name}"):
                with client(made.address, robot=other) as remote:
                    remote.act(seen, [5])


@pytest.mark.parametrize("protocol", SIDES)
def test_another_policy_of_the_same_robot_is_named(tmp_path: Path, protocol: str, monkeypatch):
    """When a connection is made anew. Both show the key that the environment holds."""
    monkeypatch.setenv("DREAMGEN_KEY", "secret")
    server, client = SIDES[protocol]
    for seed in (1, 2):
        policy(seed).save(tmp_path / str(seed))
    one, two = (FlowPolicy.load(tmp_path / str(seed)) for seed in (1, 2))
    with server(one, port=0, key="secret") as made, server(two, port=0, key="secret") as other:
        with client(made.address, robot=robot()) as remote:
            assert remote.served == fingerprint(tmp_path / "1") != fingerprint(tmp_path / "2")
            remote.close()
            remote.address = other.address
            with pytest.raises(ValueError, match=f"serves another policy .*policy: '{remote.served}' -> "):
                remote.act(observations(1), [5])


def test_who_asks_for_another_robot_holds_no_place():
    with OpenpiServer(both().eval(), port=0, clients=2) as made:
        for _ in range(3):
            with pytest.raises(ValueError, match="name: here crane, saved toy"):
                OpenpiPolicy(made.address, robot=crane())
        with OpenpiPolicy(made.address, robot=robot()) as remote:
            assert remote.act(observations(1), [5]).shape[0] == 1
