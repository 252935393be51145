"""Evaluations that are killed go on, to the bit; policies compute on the accelerator, if there is one."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dreamgen.core.manifest import fingerprint
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.engine import precision
from dreamgen.serve.clients import OpenpiPolicy
from dreamgen.serve.openpi import OpenpiServer
from dreamgen.stages.evaluate import evaluate
from dreamgen.stages.evaluate_open_loop import evaluate_open_loop
from tests.sims.point import Point, Walker
from tests.stages.test_policy_stages import HORIZON, ROBOT, Oracle, episodes
from tests.stages.test_policy_stages import Point as Line


class Killed(Exception):
    pass


class Mortal(Walker):
    """Is asked `most` times, then ends its run."""

    def __init__(self, most: int = 10**6) -> None:
        self.asked, self.most = 0, most

    def act(self, observations, seeds):
        self.asked += 1
        if self.asked > self.most:
            raise Killed
        return super().act(observations, seeds)


class Fatal(Walker):
    """Its process is killed, as by a kernel that is out of memory, when it hears the second instruction."""

    def act(self, observations, seeds):
        if any(seen.instruction == "away" for seen in observations):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().act(observations, seeds)


def run(out: Path, policy, **options) -> dict:
    """10 episodes each of "home" and "away": groups of 8, 8 and 4, of which the first hears "home" alone."""
    return evaluate(policy, Point, out=out, episodes=20, steps=6, execute=2, films=2, seed=3, record={}, **options)


def made(out: Path) -> tuple:
    films = {path.name: path.read_bytes() for path in (out / "failures").iterdir()}
    return (out / "episodes.json").read_text(), json.loads((out / "manifest.json").read_text())["results"], films


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[tuple, int]:
    """What an evaluation makes that nothing disturbs, and how often it asks its policy."""
    out, policy = tmp_path_factory.mktemp("whole") / "e", Mortal()
    run(out, policy)
    assert not (out / "parts").exists()
    return made(out), policy.asked


@pytest.mark.parametrize(("most", "stored", "workers"), [(2, 0, 1), (3, 1, 1), (6, 2, 1), (3, 1, 2)])
def test_a_killed_evaluation_goes_on(tmp_path: Path, whole, most: int, stored: int, workers: int):
    with pytest.raises(Killed):
        run(tmp_path, Mortal(most))
    assert len(list((tmp_path / "parts").glob("*.npz"))) == stored and not (tmp_path / "episodes.json").exists()
    policy = Mortal()
    run(tmp_path, policy, workers=workers)
    assert made(tmp_path) == whole[0] and not (tmp_path / "parts").exists()
    if workers == 1:  # what is stored is not asked for again; a group is three chunks
        assert policy.asked == whole[1] - 3 * stored
    assert run(tmp_path, Mortal(0))["results"] == whole[0][1]


def test_a_worker_that_is_killed(tmp_path: Path, whole):
    with pytest.raises(ValueError, match="a worker process was killed"):
        run(tmp_path, Fatal(), workers=2)
    run(tmp_path, Walker(), workers=2)
    assert made(tmp_path) == whole[0]


def test_what_another_has_none_of_is_said_before_the_first_episode(tmp_path: Path):
    run(tmp_path / "a", Walker())
    other = dict(out=tmp_path / "b", episodes=20, steps=6, execute=2, films=0, seed=4)
    with pytest.raises(ValueError, match="a has none of these episodes; evaluate both with the same seed"):
        evaluate(Mortal(0), Point, against=tmp_path / "a", record={}, **other)
    assert not (tmp_path / "b/parts").exists()
    assert evaluate(Walker(), Point, record={"against": None}, **other)["results"]["success"]["n"] == 20  # not locked


def test_episodes_of_another_simulator_or_length_are_not_compared(tmp_path: Path):
    """Their seeds are the same, and so would be the names of their episodes."""
    options = dict(episodes=4, execute=2, films=0, seed=3)
    told = {"sim": {"_target_": "Point"}, "steps": 6}
    evaluate(Walker(), Point, out=tmp_path / "a", steps=6, record=told, **options)
    for other, text in (({"steps": 9}, "steps: 6 -> 9"), ({"sim": {"_target_": "Other"}}, "'Point' -> 'Other'")):
        with pytest.raises(ValueError, match=f"stage.against, .*a, is of other settings .*{text}"):
            evaluate(Mortal(0), Point, out=tmp_path / "b", against=tmp_path / "a", steps=other.get("steps", 6),
                     record=told | other, **options)  # fmt: skip
    found = evaluate(Walker(), Point, out=tmp_path / "c", against=tmp_path / "a", steps=6,
                     record=told | {"execute": 3}, **options | {"execute": 3})  # fmt: skip
    assert found["results"]["against"]["n"] == 4


class Named(Walker):
    """Was opened from a folder."""

    def __init__(self, path: Path | None, text: str = "") -> None:
        self.path = path
        if path is not None:
            path.mkdir()
            (path / "config.json").write_text(text)


def test_policies_behind_one_address_are_told_apart(tmp_path: Path, caplog):
    pytest.importorskip("websockets")
    one, other = Named(tmp_path / "one", "1"), Named(tmp_path / "other", "2")
    with OpenpiServer(one, port=0) as server, OpenpiPolicy(server.address, robot=Walker.robot) as policy:
        made = run(tmp_path / "e", policy)
        named = made["config"]["served"]["policy"]
        assert made["results"] == run(tmp_path / "f", Walker())["results"] and named == fingerprint(tmp_path / "one")
    with OpenpiServer(other, port=server.port) as server, OpenpiPolicy(server.address, robot=Walker.robot) as policy:
        with pytest.raises(ValueError, match=rf"another configuration \(config.served.policy: '{named}' -> "):
            run(tmp_path / "e", policy)
    assert "does not say" not in caplog.text
    with OpenpiServer(Named(None), port=0) as server, OpenpiPolicy(server.address, robot=Walker.robot) as policy:
        run(tmp_path / "g", policy)
    assert caplog.text.count(f"{server.address} does not say which policy it serves") == 1


class Heavy(nn.Module):
    """Says where its weights lie when it is asked."""

    robot, horizon = ROBOT, HORIZON

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.places = nn.Parameter(torch.zeros(3)), set()

    def act(self, observations, seeds) -> np.ndarray:
        self.places.add(self.weight.device.type)
        return Oracle().act(observations, seeds)


def test_policies_compute_on_the_accelerator(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(precision, "best_device", lambda: torch.device("meta"))
    write_dataset(tmp_path / "data", episodes(2, 1), ROBOT)
    closed, open_ = Heavy(), Heavy()
    evaluate(closed, Line, out=tmp_path / "e", episodes=2, steps=8, films=0, execute=3, record={})
    evaluate_open_loop(open_, Dataset(tmp_path / "data", ROBOT), out=tmp_path / "o", record={})
    assert closed.places == open_.places == {"meta"}
