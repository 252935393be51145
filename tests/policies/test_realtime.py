"""Acting: the fast loop against the plain one, chunks that go on from the last, averages of chunks."""

import numpy as np
import pytest
import torch

from dreamgen.core import rotations
from dreamgen.core.embodiment import Part
from dreamgen.policies.flow import euler
from dreamgen.policies.inference import integrate
from dreamgen.policies.realtime import Ensembled, RealTime, guided, weights
from tests.policies.toy import STEPS, A, B, batch, loss, observations, policy, robot


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("changes", [{}, dict(align_weight=0.3, align_layer=2, future_tokens=3), dict(queries=3)])
def test_the_fast_loop_equals_the_plain_one(layers, changes):
    model = policy(layers=layers, **changes).eval()
    seen, noise = model.observe(observations()), model.noise(range(B))

    def velocity(x, t):
        return model.velocity(x, t, seen.state, seen.plan, seen.context, seen.body)[0]

    with torch.no_grad():
        want = euler(velocity, noise, model.euler_steps)
        found = integrate(model, noise, seen.state, seen.plan, seen.context, model.euler_steps, 0)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(model.finish(want, seen.states), model.act(observations(), range(B)), atol=1e-5)


def test_weights_hold_what_is_executed_and_decay_to_where_the_last_chunk_ends():
    w = weights(16, 4, 10)
    assert (w[:4] == 1).all() and (w[10:] == 0).all() and (np.diff(w[3:11]) < 0).all()
    c = (10 - 6) / (10 - 4 + 1)
    assert w[6] == pytest.approx(c * (np.exp(c) - 1) / (np.e - 1))
    assert (weights(6, 0, 0) == 0).all() and (weights(6, 3, 2) == [1, 1, 0, 0, 0, 0]).all()


def test_guidance_by_hand():
    """For v = M x the Jacobian of x1_hat = x + (1 - t) v is I + (1 - t) M."""
    torch.manual_seed(0)
    x, previous, matrix = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(5, 5)
    weight = torch.tensor([1, 0.5, 0]).view(1, 3, 1).expand(2, 3, 1)
    for time, beta in ((0.0, 5.0), (0.5, 5.0), (0.5, 1.0)):
        found = guided(lambda x, t: x @ matrix.T, x, torch.full((2,), time), previous, weight, beta)
        v, jacobian = x @ matrix.T, torch.eye(5) + (1 - time) * matrix
        error = (previous - (x + (1 - time) * v)) * weight
        strength = beta if time == 0 else min(beta, (time**2 + (1 - time) ** 2) / (time * (1 - time)))
        torch.testing.assert_close(found, v + strength * error @ jacobian)
        torch.testing.assert_close(found[:, 2], v[:, 2])  # weight 0


@pytest.mark.parametrize("mode", ["guided", "trained"])
def test_a_chunk_goes_on_from_the_last(mode):
    model = policy(prefix=2, euler_steps=6).eval()
    real, memories, plain = RealTime(model, delay=2, mode=mode), [{} for _ in range(B)], model.act
    first = real.act(observations(), range(B), memories, 0)
    np.testing.assert_allclose(first, plain(observations(), range(B)), atol=1e-5)  # nothing to go on from
    later = real.act(observations()[::-1], range(9, 9 + B), memories, 3)
    np.testing.assert_array_equal(later[:, :2], first[:, 3:5])  # executed while it was computed
    free = plain(observations()[::-1], range(9, 9 + B))
    if mode == "guided":  # the overlap is drawn towards what had been planned
        arm = slice(0, 6)
        assert np.abs(later[:, 2, arm] - first[:, 5, arm]).mean() < np.abs(free[:, 2, arm] - first[:, 5, arm]).mean()
    assert not np.allclose(later, free) and later.dtype == np.float32
    again = model.proceed(observations()[::-1], range(9, 9 + B), [first[i, :0] for i in range(B)], delay=2, mode=mode)
    np.testing.assert_allclose(again, free, atol=1e-4)  # nothing is left


@pytest.mark.parametrize("after, fits", [(1, False), (2, True), (4, True), (5, False), (STEPS, False)])
def test_a_robot_that_would_stand_still_is_not_simulated(after, fits):
    """A chunk must have come before the next is asked for, and last until that one comes."""
    model, memories = policy().eval(), [{} for _ in range(B)]
    real = RealTime(model, delay=2)
    real.act(observations(), range(B), memories, 7)
    if fits:
        real.act(observations(), range(B), memories, 7 + after)
        return
    with pytest.raises(ValueError, match=f"asked again after {after} steps; with delay=2 .* expected 2 to 4"):
        real.act(observations(), range(B), memories, 7 + after)


@pytest.mark.parametrize("mode", ["guided", "trained"])
@pytest.mark.parametrize("cumulative", [True, False])
def test_what_follows_given_steps_goes_on_from_them(monkeypatch, mode, cumulative):
    """A policy that knows the plan, and says anything of steps that it is given."""
    model, delay = policy(prefix=2, cumulative=cumulative).eval(), 2
    plan = model.space.command(batch()["action"].numpy())
    x = model.space.chunk(torch.from_numpy(plan))

    def oracle(x_t, t, *_, clean=None):
        v = (x - x_t) / (1 - t)[:, None, None]
        return torch.cat([v[:, :delay] + 3, v[:, delay:]], 1), None

    monkeypatch.setattr(model, "velocity", oracle)
    found = model.proceed(observations(), range(B), list(plan[:, :4]), delay=delay, mode=mode)
    np.testing.assert_array_equal(found[:, :delay], plan[:, :delay])
    np.testing.assert_allclose(found[:, delay:], plan[:, delay:], atol=1e-4)


def test_real_time_says_what_cannot_be():
    with pytest.raises(ValueError, match="trained with prefixes of up to 0 steps; delay is 2"):
        RealTime(policy(), delay=2, mode="trained")
    with pytest.raises(ValueError, match="delay is 6"):
        RealTime(policy(), delay=STEPS)
    with pytest.raises(ValueError, match="delay is 4, and the policy's chunks have 6 steps: .* expected at most 3"):
        RealTime(policy(), delay=4)
    rests = [np.zeros((n, A), np.float32) for n in (0, 2, 1, 3, 6)]
    with pytest.raises(ValueError, match="a rest of 1 steps is left of a chunk, and delay is 2"):
        policy().proceed(observations(), range(B), rests, delay=2)
    with pytest.raises(ValueError, match="prefix is 6"):
        policy(prefix=STEPS)


def test_prefixes_are_given_clean_and_not_scored(monkeypatch):
    model, data = policy(prefix=3, state_dropout=0.0), batch()
    seen = {}
    forward = model.encode_action.forward

    def spy(action, time, body):
        seen.update(action=action.detach(), time=time.detach())
        return forward(action, time, body)

    monkeypatch.setattr(model.encode_action, "forward", spy)
    loss(model, data)
    clean = seen["time"] == 1
    assert seen["time"].shape == (B * model.draws, STEPS) and clean[:, :3].any() and not clean[:, 3:].any()
    x = model.space.chunk(data["action"]).repeat_interleave(model.draws, 0)
    torch.testing.assert_close(seen["action"][clean], x[clean])
    # without prefixes the loss is the plain one, to the bit
    assert torch.equal(loss(policy(prefix=0), data), loss(policy(), data))
    assert torch.equal(loss(policy(prefix=3).eval(), data), loss(policy().eval(), data))


class Counting:
    """Chunk number n holds n + k / 10 at step k; the hand closes on even chunks."""

    robot, horizon = robot(), STEPS

    def __init__(self) -> None:
        self.n = 0

    def act(self, observations, seeds) -> np.ndarray:
        steps = np.arange(STEPS, dtype=np.float32)[:, None] / 100
        chunk = np.full((len(observations), STEPS, A), self.n / 10, np.float32) + steps
        chunk[..., 6] = 1 if self.n % 2 == 0 else -1
        self.n += 1
        return chunk


def test_ensembles_are_weighted_means_of_what_was_said_of_a_step():
    made, memories = Ensembled(Counting(), decay=0.5), [{}]
    found = [made.act(observations(1), [0], memories, now)[0] for now in (0, 2, 4, 6)]
    said = {s: [(n, n / 10 + (s - 2 * n) / 100) for n in range(4) if 0 <= s - 2 * n < STEPS and 2 * n <= 6]
            for s in range(6, 12)}  # fmt: skip
    for k, step in enumerate(range(6, 12)):
        w = np.exp(-0.5 * np.arange(len(said[step])))
        # chunk 0 covers steps 0 to 5: at step 6 it has run out, and the oldest left is chunk 1
        want = (w * [value for _, value in said[step]]).sum() / w.sum()
        assert found[3][k, 0] == pytest.approx(want, abs=1e-6)
    assert found[0][0, 6] == 1 and set(np.unique(found[3][:, 6])) <= {-1.0, 1.0}
    with pytest.raises(ValueError, match="decay is -1"):
        Ensembled(Counting(), decay=-1.0)


class Turning:
    """Chunk number n turns a hand about x by pi - 0.3 + n / 5, told on both sides of half a turn."""

    robot, horizon = robot(action=(Part(name="turn", start=0, stop=3, rotation="axis_angle"),)), STEPS

    def __init__(self) -> None:
        self.n = 0

    def act(self, observations, seeds) -> np.ndarray:
        turn = np.zeros((len(observations), STEPS, 3))
        turn[..., 0] = np.pi - 0.3 + self.n / 5
        self.n += 1
        part = self.robot.action[0]
        return rotations.tell(part, rotations.exp(turn)).astype(np.float32)


def test_ensembles_of_rotations_are_means_of_rotations():
    made, memories = Ensembled(Turning(), decay=0.0), [{}]
    found = [made.act(observations(1), [0], memories, now)[0] for now in (0, 1, 2, 3)]
    part = made.robot.action[0]
    for n, chunk in enumerate(found):
        want = np.array([np.pi - 0.3 + n / 10, 0, 0], np.float32)
        assert rotations.apart(part, chunk[: STEPS - 3], want).max() < 1e-5
