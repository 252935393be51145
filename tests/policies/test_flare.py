"""FLARE: off without a trace, gradients where they belong, a target that follows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dreamgen.engine.train import train
from dreamgen.policies.inference import integrate
from dreamgen.policies.palette import PaletteEncoder
from dreamgen.policies.policy import FlowPolicy
from tests.policies.toy import B, batch, loss, observations, policy

ON = dict(align_weight=0.3, align_layer=2, future_tokens=3)


def test_lambda_zero_equals_the_plain_policy_to_the_bit():
    plain, off = policy(), policy(align_weight=0.0, align_layer=2, future_tokens=3, target="frozen")
    assert plain.state_dict().keys() == off.state_dict().keys()
    a, b = loss(plain, batch()), loss(off, batch())
    assert torch.equal(a, b)
    a.backward(), b.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), off.parameters(), strict=True))
    assert (plain.act(observations(), range(B)) == off.act(observations(), range(B))).all()


def test_rows_without_actions_train_by_alignment_alone():
    model, data = policy(**ON, state_dropout=0.0), batch()
    data["valid"][:] = False
    data["future_known"][:] = True
    total, metrics = model.loss(data)
    assert metrics["flow"] == 0 and torch.equal(total, 0.3 * metrics["align"])
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    reached = {name.split(".")[0] for name, g in grads.items() if g is not None and g.abs().sum() > 0}
    assert {"encoder", "flare", "dit"} <= reached
    assert all(g is None or g.abs().sum() == 0 for name, g in grads.items() if name.startswith("decode_action"))
    assert all(g is None or g.abs().sum() == 0 for name, g in grads.items() if name.startswith("dit.blocks.2"))
    assert not any(name.startswith("flare.target") for name in grads)  # the target is never trained


def test_unknown_futures_have_no_influence():
    model, data = policy(**ON).eval(), batch()
    other = dict(data, future=data["future"].clone())
    other["future"][2] = 0
    assert torch.equal(loss(model, data), loss(model, other))
    other["future"][1] = 0
    assert not torch.equal(loss(model, data), loss(model, other))


def test_the_target_follows_the_encoder():
    model = policy(**ON, target_decay=0.75)
    before = model.flare.target.heat.weight.clone()
    with torch.no_grad():
        model.encoder.heat.weight.add_(1)
    loss(model, batch())
    assert torch.equal(model.flare.target.heat.weight, before)  # a loss may run in several processes
    model.after_step()
    torch.testing.assert_close(model.flare.target.heat.weight, before + 0.25)
    frozen = policy(**ON, target="frozen")
    before = {k: v.clone() for k, v in frozen.flare.target.state_dict().items()}
    with torch.no_grad():
        frozen.encoder.heat.weight.add_(1)
    frozen.after_step()
    assert all(torch.equal(v, before[k]) for k, v in frozen.flare.target.state_dict().items())


FOUR = {key: value[:4] for key, value in batch().items()}  # rows: two for each of two processes


def trained(out: Path, steps: int = 3, **options) -> FlowPolicy:
    model = policy(**ON, target="qformer", target_decay=0.75)
    how = dict(lr=1e-2, warmup=1, ema=None, precision="fp32", checkpoint_every=1, log_every=1)
    train(model, **{"batch_at": lambda step: FOUR, "out": out, "steps": steps, **how, **options})
    return model


@pytest.mark.parametrize("replicas", [1, 2])
def test_targets_follow_once_a_step_however_many_processes_it_had(tmp_path, replicas):
    followed = policy(**ON, target="qformer", target_decay=0.75).flare

    def validate(model: FlowPolicy, step: int) -> dict[str, float]:
        followed.follow(model.encoder, model.queries)
        return {}

    model = trained(tmp_path, replicas=replicas, validate=validate, validate_every=1)
    assert not torch.equal(model.flare.target.heat.weight, model.encoder.heat.weight)
    for name, value in followed.named_buffers():
        assert torch.equal(value, model.flare.get_buffer(name)), name


def test_a_run_with_replicas_that_is_killed_has_the_same_targets(tmp_path):
    def dies(step: int) -> dict[str, torch.Tensor]:
        if step == 2:
            raise ValueError("killed")
        return FOUR

    whole = trained(tmp_path / "whole", replicas=2)
    with pytest.raises(ValueError, match="killed"):
        trained(tmp_path / "cut", replicas=2, batch_at=dies)
    again = trained(tmp_path / "cut", replicas=2)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_targets_neither_drop_out_nor_add_noise():
    torch.manual_seed(0)
    encoder = PaletteEncoder(width=24, colours=3, slots=4, hidden=40, views=2)
    model, data = policy(**ON, encoder=encoder).train(), batch()
    words = encoder.words(["open it"] * B)
    targets = [model.flare.embed(data["future"], words) for _ in range(2)]
    assert torch.equal(*targets) and torch.equal(model.eval().flare.embed(data["future"], words), targets[0])
    model.train()
    assert not torch.equal(model.encode(data["future"], words), model.encode(data["future"], words))


def test_alignment_is_zero_for_the_true_embedding():
    model, data = policy(**ON), batch()
    target = model.flare.embed(data["future"], data["words"])
    assert model.flare.loss(target * 2.5, target, torch.ones(B, dtype=torch.bool), torch.ones(())).abs() < 1e-6


def test_targets_are_what_changes_or_the_future_itself():
    data, models = batch(), [policy(**ON, align_to=to) for to in ("change", "future")]
    changed, future = (model.flare.aim(data) for model in models)
    now = models[0].flare.embed(data["pictures"], data["words"])
    assert torch.equal(future - now, changed)
    assert torch.equal(future, models[1].flare.embed(data["future"], data["words"]))
    still = dict(data, future=data["pictures"])
    assert not models[0].flare.aim(still).any()
    models[0].loss(still)[1]["align"].backward()  # nothing changes: there is nothing to foresee
    assert all(p.grad is None or not p.grad.any() for p in models[0].parameters())
    with pytest.raises(ValueError, match="align_to of FLARE is 'past'; expected one of change, future"):
        policy(**ON, align_to="past")


def test_future_tokens_only_lengthen_the_sequence():
    """Acting with M future tokens has the same shapes, and costs at most what M more tokens in each layer do."""
    plain, flare = policy().eval(), policy(**ON).eval()
    cost = []
    for model in (plain, flare):
        seen, noise = model.observe(observations()), model.noise(range(B))
        with FlopCounterMode(display=False) as counter:
            x = integrate(model, noise, seen.state, seen.plan, seen.context, model.euler_steps, 0)
        cost.append(counter.get_total_flops())
        assert x.shape == (B, 6, 7) and model.act(observations(), range(B)).shape == (B, 6, 7)
    assert 1 < cost[1] / cost[0] < (7 + 3) / 7 * 1.05  # attention alone is not linear


def test_a_qformer_is_trained_by_the_action_loss_and_followed():
    model = policy(**ON, target="qformer", target_decay=0.75, state_dropout=0.0)
    data = batch()
    model.encode(data["pictures"], data["words"])
    before = model.flare.target_queries.layers.norm.bias.clone()
    with torch.no_grad():
        model.queries.layers.norm.bias.add_(1)
    model.after_step()
    _, metrics = model.loss(data)
    torch.testing.assert_close(model.flare.target_queries.layers.norm.bias, before + 0.25)
    metrics["flow"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.queries.parameters())
    assert model.flare.project[0].weight.grad is None  # the action loss does not reach the alignment layer
    assert model.flare.embed(data["future"], data["words"]).shape == (B, 3, 20)
    assert model.encode(data["pictures"], data["words"]).shape[1] == 3 + policy().encode(
        data["pictures"], data["words"]).shape[1]  # fmt: skip
    assert not any("target" in name for name, _ in model.named_parameters())


def test_alignment_alone_reaches_the_encoder_and_not_the_targets():
    model, data = policy(**ON, target="qformer", state_dropout=0.0), batch()
    data["valid"][:] = False
    total, metrics = model.loss(data)
    assert metrics["flow"] == 0
    total.backward()
    assert model.encoder.heat.weight.grad.abs().sum() > 0 and model.queries.queries.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.decode_action.parameters())


def test_a_qformer_without_flare_is_trained_by_the_action_loss_alone(tmp_path):
    model = policy(queries=3, state_dropout=0.0)
    value, parts = model.loss(batch())
    value.backward()
    assert model.flare is None and parts.keys() == {"flow"}
    assert all(p.grad is not None for p in model.queries.parameters())
    model.eval().save(tmp_path / "p")
    again = type(model).load(tmp_path / "p")
    np.testing.assert_array_equal(again.act(observations(), range(B)), model.act(observations(), range(B)))
    seen = batch()["pictures"], batch()["words"]
    assert model.encode(*seen).shape[1] == policy().encode(*seen).shape[1] + 3
    assert policy(**ON, queries=4).flare.target_queries is None  # FLARE's targets are not its outputs
    with pytest.raises(ValueError, match="queries is 4, future_tokens 3"):
        policy(**ON, target="qformer", queries=4)
