"""One policy for several robots: what each sees, learns and is told, against a policy that knows no other."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamgen.core.manifest import read_json, write_json
from dreamgen.policies.chunks import collate
from dreamgen.policies.palette import PaletteEncoder
from dreamgen.policies.policy import FlowPolicy
from dreamgen.policies.realtime import Ensembled, RealTime
from tests.policies.toy import (
    CRANE_A,
    CRANE_D,
    STEPS,
    A,
    B,
    both,
    crane,
    crane_observations,
    crane_rows,
    encoder,
    observations,
    policy,
    robot,
    toy_rows,
)

ALIGNED = dict(align_weight=0.3, align_layer=2, future_tokens=3)


def palette(views: int = 2) -> PaletteEncoder:
    torch.manual_seed(1)
    return PaletteEncoder(width=20, colours=4, slots=3, hidden=12, views=views, noise=0.0, dropout=0.0)


def alone(model: FlowPolicy, views: int, **changes) -> FlowPolicy:
    """A policy whose only robot is the crane, with the weights of the crane's in `model`, cut out by hand."""
    plain = dict(horizon=STEPS, layers=3, heads=2, head_width=8, draws=2, bodies=["crane"], **changes)
    made = FlowPolicy(**{"robot": crane(views), "encoder": encoder(), **plain})
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith(("encode_state.", "encode_action.", "decode_action.")):
            value = value[2:3]
        if name in ("encode_state.layer1.weight", "encode_action.layer1.weight"):
            value = value[:, : {"encode_state": CRANE_D, "encode_action": CRANE_A}[name.split(".")[0]]]
        if name.startswith("decode_action.layer2"):
            value = value[..., :CRANE_A]
        if name in ("encoder.name", "encoder.std"):
            value = value[: 4 * views]
        if name.startswith("other_normalisers.crane."):
            name = "normalise_" + name.removeprefix("other_normalisers.crane.")
        elif name.startswith("normalise_"):
            continue
        weights[name] = value
    made.load_state_dict(weights)
    return made.eval()


def joined(policy: RealTime | Ensembled, seen: list) -> np.ndarray:
    """A chunk, and three steps later the one that goes on from it."""
    memories: list[dict] = [{} for _ in seen]
    first = policy.act(seen, range(4), memories, 0)
    return np.stack([first, policy.act(seen[::-1], range(9, 13), memories, 3)])


KINDS = {"tiny": {}, "queries": dict(queries=3), "flare": ALIGNED, "palette": dict(encoder=palette)}


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_it_acts_for_each_of_its_robots_as_a_policy_that_has_no_other(tmp_path: Path, kind: str, views: int):
    changes = {key: value() if callable(value) else value for key, value in KINDS[kind].items()}
    model = both(views, prefix=2, **changes).eval()
    toys = model.act(observations(), range(B))
    model.save(tmp_path)
    found = FlowPolicy.load(tmp_path, robot=crane(views))
    assert (found.robot, found.speaks, found.bodies[found.speaks]) == (crane(views), 2, "crane")
    cut = {"encoder": palette(views)} if kind == "palette" else changes
    want, seen = alone(model, views, prefix=2, **cut), crane_observations(4, views)
    chunks = want.act(seen, range(4))
    assert chunks.shape == (4, STEPS, CRANE_A) and np.ptp(chunks[..., 1:]) > 0.1
    np.testing.assert_allclose(found.act(seen, range(4)), chunks, atol=1e-5, rtol=1e-5)
    for mode in ("guided", "trained"):
        rests = list(chunks[:, 2:])
        on = [p.proceed(seen, range(4), rests, delay=2, mode=mode) for p in (found, want)]
        np.testing.assert_allclose(*on, atol=1e-4, rtol=1e-4)
        for wrapped in (partial(RealTime, delay=2, mode=mode), Ensembled):
            made = [joined(wrapped(p), seen) for p in (found, want)]
            np.testing.assert_allclose(*made, atol=1e-4, rtol=1e-4)
            assert np.abs(made[0][1] - found.act(seen[::-1], range(9, 13))).max() > 1e-2  # the last chunk has its part
    np.testing.assert_array_equal(FlowPolicy.load(tmp_path, robot=robot()).act(observations(), range(B)), toys)
    np.testing.assert_array_equal(FlowPolicy.load(tmp_path).act(observations(), range(B)), toys)
    dreamt = FlowPolicy.load(tmp_path, robot=crane(views), speaks="crane_dream")
    assert dreamt.space is dreamt.spaces.of(2) and np.abs(dreamt.act(seen, range(4)) - chunks).max() > 1e-3
    with pytest.raises(ValueError, match="lacks view 'mast_0'"):
        found.act(observations(), range(B))


def test_acting_asks_no_tensor_which_body_acts(monkeypatch):
    """So that it can be compiled as one graph."""
    model, seen = both().eval(), crane_observations(2)
    model.speaks = 2
    want = model.act(seen, [3, 4])
    monkeypatch.delattr(torch.Tensor, "unique")
    np.testing.assert_array_equal(model.act(seen, [3, 4]), want)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("kind", ["tiny", "palette", "features", "queries", "flare", "qformer"])
def test_rows_of_several_robots_are_learned_from_as_if_they_were_alone(monkeypatch, kind: str, views: int):
    """A batch of both is the mean over its rows: those of each robot in a batch apart, of its own views and widths."""
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.3))
    monkeypatch.setattr("dreamgen.policies.policy.sample_time", lambda n, like: torch.full((n,), 0.4))
    seen = dict(encoder=palette()) if kind in ("palette", "features") else {}
    changes = {"queries": dict(queries=3), "flare": ALIGNED, "qformer": dict(ALIGNED, target="qformer")}.get(kind, seen)
    model = both(views, state_dropout=0.0, **changes)
    parts = [toy_rows(4), crane_rows(3, views)]
    if kind == "features":
        model.encoder.fit(*(torch.from_numpy(part["pictures"]) for part in parts))
        for part in parts:
            for key in ("pictures", "future"):
                part[key] = model.encoder.measure(torch.from_numpy(part[key])).numpy()
    words = model.encoder.words
    mixed = model.whole(collate([dict(part) for part in parts], words))
    assert mixed["seen"].tolist() == [part["pictures"].shape[1] for part in parts for _ in part["body"]]
    assert mixed["pictures"].shape[1] == max(part["pictures"].shape[1] for part in parts)

    def gradients(batches: list[dict], shares: list[float]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad(set_to_none=False)
        total = sum(model.loss(batch)[0] * share for batch, share in zip(batches, shares, strict=True))
        total.backward()
        return float(total.detach()), [
            torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()
        ]

    kept = {key: mixed[key] for key in ("row_weight", "row_known")}
    apart = [{**collate([dict(part)], words), **kept} for part in parts]
    assert all("seen" not in batch for batch in apart)
    want, wanted = gradients(apart, [4 / 7, 3 / 7])
    loss, found = gradients([mixed], [1.0])
    assert loss == pytest.approx(want, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(found, wanted, strict=True))
    few = int(np.argmin([part["pictures"].shape[1] for part in parts]))
    rows = slice(0, 4) if few == 0 else slice(4, 7)
    other = {key: value.clone() for key, value in mixed.items()}
    for key in ("pictures", "future"):
        other[key][rows, parts[few]["pictures"].shape[1] :] = 77  # padding is never looked at
    torch.manual_seed(0)
    before = model.loss(mixed)[0]
    assert torch.equal(model.loss(other)[0], before)


def test_a_robot_teaches_the_trunk_and_its_own_body():
    model = both(3, state_dropout=0.0, queries=3)
    data = collate([crane_rows(4, 3)], model.encoder.words)
    model.loss(data)[0].backward()
    for name, p in model.named_parameters():
        if name.startswith(("encode_state.", "encode_action.", "decode_action.")):
            assert p.grad[2].abs().sum() > 0 and p.grad[[0, 1, 3]].abs().sum() == 0, name
        elif name.startswith(("dit.", "queries.", "encoder.", "position")):
            assert p.grad.abs().sum() > 0, name
    assert model.decode_action.layer2.weight.grad[2, :, :CRANE_A].abs().sum(0).min() > 0
    assert model.decode_action.layer2.weight.grad[2, :, CRANE_A:].abs().sum() == 0
    assert model.spaces.action_dim == A and model.spaces.state_dim == CRANE_D


def test_statistics_are_those_of_a_robot_whichever_of_its_bodies_it_is():
    model = both()
    assert model.spaces.of(2) is model.spaces.of(3) and model.spaces.of(0) is model.spaces.of(1)
    action = torch.randn(3, STEPS, CRANE_A) * 2 + 5
    wide = torch.nn.functional.pad(action, (0, A - CRANE_A))
    x = model.spaces.chunk(wide, torch.zeros(3, CRANE_D), torch.tensor([2, 3, 2]))
    std = model.other_normalisers["crane"]["action"].denormalise(x[..., :CRANE_A].flatten(1)).view_as(action)
    torch.testing.assert_close(std, action) and (x[..., CRANE_A:] == 0).all()


def test_who_asks_for_another_robot_is_told_which_there_are(tmp_path: Path):
    both().save(tmp_path)
    told = "It knows the robots 'toy' [(]real, dream[)], 'crane' [(]crane, crane_dream[)]"
    with pytest.raises(ValueError, match=rf"robot_hz: here 60, saved 20(.|\n)*{told}"):
        FlowPolicy.load(tmp_path, robot=replace(crane(), robot_hz="60"))
    with pytest.raises(ValueError, match=rf"as the body 'crane',(.|\n)*name: here toy, saved crane(.|\n)*{told}"):
        FlowPolicy.load(tmp_path, robot=robot(), speaks="crane")
    with pytest.raises(ValueError, match="no embodiment 'gripper'; it has"):
        FlowPolicy.load(tmp_path, robot=robot(), speaks="gripper")
    assert FlowPolicy.load(tmp_path, speaks="crane_dream").robot == crane()
    policy().save(tmp_path / "one")
    with pytest.raises(ValueError) as error:
        FlowPolicy.load(tmp_path / "one", robot=crane())
    assert "It knows" not in str(error.value)


def test_a_policy_keeps_the_robot_that_it_was_saved_to_act_for(tmp_path: Path):
    both(speaks="crane_dream").save(tmp_path)
    assert FlowPolicy.load(tmp_path).speaks == FlowPolicy.load(tmp_path, robot=crane()).speaks == 3
    assert FlowPolicy.load(tmp_path, robot=robot()).speaks == 0
    FlowPolicy.load(tmp_path, robot=robot()).save(tmp_path / "again")
    assert FlowPolicy.load(tmp_path / "again").robot == robot()
    assert FlowPolicy.load(tmp_path / "again", robot=crane()).speaks == 2


def test_contracts_of_all_robots_are_saved_and_older_policies_load(tmp_path: Path):
    model = both().eval()
    model.save(tmp_path)
    contract, config = (read_json(tmp_path / f"{name}.json") for name in ("contract", "config"))
    others = contract.pop("others")
    assert robot().mismatches(contract) == [] and crane().mismatches(others["crane"]) == []
    assert others["crane_dream"] == "crane" and "robots" not in config
    old = {"latent": json.loads(json.dumps(crane().contract()))}  # as a latent body was saved until 0.12
    older = policy(bodies=["real", "latent"], robots=old).eval()
    older.save(tmp_path / "old")
    contract, config = (read_json(tmp_path / "old" / f"{name}.json") for name in ("contract", "config"))
    write_json(tmp_path / "old/config.json", {**config, "robots": contract.pop("others")})
    write_json(tmp_path / "old/contract.json", contract)
    found = FlowPolicy.load(tmp_path / "old", robot=robot())
    np.testing.assert_array_equal(found.act(observations(), range(B)), older.act(observations(), range(B)))
    assert found.config == older.config and found.spaces.of(1).robot == crane()
