"""FLARE: off without a trace, gradients where they belong, a target that follows."""

import torch

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
    torch.testing.assert_close(model.flare.target.heat.weight, before + 0.25)
    frozen = policy(**ON, target="frozen")
    before = {k: v.clone() for k, v in frozen.flare.target.state_dict().items()}
    with torch.no_grad():
        frozen.encoder.heat.weight.add_(1)
    loss(frozen, batch())
    assert all(torch.equal(v, before[k]) for k, v in frozen.flare.target.state_dict().items())


def test_alignment_is_zero_for_the_true_embedding():
    model, data = policy(**ON), batch()
    target = model.flare.embed(data["future"], data["words"])
    model.flare.project = torch.nn.Identity()
    assert model.flare.loss(target * 2.5, target, torch.ones(B, dtype=torch.bool)).abs() < 1e-6


def test_future_tokens_only_lengthen_the_sequence():
    plain, flare = policy().eval(), policy(**ON).eval()
    lengths = []
    for model in (plain, flare):
        block = model.dit.blocks[0]
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        assert model.act(observations(), range(B)).shape == (B, 6, 7)
    assert set(lengths[: plain.euler_steps]) == {7} and set(lengths[plain.euler_steps :]) == {7 + 3}
