"""The regression that comes before flow matching: what it learns, what it leaves alone, that it is resumed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreamgen.core.embodiment import Part
from dreamgen.policies.palette import PaletteEncoder
from dreamgen.policies.policy import FlowPolicy
from dreamgen.policies.regression import Regression, begin
from tests.policies.toy import STEPS, A, B, batch, policy, robot
from tests.stages.test_policy_stages import HORIZON, ROBOT, folder, run  # noqa: F401 (a fixture)

AWAY = ("readout", "foresee")  # what is thrown away
FLARE = dict(align_weight=0.2, align_layer=2, future_tokens=3)


def summarising(**changes) -> FlowPolicy:
    return policy(**{"encoder": PaletteEncoder(width=20, colours=4, slots=3, hidden=12, views=2), **changes})


def first(model: FlowPolicy, seed: int = 5) -> Regression:
    torch.manual_seed(seed)
    return Regression(model)


def test_the_loss_is_the_distance_to_the_chunk(monkeypatch):
    model, data = summarising(), batch()
    learner = first(model).eval()
    x = model.space.chunk(data["action"])
    monkeypatch.setattr(learner.readout, "forward", lambda plan, body: x + 0.5)
    assert learner.loss(data)[0].item() == pytest.approx(0.25, abs=1e-6)
    data["weight"][0], data["weight"][1:] = 3.0, 0.0
    assert learner.loss(data)[0].item() == pytest.approx(0.25, abs=1e-6)
    monkeypatch.setattr(learner.readout, "forward", lambda plan, body: torch.where(torch.arange(B)[:, None, None] > 0,
                                                                                   x + 9, x))  # fmt: skip
    assert learner.loss(data)[0].item() == pytest.approx(0, abs=1e-6)


def test_steps_that_do_not_exist_have_no_influence():
    model, data = summarising(), batch()
    learner, other = first(model).eval(), {key: value.clone() for key, value in data.items()}
    other["action"][1, 4:] = 99.0
    other["state"][3] = float("nan")
    assert torch.equal(learner.loss(data)[0], learner.loss(other)[0])
    other["action"][1, 3] += 1
    assert not torch.equal(learner.loss(data)[0], learner.loss(other)[0])


def test_it_learns_what_leads_to_the_plan_and_nothing_else():
    model = summarising(**FLARE)
    learner = first(model)
    learner.loss(batch())[0].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    rooms = {name.split(".")[0] for name in reached}
    assert rooms == {"encoder", "encode_state", "direct", "unknown_state", "position"}
    shared = {id(p) for p in model.parameters()}
    assert all(id(p) in shared for name, p in learner.named_parameters() if not name.startswith(AWAY))


def test_with_flare_the_plan_foresees_also_where_no_action_is_known():
    model, data = summarising(**FLARE, state_dropout=0.0), batch()
    learner = first(model)
    total, metrics = learner.loss(data)
    assert torch.equal(total, metrics["regression"] + 0.2 * metrics["align"])
    data["valid"][:], data["future_known"][:] = False, True
    total, metrics = learner.loss(data)
    assert metrics["regression"] == 0 and torch.equal(total, 0.2 * metrics["align"])
    total.backward()
    reached = {name.split(".")[0] for name, p in learner.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"encoder", "direct", "foresee"} <= reached and "readout" not in reached and "flare" not in reached
    aim = model.flare.aim(data)
    learner.foresee.forward = lambda plan: 3 * aim
    assert learner.loss(data)[1]["align"].abs() < 1e-5
    plain = summarising(state_dropout=0.0)
    assert first(plain).foresee is None and set(first(plain).loss(batch())[1]) == {"regression"}


def test_a_narrower_body_is_compared_where_it_has_entries():
    latent = dataclasses.replace(robot(), name="latent", action=(Part(name="latent", start=0, stop=2),))
    model = summarising(bodies=["real", "latent"], robots={"latent": latent})
    data = batch()
    data["body"] = torch.ones_like(data["body"])
    data["action"][..., 2:] = 0
    learner = first(model).eval()
    full = learner.loss(data)[0]
    data["action"] = torch.cat([data["action"][..., :2], 7 * torch.ones(B, STEPS, A - 2)], -1)
    assert torch.equal(learner.loss(data)[0], full)


@pytest.mark.parametrize(("target", "share"), [("frozen", 0.0), ("ema", 0.25)])
def test_targets_of_flare_follow_in_the_regression_as_they_do_later(target, share):
    model = summarising(**FLARE, target=target, target_decay=0.75)
    before = model.flare.target.name.clone()
    with torch.no_grad():
        model.encoder.name.add_(1)
    first(model).after_step()
    torch.testing.assert_close(model.flare.target.name, before + share)
    assert not any(p.requires_grad for p in model.flare.target.parameters())


def test_an_encoder_without_a_summary_is_refused():
    with pytest.raises(ValueError, match="regression_steps needs an encoder that summarises.*regression_steps=0"):
        Regression(policy())


def tiny(**changes) -> FlowPolicy:
    encoder = PaletteEncoder(width=24, colours=3, slots=3, hidden=12)
    return FlowPolicy(robot=ROBOT, encoder=encoder, horizon=HORIZON, layers=2, heads=2, head_width=12, **changes)


def test_a_run_killed_in_either_part_ends_in_the_same_bits(folder: Path, tmp_path: Path, monkeypatch):  # noqa: F811
    options = dict(policy=tiny, regression_steps=6, checkpoint_every=2)
    found = run(folder, tmp_path / "whole", **options)["results"]
    assert found["regression"]["steps"] == 6 and found["steps"] == 6
    want = FlowPolicy.load(tmp_path / "whole", robot=ROBOT).state_dict()
    fresh = run(folder, tmp_path / "without", policy=tiny)
    assert "regression" not in fresh["results"]

    class Killed(Exception):
        pass

    for cls, after in ((Regression, 3), (FlowPolicy, 5)):
        calls, loss = [], cls.loss

        def counted(self, batch, calls=calls, loss=loss, after=after):
            calls.append(1)
            if len(calls) > after:
                raise Killed
            return loss(self, batch)

        out = tmp_path / cls.__name__
        with monkeypatch.context() as patch:
            patch.setattr(cls, "loss", counted)
            with pytest.raises(Killed):
                run(folder, out, **options)
        run(folder, out, **options)
        got = FlowPolicy.load(out, robot=ROBOT).state_dict()
        assert all(torch.equal(got[name], want[name]) for name in want)
        rows = [json.loads(line)["step"] for line in (out / "regression/losses.jsonl").read_text().splitlines()]
        assert rows == sorted(set(rows)) and not (out / "regression/training").exists()


def test_a_loss_that_is_not_finite_names_a_start_and_training_begins_there(folder: Path, tmp_path: Path, monkeypatch):  # noqa: F811
    flare = dict(**FLARE, target="frozen")
    options = dict(policy=lambda: tiny(**flare), regression_steps=6, checkpoint_every=2)
    calls, loss = [], Regression.loss

    def bad(self, batch):
        calls.append(1)
        found, metrics = loss(self, batch)
        return found * (float("nan") if len(calls) > 3 else 1.0), metrics

    out = tmp_path / "bad"
    with monkeypatch.context() as patch:
        patch.setattr(Regression, "loss", bad)
        with pytest.raises(ValueError, match="regression: the loss is nan at step 3.*that of step 3") as said:
            run(folder, out, **options)
    assert f"(stage.start={out} begins with its weights)" in str(said.value)

    begin(begun := tiny(**flare), out)
    kept = out / "regression/training/step_00000003"
    for name, value in (load_file(kept / "model.safetensors") | load_file(kept / "buffers.safetensors")).items():
        if not name.startswith(AWAY):
            assert torch.equal(begun.state_dict()[name], value), name
    assert torch.equal(begun.flare.target.palette, begun.encoder.palette)
    assert not torch.equal(begun.flare.target.name, begun.encoder.name)
    run(folder, tmp_path / "whole", **options)
    want = FlowPolicy.load(tmp_path / "whole", robot=ROBOT).state_dict()
    for name in ("normalise_state.offset", "normalise_action.scale", "encoder.palette"):
        assert torch.equal(begun.state_dict()[name], want[name]), name
    run(folder, tmp_path / "still", start=out, **options | {"lr": 0.0, "regression_lr": 0.0})
    still = FlowPolicy.load(tmp_path / "still", robot=ROBOT).state_dict()
    names = [name for name in load_file(kept / "model.safetensors") if not name.startswith(AWAY)]
    assert names and all(torch.allclose(still[name], begun.state_dict()[name], atol=1e-6) for name in names)
    assert not all(torch.allclose(want[name], begun.state_dict()[name], atol=1e-6) for name in names)
