"""Frames of chunks, and bodies of other widths in one policy."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dreamgen.core import rotations
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.core.part import ROTATIONS
from dreamgen.data.normaliser import Normaliser
from dreamgen.policies.inference import integrate
from dreamgen.policies.policy import FlowPolicy
from dreamgen.policies.space import Space
from tests.policies.toy import STEPS, B, batch, encoder, loss, observations, policy, robot

STATE = (Part(name="pose", start=0, stop=2, unit="m"), Part(name="grip", start=2, stop=3))
ACTION = (Part(name="move", start=0, stop=2, kind="delta", scale=0.5, moves="pose", limits=(-50.0, 50.0)),
          Part(name="spin", start=2, stop=4, kind="delta"), Part(name="squeeze", start=4, stop=5, moves="grip"),
          Part(name="lamp", start=5, stop=7, kind="binary", limits=(0.0, 1.0)))  # fmt: skip
ROBOT: Embodiment = robot(state=STATE, action=ACTION)


def framed(frame: str, cumulative: bool = False) -> FlowPolicy:
    torch.manual_seed(0)
    made = FlowPolicy(robot=ROBOT, encoder=encoder(), horizon=STEPS, layers=2, heads=2, head_width=8, frame=frame,
                      cumulative=cumulative)  # fmt: skip
    rng = np.random.default_rng(0)
    action, start = rng.normal(size=(40, STEPS, 7)), rng.normal(size=(40, 3))
    made.fit(start.astype(np.float32), action.astype(np.float32), start=start.astype(np.float32))
    return made


@pytest.mark.parametrize("frame", ["recorded", "relative", "absolute"])
@pytest.mark.parametrize("cumulative", [True, False])
def test_chunks_of_every_frame_by_hand(frame, cumulative):
    model, action, state = framed(frame, cumulative), batch()["action"], batch()["state"]
    told = model.normalise_action.denormalise(model.space.chunk(action, state).flatten(1)).view_as(action)
    torch.testing.assert_close(model.space.unchunk(model.space.chunk(action, state), state), action, atol=1e-4,
                               rtol=1e-4)  # fmt: skip
    where = action[..., :2].cumsum(1)
    want = {"recorded": where if cumulative else action[..., :2], "relative": where,
            "absolute": where + state[:, None, :2] / 0.5}[frame]  # fmt: skip
    torch.testing.assert_close(told[..., :2], want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(told[..., 2:4], action[..., 2:4].cumsum(1) if cumulative else action[..., 2:4])
    taken = state[:, None, 2:] if frame == "relative" else 0
    torch.testing.assert_close(told[..., 4:5], action[..., 4:5] - taken, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(told[..., 5:], action[..., 5:])


def test_a_frame_that_needs_the_state_asks_for_it(tmp_path):
    model, seen = framed("absolute").eval(), observations()
    assert model.space.needs_state and not framed("recorded").space.needs_state
    assert model.act(seen, range(B)).shape == (B, STEPS, 7)
    blind = dataclasses.replace(seen[1], state=np.full(3, np.nan, np.float32))
    with pytest.raises(ValueError, match="state of an observation is unknown"):
        model.act([seen[0], blind], [0, 1])
    data = batch()  # row 3 has no state: its actions are not learned from
    other = {key: value.clone() for key, value in data.items()}
    other["action"][3] += 1
    assert torch.equal(loss(model, data), loss(model, other))
    with pytest.raises(ValueError, match="frame is 'sideways'"):
        framed("sideways")
    model.save(tmp_path)
    np.testing.assert_array_equal(FlowPolicy.load(tmp_path).act(seen, range(B)), model.act(seen, range(B)))


def test_only_the_entries_that_chunks_are_told_relative_to_must_be_known():
    model, data, seen = framed("relative"), batch(), observations()  # to the grip alone
    data["entries_known"] = torch.tensor([[0, 0, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 1, 1]]).bool()
    data["state_known"] = data["entries_known"].all(1)
    assert model.steps(data).any(1).tolist() == [True, False, True, False, True]
    assert torch.equal(framed("recorded").steps(data), data["valid"])
    half = [dataclasses.replace(o, state=np.array([np.nan, 0, 1], np.float32)) for o in seen]
    assert np.isfinite(model.eval().act(half, range(B))).all()
    with pytest.raises(ValueError, match="state of an observation is unknown"):
        framed("absolute").eval().act(half, range(B))
    rng = np.random.default_rng(2)
    action = rng.normal(size=(40, STEPS, 7)).astype(np.float32)
    start = np.full((40, 3), np.nan, np.float32)
    start[:30, 2] = 9.0
    model.fit(np.full((5, 3), np.nan, np.float32), action, start=start)  # no state is known: its numbers stay
    squeeze = model.normalise_action.offset.view(STEPS, 7)[:, 4]
    np.testing.assert_allclose(squeeze, action[:30, :, 4].mean(0) - 9, rtol=1e-4)


def test_a_body_whose_chunks_need_no_state_learns_without_it():
    latent = dataclasses.replace(ROBOT, name="toy_latent", action=(Part(name="latent", start=0, stop=9),))
    made = FlowPolicy(robot=ROBOT, encoder=encoder(), horizon=STEPS, layers=2, heads=2, head_width=8, frame="absolute",
                      bodies=["real", "latent"], robots={"latent": latent})  # fmt: skip
    data = batch()
    data["body"], data["entries_known"] = torch.tensor([0, 1, 1, 0, 1]), torch.zeros(B, 3).bool()
    data["entries_known"][0], data["state_known"] = True, torch.tensor([True] + [False] * 4)
    assert made.steps(data).any(1).tolist() == [True, True, True, False, True]


LATENT = dataclasses.replace(robot(), name="toy_latent", action=(Part(name="latent", start=0, stop=9),))
NARROW = dataclasses.replace(robot(), name="toy_narrow", state=(), action=(Part(name="arm", start=0, stop=4),))


def several(**changes) -> FlowPolicy:
    return policy(bodies=["real", "latent", "narrow"], robots={"latent": LATENT, "narrow": NARROW}, **changes)


def mixed() -> dict[str, torch.Tensor]:
    data = batch()
    data["action"] = torch.nn.functional.pad(data["action"], (0, 2))
    data["body"] = torch.tensor([0, 1, 2, 0, 1])
    data["action"][data["body"] == 0, :, 7:] = 0
    data["action"][data["body"] == 2, :, 4:] = 0
    return data


def test_bodies_of_other_widths_share_one_policy(tmp_path):
    model, data = several(state_dropout=0.0), mixed()
    rng = np.random.default_rng(1)
    model.fit(np.zeros((5, 3), np.float32), rng.normal(3, 2, (40, STEPS, 9)).astype(np.float32), body=1)
    other = {key: value.clone() for key, value in data.items()}
    other["action"][data["body"] == 0, :, 7:] = 5.0  # padding is never read
    other["action"][data["body"] == 2, :, 4:] = 5.0
    assert torch.equal(loss(model, data), loss(model, other))
    loss(model, data).backward()
    grad = model.decode_action.layer2.weight.grad
    assert grad[0, :, :7].abs().sum() > 0 and grad[0, :, 7:].abs().sum() == 0
    assert grad[1].abs().sum(0).min() > 0 and grad[2, :, 4:].abs().sum() == 0
    x = model.spaces.chunk(data["action"], data["state"], data["body"])
    space = model.spaces.of(1)
    torch.testing.assert_close(space.unchunk(x[data["body"] == 1]), data["action"][data["body"] == 1])
    chunk = model.eval().act(observations(), range(B))
    assert chunk.shape == (B, STEPS, 7)
    seen, noise = model.observe(observations()), model.noise(range(B))
    noise[..., 7:] = 3.0  # nor does what stands in the padding at the start grow
    x = integrate(model, noise, seen.state, seen.plan, seen.context, model.euler_steps, 0)
    assert (x[..., 7:] == 3.0).all()
    model.save(tmp_path)
    again = FlowPolicy.load(tmp_path)
    assert again.spaces.of(1).robot == LATENT
    np.testing.assert_array_equal(again.act(observations(), range(B)), chunk)


def test_bodies_say_what_does_not_fit(tmp_path):
    large = dataclasses.replace(LATENT, views=tuple(dataclasses.replace(v, height=48) for v in LATENT.views))
    with pytest.raises(ValueError, match="'latent' is seen at 48x16 pixels, .* views of 'toy_latent' to 24 and 16"):
        policy(bodies=["real", "latent"], robots={"latent": large})
    for robots in ({"latent": "other"}, {"latent": "more", "more": "latent"}):
        with pytest.raises(ValueError, match="the body 'latent' is of the robot of '(other|more)', and has no embodim"):
            policy(bodies=["real", "latent", "more"], robots=robots)
    with pytest.raises(ValueError, match="no embodiment 'other'"):
        policy(robots={"other": LATENT})
    several().save(tmp_path)
    with pytest.raises(ValueError, match="no embodiment 'dream'; it has"):
        FlowPolicy.load(tmp_path, speaks="dream")
    assert FlowPolicy.load(tmp_path, speaks="real").speaks == 0


def turning(kind: str, motion: str, side: str, state: str) -> Embodiment:
    """A wrist that is turned, beside a part that is moved."""
    wide, wider = ROTATIONS[state], ROTATIONS[kind]
    scale = 0.5 if wider == 3 else 1.0
    return robot(
        state=(Part(name="wrist", start=0, stop=wide, rotation=state), Part(name="grip", start=wide, stop=wide + 1)),
        action=(Part(name="squeeze", start=0, stop=1, moves="grip"),
                Part(name="turn", start=1, stop=1 + wider, rotation=kind, kind=motion, frame=side, moves="wrist",
                     scale=scale)),
    )  # fmt: skip


@pytest.mark.parametrize("frame", ["recorded", "relative", "absolute"])
@pytest.mark.parametrize("side", ["base", "tool"])
@pytest.mark.parametrize("motion", ["absolute", "delta"])
@pytest.mark.parametrize("kind", ROTATIONS)
def test_chunks_of_rotations_by_scipy(kind, motion, side, frame):
    """A hand that points down, so that what is told lies on both sides of half a turn."""
    state = "quaternion_xyzw" if kind.startswith("euler") else "axis_angle"
    body, n = turning(kind, motion, side, state), 31
    wrist, turn = body.state[0], body.action[1]
    start = Rotation.from_rotvec(np.random.default_rng(0).normal(0, 0.1, (n, 3))) * Rotation.from_rotvec([np.pi, 0, 0])
    step = Rotation.from_rotvec(np.random.default_rng(1).normal(0, 0.2, (n * STEPS, 3)))
    reached, now = [], start
    for h in range(STEPS):
        one = step[h::STEPS]
        now = now * one if side == "tool" else one * now
        reached.append(now)
    quat = np.stack([r.as_quat() for r in reached], 1).reshape(-1, 4)  # n H
    quat = np.roll(step.as_quat() if motion == "delta" else quat, 1, -1)
    action = rotations.tell(turn, quat).reshape(n, STEPS, -1)
    action = np.concatenate([np.ones((n, STEPS, 1)), action], -1).astype(np.float32)
    begun = rotations.tell(wrist, np.roll(start.as_quat(), 1, -1))
    begun = np.concatenate([begun, np.zeros((n, 1))], 1).astype(np.float32)
    space = Space(body, horizon=STEPS, cumulative=frame != "recorded", frame=frame,
                  state=Normaliser(body.state_dim), action=Normaliser(STEPS * body.action_dim))  # fmt: skip
    space.fit(begun, action, begun)
    given = torch.from_numpy(action), torch.from_numpy(begun)
    x = space.chunk(*given)
    assert space.action.scale.view(STEPS, -1)[:, 1:].max() * turn.radians < 1.2  # entries that wrap would spread by pi
    back = space.unchunk(x, given[1])
    assert rotations.apart(turn, back[..., 1:], given[0][..., 1:]).max() * turn.radians < 1e-4
    torch.testing.assert_close(back[..., :1], given[0][..., :1], atol=1e-5, rtol=1e-4)
    told = space.action.denormalise(x.flatten(1)).view_as(x)[..., 1:]
    if frame == "recorded":
        want = quat.reshape(n, STEPS, 4)
    else:
        ends = np.stack([r.as_quat() for r in reached], 1)
        want = np.stack([(ends[:, h] if frame == "absolute" else
                          ((start.inv() * reached[h]) if side == "tool" else (reached[h] * start.inv())).as_quat())
                         for h in range(STEPS)], 1)  # fmt: skip
        want = np.roll(want, 1, -1)
    assert rotations.angle(rotations.read(turn, told).numpy(), want).max() < 1e-4
    seen = space.state.normalise(given[1])
    assert space.state.scale[:-1].max() < 0.3
    assert rotations.apart(wrist, space.state.denormalise(seen)[:, :-1], given[1][:, :-1]).max() < 1e-4


def test_a_policy_of_rotations_acts_and_comes_back(tmp_path):
    torch.manual_seed(0)
    made = FlowPolicy(robot=turning("axis_angle", "absolute", "base", "quaternion_xyzw"), encoder=encoder(),
                      horizon=STEPS, layers=2, heads=2, head_width=8, frame="relative")  # fmt: skip
    data = batch()
    swing = np.random.default_rng(0).normal(0, 0.2, (B, STEPS, 3)) + [6.0, 0, 0]  # in halves of a radian
    data["action"] = torch.from_numpy(np.concatenate([np.ones((B, STEPS, 1)), swing], -1)).float()
    data["state"] = torch.tensor([[1.0, 0.1, 0.0, 0.0, 0.5]]).expand(B, 5).clone()
    data["entries_known"] = torch.ones(B, 5).bool()
    made.fit(data["state"].numpy(), data["action"].numpy(), start=data["state"].numpy())
    loss(made, data).backward()
    seen = [dataclasses.replace(o, state=data["state"][0].numpy()) for o in observations()]
    chunk = made.eval().act(seen, range(B))
    assert chunk.shape == (B, STEPS, 4) and np.linalg.norm(chunk[..., 1:], axis=-1).max() <= 2 * np.pi + 1e-4
    made.save(tmp_path)
    np.testing.assert_array_equal(FlowPolicy.load(tmp_path).act(seen, range(B)), chunk)


@pytest.mark.parametrize("frame", ["recorded", "relative", "absolute"])
def test_what_the_data_hold_still_stands_still(frame):
    model, rng = framed(frame), np.random.default_rng(3)
    action, start = rng.normal(size=(40, STEPS, 7)).astype(np.float32), rng.normal(size=(40, 3)).astype(np.float32)
    action[..., 3], action[..., 5:] = 0.25, 1.0  # half of the spin is parked, the lamp stays on
    x, state = torch.from_numpy(rng.normal(size=(4, STEPS, 7)).astype(np.float32)), torch.from_numpy(start[:4])
    model.fit(start, action, start=start)
    found = model.space.unchunk(x, state)
    assert (found[..., 3] == 0.25).all() and (found[..., 2].std(0) > 0.1).all()
    assert (found[..., 5:].std((0, 1)) > 0.1).all()  # a lamp has its commands, whatever the data show
    told = model.space.chunk(torch.from_numpy(action), torch.from_numpy(start))
    assert (told[..., 3] == 0).all()
    elsewhere = action[:3].copy()
    elsewhere[0, 2, 3] = 0.5  # dreams that move it
    model.fit(start, action, start=start, others=(elsewhere, start[:3]))
    found = model.space.unchunk(x, state)
    assert (found[:, 2, 3].std(0) > 0.1).all() and (found[:, 1, 3] == 0.25).all()


@pytest.mark.parametrize("frame", ["recorded", "relative"])
@pytest.mark.parametrize("state", ["quaternion_wxyz", "quaternion_xyzw"])
@pytest.mark.parametrize("kind", ["quaternion_wxyz", "quaternion_xyzw"])
@pytest.mark.parametrize("middle", [0.0, -0.8])
def test_a_quaternion_keeps_the_sign_of_the_data(kind, state, frame, middle):
    """Of a hand that points down, whose w crosses 0 within a chunk, and of one whose w is mostly negative."""
    body, n = turning(kind, "absolute", "base", state), 23
    drift = np.linspace(-0.3, 0.3, STEPS) + np.random.default_rng(0).normal(0, 0.05, (n, STEPS))
    q = rotations.exp(np.stack([np.pi - 2 * np.arcsin(middle) + drift, 0.1 + 0 * drift, 0 * drift], -1))
    assert (q[..., 0] < 0).any(1).all() and ((q[..., 0] < 0).all() or middle == 0)
    action, begun = (q if each.rotation == "quaternion_wxyz" else np.roll(q, -1, -1)
                     for each in (body.action[1], body.state[0]))  # fmt: skip
    action = torch.from_numpy(np.concatenate([np.ones((n, STEPS, 1)), action], -1)).float()
    begun = torch.from_numpy(np.concatenate([begun[:, 0], np.zeros((n, 1))], -1)).float()
    space = Space(body, horizon=STEPS, cumulative=True, frame=frame, state=Normaliser(body.state_dim),
                  action=Normaliser(STEPS * body.action_dim))  # fmt: skip
    space.fit(begun.numpy(), action.numpy(), begun.numpy())
    torch.testing.assert_close(space.unchunk(space.chunk(action, begun), begun), action, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("frame", ["recorded", "relative", "absolute"])
def test_turns_told_by_quaternions_come_back_short(frame):
    """Whatever the sign of the hand's rotation."""
    body, n = turning("quaternion_xyzw", "delta", "tool", "quaternion_xyzw"), 23
    rng = np.random.default_rng(0)
    steps = rotations.tell(body.action[1], rotations.exp(rng.normal(0, 0.2, (n, STEPS, 3))))
    action = torch.from_numpy(np.concatenate([np.ones((n, STEPS, 1)), steps], -1)).float()
    hand = rotations.exp(rng.normal(0, 0.1, (n, 3)) + [np.pi, 0, 0]) * rng.choice([-1, 1], (n, 1))
    begun = torch.from_numpy(np.concatenate([np.roll(hand, -1, -1), np.zeros((n, 1))], -1)).float()
    space = Space(body, horizon=STEPS, cumulative=True, frame=frame, state=Normaliser(body.state_dim),
                  action=Normaliser(STEPS * body.action_dim))  # fmt: skip
    space.fit(begun.numpy(), action.numpy(), begun.numpy())
    torch.testing.assert_close(space.unchunk(space.chunk(action, begun), begun), action, atol=1e-5, rtol=1e-4)
