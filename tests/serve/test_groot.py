"""The GR00T server: by frames as they stand in the protocol, by our client, and by clients that mean harm."""

import json
import pickle
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from dreamgen.core.embodiment import Part
from dreamgen.serve.clients import GrootPolicy
from dreamgen.serve.groot import GrootServer, from_groot, modality_config, to_groot
from dreamgen.serve.wire import pack_groot, unpack_groot
from tests.serve.toy import ROBOT, STEPS, A, H, Mean, W, observations

zmq = pytest.importorskip("zmq")


@pytest.fixture(scope="module")
def server() -> Iterator[GrootServer]:
    with GrootServer(Mean(), port=0, max_mb=0.1, max_rows=4) as made:
        yield made


class Link:
    """A bare REQ socket."""

    def __init__(self, server: GrootServer) -> None:
        self.socket = zmq.Context.instance().socket(zmq.REQ)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, 5000)
        self.socket.connect(server.address)

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def raw(self, *frames: bytes) -> dict | list | None:
        self.socket.send_multipart(frames)
        return unpack_groot(self.socket.recv())

    def ask(self, **request) -> dict | list | None:
        return self.raw(pack_groot(request))


def test_get_action(server: GrootServer):
    seen, seeds = observations(3), [3, 1, 4]
    video = {v.name: np.stack([np.stack([o.views[v.name] // 2, o.views[v.name]]) for o in seen]) for v in ROBOT.views}
    state = {"pose": np.stack([[o.state[:2]] for o in seen]), "grip": np.stack([[o.state[2:]] for o in seen])}
    observation = {"video": video, "state": state, "language": {"task": [[o.instruction] for o in seen]}}
    want = Mean().act(seen, seeds)  # of two steps of video the last counts
    with Link(server) as link:
        for data in ({"observation": observation, "options": {"seed": seeds}},):
            action, info = link.ask(endpoint="get_action", data=data)
            assert action.keys() == {"arm", "hand"} and action["arm"].shape == (3, STEPS, 4)
            np.testing.assert_allclose(np.concatenate([action["arm"], action["hand"]], -1), want)
            assert info["server_timing"]["infer_ms"] > 0
        assert link.ask(data=observation)[0]["hand"].shape == (3, STEPS, 1)  # the default endpoint, the bare form


def test_the_other_endpoints(server: GrootServer):
    with Link(server) as link:
        assert link.ask(endpoint="ping") == {"status": "ok", "message": "Server is running"}
        assert link.ask(endpoint="reset", data={"options": None}) == {}
        config = link.ask(endpoint="get_modality_config")
        assert config["video"] == {"__ModalityConfig_class__": True,
                                   "as_json": {"delta_indices": [0], "modality_keys": ["front", "wrist"]}}  # fmt: skip
        assert config["action"]["as_json"] == {"delta_indices": list(range(STEPS)), "modality_keys": ["arm", "hand"]}
        assert link.ask(endpoint="fly") == {"error": "Unknown endpoint: 'fly'"}


def test_observations_are_inverse():
    seen = observations(3)
    for a, b in zip(seen, from_groot(to_groot(seen, ROBOT), ROBOT), strict=True):
        assert a.instruction == b.instruction and np.array_equal(a.state, b.state)
        assert all(np.array_equal(a.views[name], b.views[name]) for name in a.views)


def test_our_client_is_a_policy(server: GrootServer):
    seen, seeds = observations(3), [3, 1, 4]
    with GrootPolicy(server.address, robot=ROBOT) as policy:
        want = Mean().act(seen, seeds)
        np.testing.assert_allclose(policy.act(seen, seeds), want)
        assert policy.horizon == STEPS
        other = pickle.loads(pickle.dumps(policy))
        np.testing.assert_allclose(other.act(seen, seeds), want)
        other.close()
        with pytest.raises(ValueError, match="5 observations; expected at most 4"):
            policy.act(observations(5), range(5))
        np.testing.assert_allclose(policy.act(seen, seeds), want)
    with pytest.raises(ValueError, match="robot_hz: here 10, saved 20"):
        GrootPolicy(server.address, robot=replace(ROBOT, robot_hz="10"))
    with pytest.raises(ValueError, match="no GR00T server answers"):
        GrootPolicy("tcp://127.0.0.1:9", robot=ROBOT, timeout=0.2)


def test_another_policy_after_a_broken_connection_is_named(server: GrootServer):
    class Long(Mean):
        horizon = STEPS + 1

    class Other(Mean):
        robot = replace(ROBOT, robot_hz="10")

    seen = observations(1)
    with GrootServer(Long(), port=0) as long, GrootServer(Other(), port=0) as other:
        with GrootPolicy(server.address, robot=ROBOT) as policy:
            want = policy.act(seen, [3])
            for made, word in ((long, "horizon: 4 -> 5"), (other, "robot_hz: here 20, saved 10")):
                policy.close()
                policy.address = made.address
                for _ in range(2):  # also when it is asked again
                    with pytest.raises(ValueError, match=word):
                        policy.act(seen, [3])
            policy.address = server.address
            np.testing.assert_array_equal(policy.act(seen, [3]), want)


def test_a_server_of_another_stack_is_compared_by_its_keys(server: GrootServer, monkeypatch):
    ask = GrootPolicy.ask

    def foreign(self, endpoint, data=None):
        if endpoint == "contract":
            raise ValueError("Unknown endpoint")
        return ask(self, endpoint, data)

    monkeypatch.setattr(GrootPolicy, "ask", foreign)
    with GrootPolicy(server.address, robot=ROBOT) as policy:
        assert policy.robot == ROBOT
    action = (replace(ROBOT.action[0], name="wing"), ROBOT.action[1])
    with pytest.raises(ValueError, match="action keys .*'arm', 'hand'.*has .*'wing', 'hand'"):
        GrootPolicy(server.address, robot=replace(ROBOT, action=action))
    with pytest.raises(ValueError, match="does not say for which robot"):
        GrootPolicy(server.address)

    def silent(self, endpoint, data=None):
        if endpoint == "contract":
            monkeypatch.setattr(self, "address", "tcp://127.0.0.1:9")
            self.close()
            self.timeout = 0.2
        return ask(self, endpoint, data)

    monkeypatch.setattr(GrootPolicy, "ask", silent)
    with pytest.raises(ValueError, match="no GR00T server answers"):  # nothing was heard of its contract
        GrootPolicy(server.address, robot=ROBOT)


GOOD = to_groot(observations(2), ROBOT)
PICTURES = GOOD["video"]["wrist"]
BAD = {
    "not msgpack": (b"\xc1", "malformed"),
    "empty": (b"", "malformed"),
    "list": (pack_groot([1]), "expected a map"),
    "pickle": (pickle.dumps({"endpoint": "ping"}), "malformed|expected a map"),
    "nothing": (pack_groot({"endpoint": "get_action"}), "language"),
    "no view": (pack_groot({"data": {**GOOD, "video": {"front": PICTURES}}}),
                r"video lacks \['wrist'\]; it is a map of 'front'; expected \['front', 'wrist'\]"),
    "text as a view": (pack_groot({"data": {**GOOD, "video": {"front": PICTURES, "wrist": "a"}}}),
                       "'wrist' of the observation's video is str"),
    "no part": (pack_groot({"data": {**GOOD, "state": {}}}), r"state lacks \['pose', 'grip'\]; it is an empty map"),
    "no video": (pack_groot({"data": {**GOOD, "video": None}}), "video is NoneType; expected a map with"),
    "N1.5": (pack_groot({"data": {"video.front": PICTURES, "annotation.human.action.task_description": ["a", "a"]}}),
             "flat keys, as of N1.5: .*video.front.*; expected the maps"),
    "many values": (b"\xdd\x00\x01\x86\xa0" + b"\x80" * 100_000, "it holds 100001 values or more; expected at most"),
    "four axes": (pack_groot({"data": {**GOOD, "video": {"front": PICTURES, "wrist": PICTURES[:, 0]}}}), "B, T, H, W"),
    "size": (pack_groot({"data": {**GOOD, "video": {"front": PICTURES, "wrist": PICTURES[:, :, 1:]}}}), "view 'wrist'"),
    "batch": (pack_groot({"data": {**GOOD, "language": {"task": [["a"]]}}}), "batches of \\[1, 2\\]"),
    "width": (pack_groot({"data": {**GOOD, "state": {**GOOD["state"], "grip": np.zeros((2, 1, 2))}}}), "'grip'.*2 w"),
    "no time": (pack_groot({"data": {**GOOD, "state": {**GOOD["state"], "grip": np.zeros((2, 0, 1))}}}), "'grip'"),
    "words": (pack_groot({"data": {**GOOD, "language": {"task": [[1], [2]]}}}), "language is int; expected text"),
    "long": (pack_groot({"data": {**GOOD, "language": {"task": [["a"], ["b" * 2001]]}}}), "2001 characters; .* 2000"),
    "seeds": (pack_groot({"data": {"observation": GOOD, "options": {"seed": [1]}}}), "1 seeds came with 2"),
    "token": (pack_groot({"endpoint": ["ping"]}), "Unknown endpoint"),
    "large": (b"\0" * 200_000, "at most 104857 bytes"),
    "fault": (pack_groot({"data": {**GOOD, "language": {"task": [["break"], ["a"]]}}}), "the policy failed"),
    "nan": (pack_groot({"data": {**GOOD, "language": {"task": [["a"], ["nan"]]}}}), "its actions are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_gets_an_error(server: GrootServer, name: str):
    import re

    frame, want = BAD[name]
    with Link(server) as link:
        reply = link.raw(frame)
        assert reply.keys() == {"error"} and re.search(want, reply["error"]), reply
        assert link.ask(endpoint="ping")["status"] == "ok"


def test_the_instruction_comes_under_the_key_that_the_server_names(server: GrootServer, monkeypatch):
    """A server of another stack takes no other key, and no fewer steps than it names."""
    ask, key, heard = GrootPolicy.ask, "annotation.human.action.task_description", []

    def foreign(self, endpoint, data=None):
        if endpoint == "contract":
            raise ValueError("Unknown endpoint")
        reply = ask(self, endpoint, data)
        if endpoint == "get_modality_config":
            reply |= {"language": {"as_json": {"delta_indices": [0], "modality_keys": keys}}}
            reply |= {"video": {"as_json": {"delta_indices": steps, "modality_keys": ["front", "wrist"]}}}
        elif endpoint == "get_action":
            heard.append(data["observation"]["language"])
        return reply

    monkeypatch.setattr(GrootPolicy, "ask", foreign)
    keys, steps = [key], [0]
    with GrootPolicy(server.address, robot=ROBOT) as policy:
        np.testing.assert_allclose(policy.act(observations(2), [3, 1]), Mean().act(observations(2), [3, 1]))
    assert heard == [{key: [["push"], ["pushpush"]]}]
    steps = [-1, 0]
    with pytest.raises(ValueError, match=r"looks at 2 steps of video \(delta_indices \[-1, 0\]\); expected one"):
        GrootPolicy(server.address, robot=ROBOT)
    keys, steps = [key, "task"], [0]
    with pytest.raises(ValueError, match=r"language keys \['annotation.*expected one instruction"):
        GrootPolicy(server.address, robot=ROBOT)


def test_a_server_of_n1_5_is_understood_and_named(server: GrootServer, monkeypatch):
    ask = GrootPolicy.ask

    def older(self, endpoint, data=None):
        reply = ask(self, endpoint, data)
        if endpoint == "get_modality_config":
            reply = {name: {**node, "as_json": json.dumps(node["as_json"])} for name, node in reply.items()}
        return reply

    monkeypatch.setattr(GrootPolicy, "ask", older)
    with GrootPolicy(server.address, robot=ROBOT) as policy:
        assert policy.horizon == STEPS and policy.act(observations(1), [0]).shape == (1, STEPS, A)


CONFIG = modality_config(ROBOT, STEPS)
ODD = {
    "list": ({"get_modality_config": [1]}, "sent list; expected a map with video, state, action"),
    "no action": ({"get_modality_config": {"video": CONFIG["video"]}}, r"a map of \['video'\]; expected a map with"),
    "no as_json": ({"get_modality_config": {**CONFIG, "state": {}}}, r"a map of \[\]; expected a map with as_json"),
    "no JSON": ({"get_modality_config": {**CONFIG, "state": {"as_json": "{"}}}, "a modality that is no JSON"),
    "no keys": ({"get_modality_config": {**CONFIG, "state": {"as_json": "[]"}}}, "list; expected a map with delta_ind"),
    "steps": ({"get_modality_config": {**CONFIG, "action": {"as_json": {"delta_indices": 3, "modality_keys": []}}}},
              "delta_indices 3, modality_keys .*; expected two lists"),
    "contract": ({"contract": {"contract": {"views": 3}}}, "a contract that describes no robot"),
    "flat action": ({"get_action": {"action.arm": 1}}, r"answered get_action with dict; expected \[action, info\]"),
    "triple": ({"get_action": [1, 2, 3]}, r"with a list of 3; expected \[action, info\]"),
    "no map": ({"get_action": [1, {}]}, "sent int; expected a map with arm, hand"),
    "no hand": ({"get_action": [{"arm": 1}, {}]}, r"a map of \['arm'\]; expected a map with arm, hand"),
    "no array": ({"get_action": [{"arm": 1, "hand": 1}, {}]}, "actions of int"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_another_server_sends_amiss_is_named(server: GrootServer, monkeypatch, name: str):
    ask, (replies, want) = GrootPolicy.ask, ODD[name]
    monkeypatch.setattr(GrootPolicy, "ask", lambda self, endpoint, data=None: (
        replies[endpoint] if endpoint in replies else ask(self, endpoint, data)))  # fmt: skip
    with pytest.raises(ValueError, match=want), GrootPolicy(server.address, robot=ROBOT) as policy:
        policy.act(observations(1), [0])


def test_strangers_to_the_transport(server: GrootServer):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"\xff" * 100)
    with Link(server) as link, Link(server) as other:
        assert "2 frames, the first of 1 bytes" in link.raw(b"a", b"b")["error"]
        assert "900 frames" in link.raw(*[b"a" * 1000] * 900)["error"] and link.ask(endpoint="ping")["status"] == "ok"
        link.socket.setsockopt(zmq.RCVTIMEO, 300)
        with pytest.raises(zmq.Again):  # far too large: not even read
            link.raw(b"\0" * 600_000)
        assert other.ask(endpoint="ping")["status"] == "ok"


def test_a_key_and_kill():
    with GrootServer(Mean(), port=0, key="secret") as server:
        with Link(server) as link:
            for request in (dict(endpoint="kill"), dict(endpoint="ping", api_token="guess"), dict(api_token=[1])):
                assert link.ask(**request) == {"error": "Unauthorized: Invalid API token"}
            spoilt = {"__ndarray_class__": True, "as_npy": b"no array"}  # would be malformed, were it unpacked
            refused = link.ask(endpoint="ping", data=spoilt, api_token="guess")
            assert refused == {"error": "Unauthorized: Invalid API token"}
            assert "malformed" in link.ask(endpoint="ping", data=spoilt, api_token="secret")["error"]
        with GrootPolicy(server.address, robot=ROBOT, key="secret") as policy:
            assert policy.act(observations(1), [0]).shape == (1, STEPS, A)
            assert policy.ask("kill") is None
        for _ in range(50):
            if not server._thread.is_alive():
                break
            time.sleep(0.05)
        assert not server._thread.is_alive()


def test_kill_is_refused_to_strangers():
    server = GrootServer(Mean(), port=0)
    server.host = "0.0.0.0"
    with server:
        server_address = replace_host(server)
        with GrootPolicy(server_address, robot=ROBOT) as policy, pytest.raises(ValueError, match="kill is refused"):
            policy.ask("kill")


def replace_host(server: GrootServer) -> str:
    return f"tcp://127.0.0.1:{server.port}"


def test_an_address_that_is_taken(server: GrootServer):
    with pytest.raises(ValueError, match="cannot serve at 127.0.0.1"):
        GrootServer(Mean(), port=server.port)


def test_parts_follow_on():
    assert [part.width for part in ROBOT.action] == [4, 1] and isinstance(ROBOT.action[0], Part) and H != W
