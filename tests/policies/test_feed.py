"""What a policy is fed and fitted to: states that are known, pictures that are looked at."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dreamgen.core import rotations
from dreamgen.core.embodiment import Part
from dreamgen.core.part import ROTATIONS
from dreamgen.policies import feed as feeding
from dreamgen.policies.feed import Feed
from dreamgen.policies.policy import FlowPolicy
from tests.policies.test_chunks import Recorded, partly, recorded
from tests.policies.test_space import ROBOT, framed
from tests.policies.toy import STEPS, encoder, policy
from tests.policies.toy import robot as toy


def feed(model: FlowPolicy, **changes) -> Feed:
    plain = dict(real=None, dreams=(), batch_size=12, ratio="1:1", dream_body="dream", spread_scale=None, options={},
                 dream_options={}, seed=0)  # fmt: skip
    return Feed(model, **{**plain, **changes})


def of(robot, data: Recorded) -> Recorded:
    return Recorded(*data.episodes, of=robot)


@pytest.mark.parametrize("state", ["masked", "zero"])
def test_chunks_are_not_told_relative_to_states_that_are_hidden_or_made_up(state):
    data, how = of(ROBOT, recorded()), dict(dream_options=dict(state=state))
    with pytest.raises(ValueError, match=f"dream_state is '{state}', and policy.frame is 'absolute'.*frame=recorded"):
        feed(framed("absolute"), real=data, dreams=[data], **how)
    feed(framed("absolute"), real=data, **how)  # no dreams
    assert len(feed(framed("recorded"), real=data, dreams=[data], **how).chunks) == 2


@pytest.mark.parametrize("frame, left_out", [("relative", 0), ("absolute", 26)])
def test_every_observation_of_a_batch_is_learned_from(frame, left_out):
    """The pose of these dreams is known at their first row, their grip everywhere."""
    model, dreams = framed(frame), of(ROBOT, partly(0))
    made = feed(model, real=of(ROBOT, recorded()), dreams=[dreams])
    assert [chunks.unknown_left_out for chunks in made.chunks] == [0, left_out]
    batch = made.at(0)
    assert model.steps(batch).any(1).all() and (batch["body"] == 1).sum() == 6
    assert batch["state_known"].all() == (frame == "absolute")


def test_latent_actions_need_no_state_whatever_the_frame():
    latent = replace(ROBOT, name="toy_latent", action=(Part(name="latent", start=0, stop=2),))
    model = FlowPolicy(robot=ROBOT, encoder=encoder(), horizon=STEPS, layers=2, heads=2, head_width=8, frame="absolute",
                       bodies=["real", "latent"], robots={"latent": latent})  # fmt: skip
    blind = [replace(e, action=e.action[:, :2], extra={"state_known": 0 * e.state}) for e in recorded().episodes]
    made = feed(model, real=of(ROBOT, recorded()), latent=[Recorded(*blind, of=latent)],
                dream_options=dict(state="masked"))  # fmt: skip
    batch = made.at(0)
    assert model.steps(batch).any(1).all() and batch["body"].tolist() == [0] * 6 + [1] * 6


def test_statistics_are_of_states_that_are_known():
    model, dreams = policy(), partly(0)
    feed(model, dreams=[dreams], dream_body="real")
    first = np.stack([dream.state[0] for dream in dreams.episodes])
    np.testing.assert_allclose(model.normalise_state.offset, first.mean(0), rtol=1e-5)


def test_pictures_are_decoded_for_an_encoder_that_is_fitted_to_them(monkeypatch):
    class Unseen(Recorded):
        def views(self, i: int, rows) -> dict[str, np.ndarray]:
            raise AssertionError("nobody looks at these")

    feed(policy(), real=Unseen(*recorded().episodes), dreams=[recorded()])
    monkeypatch.setattr(feeding, "PICTURES", 5)
    for count, each in ((1, [5]), (2, [6]), (3, [6])):  # of all together, evenly
        model, seen = policy(), []
        model.encoder.fit = seen.append
        feed(model, real=[recorded()] * count)
        assert [len(pictures) for pictures in seen] == each and seen[0].dtype == torch.uint8


def test_actions_are_scaled_where_spread_counts(monkeypatch):
    seen = []
    monkeypatch.setattr(Feed, "_scale", lambda self, k, bodies, count: seen.append(k) or np.ones(7))
    made = feed(policy(), real=recorded(), dreams=[recorded()])
    assert seen == [] and made.chunks[1].action_scale is None
    made = feed(policy(), real=recorded(), dreams=[recorded()], spread_scale=0.5)
    assert seen == [1] and (made.chunks[1].action_scale == 1).all() and made.chunks[0].spread_scale is None


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_the_scale_of_a_rotation_is_an_angle_as_its_spread_is(rotation):
    """Of a hand that points down, whose entries wrap, and however they tell it."""
    wide, rng = ROTATIONS[rotation], np.random.default_rng(0)
    turn = Part(name="turn", start=0, stop=wide, rotation=rotation)
    arm = SimpleNamespace(robot=toy(action=(turn, Part(name="move", start=wide, stop=wide + 1))))
    q = rotations.product(rotations.exp(rng.normal(0, 0.1, (9000, 3))), rotations.exp(np.array([np.pi, 0, 0])))
    action = np.concatenate([rotations.tell(turn, q), rng.normal(0, 3, (9000, 1))], 1).astype(np.float32)
    held = SimpleNamespace(datasets=[SimpleNamespace(actions=lambda: action)],
                           model=SimpleNamespace(spaces=SimpleNamespace(of=lambda body: arm)))  # fmt: skip
    np.testing.assert_allclose(Feed._scale(held, 0, [0], 1), [0.1] * wide + [3], rtol=0.05)
