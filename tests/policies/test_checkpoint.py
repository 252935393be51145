"""Where a policy computes, and with which settings a saved one acts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dreamgen.engine import precision
from dreamgen.engine.precision import place
from dreamgen.policies.degraded import Noisy
from dreamgen.policies.policy import FlowPolicy
from dreamgen.policies.realtime import Ensembled, RealTime
from tests.policies.toy import B, observations, policy


@pytest.mark.parametrize("around", [lambda p: p, lambda p: RealTime(p, delay=1),
                                    lambda p: Ensembled(Noisy(policy=p, size=0.1))])  # fmt: skip
def test_a_policy_goes_to_the_accelerator_also_inside_of_another(monkeypatch, around):
    monkeypatch.setattr(precision, "best_device", lambda: torch.device("meta"))
    inside = policy()
    outside = around(inside)
    assert {p.device.type for p in inside.parameters()} == {"cpu"}
    place(outside)
    assert {p.device.type for p in [*inside.parameters(), *inside.buffers()]} == {"meta"}


def test_what_is_no_module_stays(monkeypatch):
    monkeypatch.setattr(precision, "best_device", lambda: torch.device("meta"))
    placed = []

    class Knowing(torch.nn.Linear):
        def place(self):
            placed.append("itself")

    knowing = Knowing(1, 1)
    place(object(), None, knowing)
    assert placed == ["itself"] and knowing.weight.device.type == "cpu"


def test_settings_of_acting_change_and_none_leaves_what_was_saved(tmp_path: Path):
    saved = policy(euler_steps=3).eval()
    saved.save(tmp_path)
    same = FlowPolicy.load(tmp_path, euler_steps=None, compile=None, speaks=None)
    other = FlowPolicy.load(tmp_path, euler_steps=1)
    a, b, c = (p.act(observations(), range(B)) for p in (saved, same, other))
    np.testing.assert_array_equal(a, b)
    assert same.euler_steps == 3 and np.abs(a - c).max() > 1e-3
    with pytest.raises(ValueError, match="euler_steps is 0, draws 2; expected 1 or more"):
        FlowPolicy.load(tmp_path, euler_steps=0)
    with pytest.raises(ValueError, match="euler_steps is 4, draws 0; expected 1 or more"):
        policy(draws=0)
