"""The openpi server: by its published client, by ours, by golden frames, and by clients that mean harm."""

import os
import pickle
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.embodiment import View
from dreamgen.serve.clients import OpenpiPolicy
from dreamgen.serve.messages import from_message, keys, require_names, to_message
from dreamgen.serve.openpi import OpenpiServer
from dreamgen.serve.wire import pack_openpi, unpack_openpi
from tests.serve.toy import ROBOT, STEPS, A, D, H, Mean, W, observations

client = pytest.importorskip("websockets.sync.client")
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402

HERE = Path(__file__).parent
PUBLISHED = Path(os.environ.get("OPENPI_CLIENT_PYTHON", HERE.parents[1] / ".venv-openpi/bin/python"))

DROID = {"views": {"front": "observation/exterior_image_1_left", "wrist": "observation/wrist_image_left"},
         "state": {"pose": "observation/joint_position", "grip": "observation/gripper_position"},
         "prompt": "prompt"}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[OpenpiServer]:
    with OpenpiServer(Mean(), port=0, max_mb=0.1) as made:
        yield made


def connect(server: OpenpiServer, **options):
    return client.connect(server.address, compression=None, proxy=None, **options)


def test_it_speaks_first_and_answers_in_units(server: OpenpiServer):
    seen = observations(1)[0]
    with connect(server) as link:
        metadata = unpack_openpi(link.recv(5))
        assert metadata["horizon"] == STEPS and ROBOT.mismatches(metadata["contract"]) == []
        message = to_message(seen, metadata["keys"], ROBOT)
        assert message.keys() == {"observation/front", "observation/wrist", "observation/state", "prompt"}
        for turn in range(2):
            link.send(pack_openpi({**message, "seed": 5}))
            answer = unpack_openpi(link.recv(5))
            np.testing.assert_allclose(answer["actions"], Mean().act([seen], [5])[0])
            assert answer["actions"].dtype == np.float32 and answer["actions"].shape == (STEPS, A)
            assert answer.keys() == {"actions", "server_timing"} and answer["server_timing"]["infer_ms"] > 0
            assert ("prev_total_ms" in answer["server_timing"]) == (turn == 1)


@pytest.mark.parametrize("names", [keys(ROBOT), DROID])
def test_messages_are_inverse(names: dict):
    seen = observations(1)[0]
    again = from_message(to_message(seen, names, ROBOT), ROBOT, names)
    assert again.instruction == seen.instruction and np.array_equal(again.state, seen.state)
    assert all(np.array_equal(again.views[name], seen.views[name]) for name in seen.views)


def test_our_client_is_a_policy(server: OpenpiServer):
    seen, seeds = observations(3), [3, 1, 4]
    with OpenpiPolicy(server.address, robot=ROBOT) as policy:
        want = Mean().act(seen, seeds)
        np.testing.assert_allclose(policy.act(seen, seeds), want)
        assert policy.horizon == STEPS and policy.timing["infer_ms"] > 0
        other = pickle.loads(pickle.dumps(policy))  # to another process, where it connects anew
        np.testing.assert_allclose(other.act(seen[:1], seeds[:1]), want[:1])
        other.close()
        with pytest.raises(ValueError, match="refused the observation.*lacks.*wrist"):
            policy.act([replace(seen[0], views={"front": seen[0].views["front"]})], [0])
        np.testing.assert_allclose(policy.act(seen[:1], seeds[:1]), want[:1])  # the same connection goes on
    with OpenpiPolicy(server.address) as policy:
        assert policy.robot == ROBOT


def test_a_server_for_another_robot_is_named(server: OpenpiServer):
    views = tuple(View(name=v.name, key=v.key, height=H, width=W + 8) for v in ROBOT.views)
    wide = (dict(views=views), "views 'front': width here 32, saved 24")
    for changes, word in ((dict(robot_hz="10"), "robot_hz: here 10, saved 20"), wide):
        with pytest.raises(ValueError, match=word):
            OpenpiPolicy(server.address, robot=replace(ROBOT, **changes))
    with pytest.raises(ValueError, match="no openpi server answers at ws://127.0.0.1:9"):
        OpenpiPolicy("ws://127.0.0.1:9", robot=ROBOT, timeout=2.0)


def test_a_robot_keeps_its_keys():
    seen = observations(1)[0]
    with OpenpiServer(Mean(), port=0, names=DROID) as server:
        with OpenpiPolicy(server.address, robot=ROBOT) as policy:  # it is told them
            assert policy.names == DROID
            np.testing.assert_allclose(policy.act([seen], [5]), Mean().act([seen], [5]))
        with connect(server) as link:
            link.recv(5)
            message = {"observation/exterior_image_1_left": seen.views["front"],
                       "observation/wrist_image_left": seen.views["wrist"],
                       "observation/joint_position": seen.state[:2],
                       "observation/gripper_position": seen.state[2], "seed": 5,
                       "prompt": seen.instruction}  # fmt: skip
            for grip in (seen.state[2], np.float64(seen.state[2])):  # the latter arrives as a plain number
                link.send(pack_openpi({**message, "observation/gripper_position": grip}))
                np.testing.assert_allclose(unpack_openpi(link.recv(5))["actions"], Mean().act([seen], [5])[0])
            link.send(pack_openpi({**message, "observation/gripper_position": True}))
            assert "'observation/gripper_position' of the observation is no array of numbers but bool" in link.recv(5)
            link.send(pack_openpi({**message, "observation/joint_position": seen.state}))
            assert "'observation/joint_position' of the observation is (3,); expected (2,)" in link.recv(5)
            link.send(pack_openpi(GOOD))
            assert "lacks ['observation/exterior_image_1_left', 'observation/wrist_image_left'" in link.recv(5)


def test_maps_in_maps_pictures_as_planes_and_no_prompt():
    seen = observations(1)[0]
    names = {"views": {"front": "images/cam_high", "wrist": "images/cam_low"}, "state": "state", "prompt": "prompt"}
    planes = {"cam_high": seen.views["front"].transpose(2, 0, 1), "cam_low": seen.views["wrist"].transpose(2, 0, 1)}
    with OpenpiServer(Mean(), port=0, names=names, instruction="push") as server, connect(server) as link:
        link.recv(5)
        for more, said in (({}, "push"), ({"prompt": "pull it"}, "pull it")):
            link.send(pack_openpi({"images": planes, "state": seen.state.astype(float), "seed": 3, **more}))
            want = Mean().act([replace(seen, instruction=said)], [3])[0]
            np.testing.assert_allclose(unpack_openpi(link.recv(5))["actions"], want, rtol=1e-6)
        for images in ({"cam_high": planes["cam_high"]}, 3):
            link.send(pack_openpi({"images": images, "state": seen.state}))
            assert "lacks [" in (reply := link.recv(5)) and "'images/cam_low'" in reply


@pytest.mark.parametrize("names", [
    3, {}, {**keys(ROBOT), "more": "key"}, {**keys(ROBOT), "views": {"front": "a"}}, {**keys(ROBOT), "views": "a"},
    {**keys(ROBOT), "state": {"pose": "a"}}, {**keys(ROBOT), "state": 3},
    {**keys(ROBOT), "prompt": "observation/state"},
])  # fmt: skip
def test_names_that_are_none(names):
    with pytest.raises(ValueError, match="expected a key, each another, for the views"):
        require_names(names, ROBOT)


def test_another_policy_after_a_broken_connection_is_named(server: OpenpiServer):
    class Long(Mean):
        horizon = STEPS + 1

    class Other(Mean):
        robot = replace(ROBOT, robot_hz="10")

    seen = observations(1)
    with OpenpiServer(Mean(), port=0) as same, OpenpiServer(Long(), port=0) as long:
        with OpenpiServer(Other(), port=0) as other, OpenpiServer(Mean(), port=0, names=DROID) as named:
            with OpenpiPolicy(server.address, robot=ROBOT) as policy:
                want = policy.act(seen, [3])
                for made, word in ((long, "horizon: 4 -> 5"), (other, "robot_hz: here 20, saved 10"),
                                   (named, "keys.state.*make a new client")):  # fmt: skip
                    policy.close()
                    policy.address = made.address
                    for _ in range(2):  # also when it is asked again
                        with pytest.raises(ValueError, match=word):
                            policy.act(seen, [3])
                policy.address = same.address
                np.testing.assert_array_equal(policy.act(seen, [3]), want)


GOOD = to_message(observations(1)[0], keys(ROBOT), ROBOT)
BAD = {
    "not msgpack": (b"\xc1", "malformed"),
    "pickle": (pickle.dumps({"a": 1}), "malformed|expected a map"),
    "text": ("hello", "a text frame"),
    "list": (pack_openpi([1]), "expected a map"),
    "empty map": (pack_openpi({}), "lacks .*observation/front.*prompt"),
    "no view": (pack_openpi({k: v for k, v in GOOD.items() if k != "observation/wrist"}), "lacks .*wrist"),
    "shape": (pack_openpi({**GOOD, "observation/front": np.zeros((W, H, 3), np.uint8)}), "'front' of .* is \\(24, 16"),
    "text as a picture": (pack_openpi({**GOOD, "observation/front": "abc"}), "'observation/front'.*str"),
    "words as a picture": (pack_openpi({**GOOD, "observation/front": np.array(["a"])}), "'observation/front'"),
    "no state": (pack_openpi({k: v for k, v in GOOD.items() if "state" not in k}), "lacks .*state"),
    "number as prompt": (pack_openpi({**GOOD, "prompt": 3}), "'prompt'.*expected text"),
    "many values": (b"\xdd\x00\x01\x86\xa0" + b"\x80" * 100_000, "it holds 100001 values or more; expected at most"),
    "seed": (pack_openpi({**GOOD, "seed": -1}), "seed is -1"),
    "long prompt": (pack_openpi({**GOOD, "prompt": "a" * 2001}), "'prompt' .* 2001 characters; expected at most 2000"),
    "fault": (pack_openpi({**GOOD, "prompt": "break"}), "the policy failed: RuntimeError"),
    "nan": (pack_openpi({**GOOD, "prompt": "nan"}), "the policy failed: .*its actions are not finite numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_gets_text_and_the_connection_stays(server: OpenpiServer, name: str):
    import re

    frame, want = BAD[name]
    with connect(server) as link:
        link.recv(5)
        link.send(frame)
        reply = link.recv(5)
        assert isinstance(reply, str) and re.search(want, reply), reply
        link.send(pack_openpi(GOOD))
        assert unpack_openpi(link.recv(5))["actions"].shape == (STEPS, A)


def test_oversized_frames_close_their_connection_only(server: OpenpiServer):
    with connect(server) as link, connect(server) as other:
        link.recv(5), other.recv(5)
        link.send(b"\0" * 200_000)
        with pytest.raises(ConnectionClosed) as closed:
            link.recv(5)
        assert closed.value.rcvd.code == 1009
        other.send(pack_openpi(GOOD))
        assert "actions" in unpack_openpi(other.recv(5))


def test_frames_are_unpacked_in_turn_and_do_not_pile_up(server: OpenpiServer):
    with connect(server) as link, connect(server) as other:
        link.recv(5), other.recv(5)
        with server._turn:
            link.send(b"\xc1")
            with pytest.raises(TimeoutError):
                link.recv(0.2)
        assert "malformed" in link.recv(5)
        for seed in range(6):  # sent ahead: none is lost
            other.send(pack_openpi({**GOOD, "seed": seed}))
        chunks = [unpack_openpi(other.recv(5))["actions"] for _ in range(6)]
        np.testing.assert_allclose(np.diff(chunks, axis=0), 1, atol=1e-4)


@contextmanager
def foreign(metadata: object, reply: object = None) -> Iterator[str]:
    """The address of a server that sends `metadata`, then `reply` to whatever comes."""
    from websockets.sync.server import serve

    def talk(link) -> None:
        link.send(pack_openpi(metadata))
        for _ in link:
            link.send(pack_openpi(reply))

    with serve(talk, "127.0.0.1", 0, compression=None) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{made.socket.getsockname()[1]}"


ODD = {
    "metadata": ([1], None, "as its metadata, sent list; expected a map"),
    "contract": ({"contract": {"name": "arm"}}, None, "describes no robot: KeyError|robot_hz: here 20, saved None"),
    "contract of text": ({"contract": "arm"}, None, "a contract that describes no robot"),
    "horizon": ({"horizon": "long"}, None, "chunks of 'long' steps; expected a whole number"),
    "keys": ({"keys": ["image"]}, None, "as the keys of an observation, sent list; expected a map with views, state"),
    "reply": ({}, [1], "sent list; expected a map with actions"),
    "no actions": ({}, {"action": 1}, r"sent a map of \['action'\]; expected a map with actions"),
    "shape": ({}, {"actions": np.zeros(3)}, r"actions of shape \(3,\)"),
    "words": ({}, {"actions": np.full((STEPS, A), "a")}, "actions of type <U1"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("known", [True, False])
def test_what_another_server_sends_amiss_is_named(name: str, known: bool):
    metadata, reply, want = ODD[name]
    if isinstance(metadata, dict):
        metadata = {"horizon": STEPS, "contract": ROBOT.contract()} | metadata
    with foreign(metadata, reply) as address, pytest.raises(ValueError, match=want):
        with OpenpiPolicy(address, robot=ROBOT if known else None, timeout=5.0) as policy:
            policy.act(observations(1), [0])


def test_health_and_strangers(server: OpenpiServer):
    http = server.address.replace("ws", "http")
    with urllib.request.urlopen(f"{http}/healthz", timeout=5) as answer:
        assert answer.status == 200 and answer.read() == b"OK\n"
    with pytest.raises(InvalidStatus, match="403"):
        connect(server, origin="http://a.page").__enter__()
    with OpenpiServer(Mean(), port=0, clients=1) as small, connect(small) as link:
        link.recv(5)
        with pytest.raises(InvalidStatus, match="503"):
            connect(small).__enter__()


def test_a_key_is_asked_for():
    with OpenpiServer(Mean(), port=0, key="secret") as server:
        with pytest.raises(ValueError, match="401"):
            OpenpiPolicy(server.address, robot=ROBOT)
        for guess in ("guess", "gu\u00e9ss"):
            with pytest.raises(ValueError, match="401"):
                OpenpiPolicy(server.address, robot=ROBOT, key=guess)
        with OpenpiPolicy(server.address, robot=ROBOT, key="secret") as policy:
            assert policy.act(observations(1), [0]).shape == (1, STEPS, A)
        with urllib.request.urlopen(server.address.replace("ws", "http") + "/healthz", timeout=5) as answer:
            assert answer.status == 200


SCRIPT = """
import sys, numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]), api_key="secret")
assert policy.get_server_metadata()["horizon"] == 4
seen = {"observation/front": np.full((16, 24, 3), 3, np.uint8), "observation/wrist": np.full((16, 24, 3), 5, np.uint8),
        "observation/state": np.array([1, 2, 3], np.float32), "prompt": "push", "seed": np.int64(2)}
answer = policy.infer(seen)
want = np.arange(4)[:, None] + np.arange(5) / 10 + 8 + 6 + 4 + 2
np.testing.assert_allclose(answer["actions"], want, rtol=1e-6)
assert answer["actions"].dtype == np.float32 and answer["server_timing"]["infer_ms"] > 0
assert "prev_total_ms" in policy.infer(seen)["server_timing"]
try:
    policy.infer({"prompt": "push"})
except RuntimeError as error:
    assert "lacks" in str(error)
np.testing.assert_allclose(policy.infer(seen)["actions"], want, rtol=1e-6)
"""


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="no environment with openpi-client: `make test-openpi` builds one")
def test_the_published_client():
    with OpenpiServer(Mean(), port=0, key="secret") as server:
        command = [str(PUBLISHED), "-c", SCRIPT, str(server.port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_sizes_differ():
    assert len({H, W, D, A, STEPS}) == 5
