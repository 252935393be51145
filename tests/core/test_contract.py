"""The contract between data and use: every field that differs is named, on load, in evaluation and in serving."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate

from dreamgen.core.embodiment import Embodiment, Part, View
from jobs.recipe import load
from tests.data.conftest import untyped  # noqa: F401

CONF = Path(__file__).parents[2] / "conf"
FRONT = View(name="front", key="observation.images.front", height=16, width=24, orientation="upright")
WRIST = View(name="wrist", key="observation.images.wrist", height=16, width=24)
STATE = (Part(name="hand", start=0, stop=3, unit="m"), Part(name="opening", start=3, stop=4))
MOVE = Part(name="move", start=0, stop=3, kind="delta", unit="1", scale=0.04, moves="hand", limits=(-1, 1))
GRIP = Part(name="grip", start=3, stop=4, kind="binary", moves="opening", limits=(-1, 1), positive="closes",
            sets=(1, 0), travel=0.25)  # fmt: skip
ROBOT = Embodiment(name="arm", robot_hz="20", views=(FRONT, WRIST), state=STATE, action=(MOVE, GRIP))


def other(**changes) -> Embodiment:
    return replace(ROBOT, **changes)


def view(**changes) -> Embodiment:
    both = [replace(v, **changes) if v.name == "front" or "height" in changes or "width" in changes else v
            for v in ROBOT.views]  # fmt: skip
    return replace(ROBOT, views=both, grid=())


def state(**changes) -> Embodiment:
    return replace(ROBOT, state=(replace(STATE[0], **changes), STATE[1]))


def action(**changes) -> Embodiment:
    return replace(ROBOT, action=(replace(MOVE, **changes), GRIP))


def grip(**changes) -> Embodiment:
    return replace(ROBOT, action=(MOVE, replace(GRIP, **changes)))


MISMATCHES = {
    "name": (other(name="leg"), "name: here leg, saved arm"),
    "rate": (other(robot_hz="50/3"), "robot_hz: here 50/3, saved 20"),
    "a view less": (other(views=(FRONT,), grid=()), "views 'wrist': here None, saved"),
    "another view": (other(views=(FRONT, replace(WRIST, name="side")), grid=()), "views 'side': here {"),
    "camera key": (view(key="observation.images.top"), "views 'front': key here 'observation.images.top', saved"),
    "orientation": (view(orientation="flipped"), "views 'front': orientation here 'flipped', saved 'upright'"),
    "unsaid is upright": (other(views=(FRONT, replace(WRIST, orientation="mirrored"))),
                          "views 'wrist': orientation here 'mirrored', saved 'upright'"),
    "fit": (view(fit="pad"), "views 'front': fit here 'pad', saved 'squeeze'"),
    "height": (view(height=32), "views 'front': height here 32, saved 16"),
    "width": (view(width=32), "views 'wrist': width here 32, saved 24"),
    "tiling": (other(grid=(("front",), ("wrist",))), "grid: here \\[\\['front'\\], \\['wrist'\\]\\], saved"),
    "state key": (other(state_key="state"), "state_key: here state, saved observation.state"),
    "action key": (other(action_key="act"), "action_key: here act, saved action"),
    "state unit": (state(unit="mm"), "state 'hand': unit here 'mm', saved 'm'"),
    "state frame": (state(frame="world"), "state 'hand': frame here 'world', saved 'base'"),
    "order of parts": (other(state=(replace(STATE[1], start=0, stop=1), replace(STATE[0], start=1, stop=4))),
                       "state: order here \\['opening', 'hand'\\], saved"),
    "delta or absolute": (action(kind="absolute"), "action 'move': kind here 'absolute', saved 'delta'"),
    "action unit": (action(unit="m"), "action 'move': unit here 'm', saved '1'"),
    "action scale": (action(scale=0.05), "action 'move': scale here 0.05, saved 0.04"),
    "what it moves": (action(moves=None), "action 'move': moves here None, saved 'hand'"),
    "limits": (action(limits=(-2, 2)), "action 'move': limits here \\[-2.0, 2.0\\], saved \\[-1.0, 1.0\\]"),
    "gripper sign": (grip(positive="opens"), "action 'grip': positive here 'opens', saved 'closes'"),
    "gripper kinematics": (grip(sets=(0, 1)), "action 'grip': sets here \\[0.0, 1.0\\], saved \\[1.0, 0.0\\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISMATCHES)
def test_every_difference_is_named(name: str) -> None:
    made, message = MISMATCHES[name]
    saved = json.loads(json.dumps(ROBOT.contract()))
    with pytest.raises(ValueError, match=message) as raised:
        made.require(saved, "the dataset there")
    assert "the dataset there was made for another robot" in str(raised.value)
    assert made.mismatches(json.loads(json.dumps(made.contract()))) == []


def test_what_an_older_contract_does_not_tell_is_no_difference_but_is_said(caplog: pytest.LogCaptureFixture) -> None:
    saved = json.loads(json.dumps(ROBOT.contract()))
    ROBOT.require(saved, "the dataset there")
    assert not caplog.records
    saved["views"][0].pop("orientation")
    saved["action"][1].pop("positive")
    ROBOT.require(saved, "the dataset there")  # `sets` tells the sign
    saved["action"][1].pop("sets")
    assert ROBOT.mismatches(saved) == []
    ROBOT.require(saved, "the dataset there")
    older = Embodiment.from_contract(saved)  # and it does not make up what it was not told
    assert json.loads(json.dumps(older.contract())) == saved
    older.require(saved, "its own")  # from one file: nothing was to compare
    front, sign = "compared: the orientation of view 'front'", "what high values of action 'grip' do (positive)"
    assert [record.getMessage().endswith(front) for record in caplog.records] == [True, False]
    assert all(record.getMessage().endswith(f"{front}, {sign}") for record in caplog.records[1:])
    assert caplog.records[1].getMessage().startswith("the dataset there and embodiment 'arm' do not both tell")
    assert ROBOT.contract()["views"][1]["orientation"] == "upright"  # the default is told
    assert Embodiment.from_contract(json.loads(json.dumps(ROBOT.contract()))) == ROBOT


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "embodiment").glob("*.yaml")))
def test_shipped_robots_tell_the_sign_of_their_grippers(option: str) -> None:
    robot = instantiate(load("collect", [f"embodiment={option}"])[0].embodiment, _convert_="all")
    assert robot.untold(robot.contract()) == []
    signed = [part for part in robot.action if part.positive]
    assert signed and all(part.positive for part in robot.action if part.kind == "binary")
    for part in signed:
        swapped = tuple(replace(p, positive="opens") if p is part else p for p in robot.action)
        with pytest.raises(ValueError, match=f"action '{part.name}': positive here 'opens', saved 'closes'"):
            replace(robot, action=swapped).require(robot.contract(), "the dataset there")


def test_the_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="orientation 'sideways'; expected one of upright, rotated"):
        replace(FRONT, orientation="sideways")
    with pytest.raises(ValueError, match="fit 'stretch'; expected one of squeeze, crop, pad"):
        replace(FRONT, fit="stretch")


def test_plain_maps_are_taken_and_wrong_ones_explained(untyped) -> None:  # noqa: F811
    plain = json.loads(json.dumps(ROBOT.contract()))
    assert Embodiment(**plain) == ROBOT
    with pytest.raises(ValueError, match="view 'front' got an unexpected .* 'hight'; a view has name, key"):
        Embodiment(**plain | {"views": [{"name": "front", "key": "front", "hight": 3}]})
    with pytest.raises(ValueError, match="part 'move' missing 1 required .*: 'stop'; a part has name"):
        Embodiment(**plain | {"action": [{"name": "move", "start": 0}]})
    lens = {"focal": [1, 1], "position": [0, 0, 0], "rotation": [1, 0, 0, 0, 1, 0, 0, 0, 1]}
    seen = Embodiment(**plain | {"views": [{**plain["views"][0], "camera": lens}], "grid": []})
    assert seen.views[0].camera is not None and seen.views[0].camera.focal == (1, 1)
    assert Embodiment.from_contract(json.loads(json.dumps(seen.contract()))) == seen


def test_a_command_without_its_two_values_is_refused() -> None:
    with pytest.raises(ValueError, match="binary action part 'grip' of embodiment 'arm' has no limits; give"):
        grip(limits=None)


def test_two_of_one_name_are_refused() -> None:
    """Elsewhere they are told apart by it."""
    with pytest.raises(ValueError, match="two action parts are named 'move'; give each a name of its own"):
        replace(ROBOT, action=(ROBOT.action[0], replace(ROBOT.action[1], name="move")))
    with pytest.raises(ValueError, match="two views are named 'front'"):
        replace(ROBOT, views=(FRONT, replace(FRONT, key="observation.images.other")), grid=())


def test_a_contract_without_a_fit_squeezes() -> None:
    assert "fit" not in json.dumps(ROBOT.contract())
    padded = view(fit="pad")
    saved = json.loads(json.dumps(padded.contract()))
    assert saved["views"][0]["fit"] == "pad" and Embodiment.from_contract(saved) == padded
    with pytest.raises(ValueError, match="views 'front': fit here 'squeeze', saved 'pad'"):
        ROBOT.require(saved, "the dataset there")


class Still:
    """A policy of this robot that does nothing."""

    robot, horizon = ROBOT, 2

    def act(self, observations, seeds) -> np.ndarray:
        return np.zeros((len(observations), 2, 4), np.float32)


def test_it_is_checked_in_evaluation_and_in_serving(tmp_path: Path) -> None:
    from dreamgen.sims.rollout import rollout

    made, message = MISMATCHES["gripper sign"]

    class World:
        robot = made

        def close(self) -> None:
            pass

    with pytest.raises(ValueError, match=message):
        list(rollout(World, Still(), [("go", 1)], steps=2, execute=2))
    pytest.importorskip("websockets")
    from dreamgen.serve.clients import OpenpiPolicy
    from dreamgen.serve.openpi import OpenpiServer

    with OpenpiServer(Still(), port=0) as server, pytest.raises(ValueError, match=message):
        OpenpiPolicy(server.address, robot=made)
