"""The flow policy: its loss, its gradients, its chunks, its checkpoints, its errors."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamgen.policies.policy import FlowPolicy
from tests.policies.toy import STEPS, A, B, D, H, V, W, batch, encoder, loss, observations, policy, robot


def test_loss_is_zero_with_the_true_velocity(monkeypatch):
    model, data = policy(), batch()
    x = model.space.chunk(data["action"]).repeat_interleave(model.draws, 0)
    x = torch.where(data["valid"].repeat_interleave(model.draws, 0)[..., None], x, torch.zeros(()))

    def true(x_t, t, *_):  # x_t = (1 - t) noise + t x  =>  x - noise = (x - x_t) / (1 - t)
        return (x - x_t) / (1 - t)[:, None, None], None

    monkeypatch.setattr(model, "velocity", true)
    assert loss(model, data) < 1e-6


@pytest.mark.parametrize("cumulative", [True, False])
def test_chunk_and_unchunk_are_inverse(cumulative):
    model, action = policy(cumulative=cumulative), batch()["action"]
    torch.testing.assert_close(model.space.unchunk(model.space.chunk(action)), action)
    x = model.normalise_action.denormalise(model.space.chunk(action).flatten(1)).view_as(action)
    want = action.cumsum(1) if cumulative else action
    torch.testing.assert_close(x[..., :6], want[..., :6])
    torch.testing.assert_close(x[..., 6], action[..., 6])  # binary entries are never summed


def test_masked_steps_and_unknown_states_have_no_influence():
    model, data = policy(), batch()
    other = {key: value.clone() for key, value in data.items()}
    other["action"][1, 4:] = 99.0
    other["state"][3] = float("nan")
    other["weight"][1, 5] = 7.0
    assert torch.equal(loss(model, data), loss(model, other))
    other["action"][1, 3] += 1
    assert not torch.equal(loss(model, data), loss(model, other))


def test_chunk_steps_do_not_see_masked_steps():
    model, data = policy().eval(), batch()
    tokens = model.encode(data["pictures"], data["words"])
    context = model.dit.context(tokens)
    state = model.state_token(data["state"], data["state_known"], data["body"])
    x, t = torch.randn(B, STEPS, A), torch.full((B,), 0.3)
    y = x.clone()
    y[1, 4:] += 5
    seen = (state, model.plan(tokens, state), context, data["body"], data["valid"])
    a, b = (model.velocity(z, t, *seen)[0] for z in (x, y))
    torch.testing.assert_close(a[1, :4], b[1, :4])
    assert not torch.allclose(a[1, 4:], b[1, 4:])


def test_weights_scale_the_steps():
    model, data = policy(), batch()
    data["weight"][0] = 0
    data["valid"][2:] = False
    alone = {key: value.clone() for key, value in data.items()}
    alone["action"][0] = 0.5  # a row of weight 0 may hold anything
    torch.testing.assert_close(loss(model, data), loss(model, alone))


def test_gradients_reach_what_they_should():
    model, data = policy(state_dropout=0.0), batch()
    data["body"][:] = 0
    loss(model, data).backward()
    for name, p in model.named_parameters():
        if name.startswith(("encode_state", "encode_action", "decode_action")):
            assert p.grad[0].abs().sum() > 0 and p.grad[1].abs().sum() == 0, name  # only the body that was there
        elif name == "encoder.view_name":
            assert p.grad[:V].abs().sum() > 0 and p.grad[V:].abs().sum() == 0
        else:
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_state_dropout_hides_all_states():
    model, data = policy(state_dropout=1.0), batch()
    other = dict(data, state=data["state"] + 1)
    assert torch.equal(loss(model, data), loss(model, other))
    assert not torch.equal(loss(model.eval(), data), loss(model, other))


def test_rows_of_a_batch_are_independent():
    model, seen, seeds = policy().eval(), observations(), [3, 1, 4, 1, 5]
    whole = model.act(seen, seeds)
    assert whole.shape == (B, STEPS, A) and whole.dtype == np.float32
    for i in range(B):
        np.testing.assert_allclose(model.act(seen[i : i + 1], seeds[i : i + 1])[0], whole[i], atol=1e-5)
    np.testing.assert_allclose(model.act(seen[::-1], seeds[::-1])[::-1], whole, atol=1e-5)
    assert not np.allclose(model.act(seen, [9] * B), whole)


def test_context_is_encoded_once_per_chunk(monkeypatch):
    model, calls = policy(euler_steps=6).eval(), []
    encode, keys = model.encoder.forward, model.dit.blocks[0].attention.to_k.forward
    monkeypatch.setattr(model.encoder, "forward", lambda *a: calls.append("encode") or encode(*a))
    monkeypatch.setattr(model.dit.blocks[0].attention.to_k, "forward", lambda *a: calls.append("keys") or keys(*a))
    model.act(observations(), range(B))
    assert sorted(calls) == ["encode", "keys"]


def test_commands_keep_to_limits_and_binary_values():
    action = np.array([[[-3, 0.2, 5, 0, 0, 0, 0.1], [0, 0, 0, 0, 0, 0, -0.1]]], np.float32)
    want = np.array([[[-1, 0.2, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, -1]]], np.float32)
    np.testing.assert_array_equal(policy().space.command(action), want)


def test_save_and_load(tmp_path: Path):
    model = policy(align_weight=0.2, align_layer=2, future_tokens=4, shift=1).eval()
    model.save(tmp_path / "p")
    again = FlowPolicy.load(tmp_path / "p")
    assert again.robot == model.robot and again.config == model.config
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    np.testing.assert_array_equal(model.act(observations(), range(B)), again.act(observations(), range(B)))


def test_load_says_what_is_wrong(tmp_path: Path):
    with pytest.raises(ValueError, match="does not exist"):
        FlowPolicy.load(tmp_path / "none")
    model = policy()
    model.save(tmp_path / "p")
    with pytest.raises(ValueError, match="robot_hz: here 25, saved 20"):
        FlowPolicy.load(tmp_path / "p", robot=robot(robot_hz="25"))
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    (tmp_path / "p" / "config.json").write_text(json.dumps({**config, "layers": 4}))
    with pytest.raises(ValueError, match=r"do not load(.|\n)*Missing key"):
        FlowPolicy.load(tmp_path / "p")
    (tmp_path / "p" / "config.json").write_text(json.dumps({**config, "encoder": {"_target_": "os.system"}}))
    with pytest.raises(ValueError, match="only classes of dreamgen.policies"):
        FlowPolicy.load(tmp_path / "p")


def test_bad_observations_are_named():
    model, (seen, *_) = policy(), observations()
    with pytest.raises(ValueError, match="lacks view 'wrist'"):
        model.act([dataclasses.replace(seen, views={"front": seen.views["front"]})], [0])
    with pytest.raises(ValueError, match="view 'front' .* is \\(16, 24, 3\\)"):
        model.act([dataclasses.replace(seen, views={**seen.views, "front": np.zeros((W, H, 3), np.uint8)})], [0])
    with pytest.raises(ValueError, match="shape \\(2,\\)"):
        model.act([dataclasses.replace(seen, state=np.zeros(2, np.float32))], [0])
    with pytest.raises(ValueError, match="no embodiment 'latent'"):
        model.body("latent")


def test_a_robot_without_state_and_with_unknown_state():
    model = FlowPolicy(robot=robot(state=()), encoder=encoder(), horizon=STEPS, layers=1, heads=1, head_width=8)
    model.fit(np.zeros((4, 0), np.float32), np.random.default_rng(0).normal(size=(4, STEPS, A)).astype(np.float32))
    seen = [dataclasses.replace(o, state=np.zeros(0, np.float32)) for o in observations()]
    assert np.isfinite(model.act(seen, range(B))).all()
    blind = [dataclasses.replace(o, state=np.full(D, np.nan, np.float32)) for o in observations()]
    assert np.isfinite(policy().act(blind, range(B))).all()
