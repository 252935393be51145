"""Many policies are compared by what one of them needs: of room on the accelerator, and of simulators."""

import numpy as np
import torch
from torch import nn

from dreamgen.core.manifest import read_json
from dreamgen.engine import precision
from dreamgen.policies.degraded import Noisy
from dreamgen.stages.correlation import correlation
from tests.sims.point import ROBOT, Point, Steady
from tests.stages.test_correlation import OPTIONS, Column


class Heavy(nn.Module):
    """Says where it is moved, and acts there alone."""

    robot, horizon = ROBOT, 3

    def __init__(self, name: str, moves: list[tuple[str, str]]) -> None:
        super().__init__()
        self.name, self.moves = name, moves

    def to(self, device: torch.device | str) -> "Heavy":
        if self.moves[-1:] != [(self.name, str(device))]:
            self.moves.append((self.name, str(device)))
        return self

    def act(self, observations, seeds) -> np.ndarray:
        assert self.moves[-1] == (self.name, "cuda")
        return Steady(0.3).act(observations, seeds)


def test_a_policy_leaves_the_accelerator_after_its_turn(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(precision, "best_device", lambda: torch.device("cuda"))
    moves: list[tuple[str, str]] = []
    policies = {"a": Heavy("a", moves), "b": Noisy(policy=Heavy("b", moves), size=0.1)}
    correlation(None, Column(), Point, policies, out=tmp_path, video_hz=5, **OPTIONS)
    assert moves == [("a", "cuda"), ("a", "cpu"), ("b", "cuda"), ("b", "cpu")]


def test_the_films_of_a_policy_are_made_in_one_simulator(tmp_path) -> None:
    class Counted(Point):
        def __init__(self) -> None:
            made.append(self)

        def close(self) -> None:
            super().close()
            held.append(self)

    counts = []
    for films in (1, 4):
        made, held = [], []
        two = {"slow": Steady(0.2), "fast": Steady(0.6)}
        correlation(None, Column(), Counted, two, out=tmp_path / str(films), video_hz=5, **OPTIONS | {"films": films})
        assert len(made) == len(held) and len(list((tmp_path / str(films) / "films").rglob("*.mp4"))) == 2 * films
        counts.append(len(made))
    assert counts[0] == counts[1]


def test_policies_that_the_world_model_knows_change_nothing_for_the_others(tmp_path) -> None:
    others = {f"p{k}": Noisy(policy=Steady(speed), size=0.4) for k, speed in enumerate((0.1, 0.3, 0.5))}
    every, seen, found = others | {"k0": Steady(0.2), "k1": Noisy(policy=Steady(0.4), size=0.4)}, ["k0", "k1"], []
    for name, policies in (("alone", others), ("beside", every)):
        demos = {one: number for number, one in enumerate(policies)}
        made = correlation(None, Column(lenient=1), Point, policies, out=tmp_path / name, demos=demos,
                           seen=seen if policies is every else [], video_hz=5, **OPTIONS)  # fmt: skip
        found.append(made["results"]["correlation"])
    rows = [{one: read_json(tmp_path / name / "policies" / f"{one}.json") for one in others}
            for name in ("alone", "beside")]  # fmt: skip
    assert rows[0] == rows[1] and 0 < np.mean([row["real"] for row in rows[0].values()]) < 1
    assert found[1].pop("seen")["k"] == 2 and {found[1]["policies"].pop(one)["seen"] for one in seen} == {True}
    assert found[0] == found[1] and found[0]["mae"] > 0
