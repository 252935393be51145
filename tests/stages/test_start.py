"""Fine-tuning: which body of another policy each one begins as, and what begins afresh."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamgen.core.clip import Observation
from dreamgen.core.manifest import write_json
from dreamgen.data.lerobot import Dataset
from dreamgen.engine.state import save
from dreamgen.policies.palette import PaletteEncoder
from dreamgen.policies.policy import FlowPolicy
from dreamgen.policies.start import begin
from dreamgen.stages.train_policy import train_policy
from tests.data.video_only import strip
from tests.stages.hoist import HOIST
from tests.stages.test_policy_stages import ROBOT, run, small
from tests.stages.test_train_robots import BODIES, folder, opened, tiny, train  # noqa: F401 (a fixture)

FLARE = dict(align_weight=0.2, align_layer=1, future_tokens=3, target="qformer")


@pytest.fixture(scope="module")
def joint(folder: Path, tmp_path_factory) -> Path:  # noqa: F811
    """A policy of two robots, trained for a moment."""
    out = tmp_path_factory.mktemp("joint") / "p"
    train(folder, out, policy=partial(tiny, **FLARE), steps=2)
    return out


def single(robot, **changes) -> FlowPolicy:  # noqa: ANN001
    torch.manual_seed(5)
    encoder = PaletteEncoder(width=24, colours=2, slots=4, hidden=48, noise=0.01, dropout=0.0)
    return small(**{"robot": robot, "encoder": encoder, **FLARE, **changes})


def acts(policy: FlowPolicy, data: Dataset) -> np.ndarray:
    seen = []
    for i in range(3):
        source, views = data.episode(i), data.views(i, [2])
        seen.append(Observation(views={name: frames[0] for name, frames in views.items()}, state=source.state[2],
                                instruction=source.instruction))  # fmt: skip
    return policy.eval().act(seen, [3, 1, 4])


def test_one_robot_is_taken_out_of_several(folder: Path, joint: Path, tmp_path: Path):  # noqa: F811
    hoist, real = opened(folder, "hoist"), opened(folder, "real")
    model = single(HOIST)
    assert begin(model, joint, {"real": "hoist", "dream": "hoist_dream"}) == []
    want = acts(FlowPolicy.load(joint, robot=HOIST), hoist)
    np.testing.assert_allclose(acts(model, hoist), want, atol=1e-4, rtol=1e-5)
    model.speaks = 1
    want = acts(FlowPolicy.load(joint, robot=HOIST, speaks="hoist_dream"), hoist)
    np.testing.assert_allclose(acts(model, hoist), want, atol=1e-4, rtol=1e-5)
    model = single(ROBOT)
    assert begin(model, joint) == []  # by their names
    np.testing.assert_allclose(acts(model, real), acts(FlowPolicy.load(joint, robot=ROBOT), real), atol=1e-5)
    done = train(folder, tmp_path / "p", policy=partial(single, ROBOT), start=joint, others={}, steps=1)
    assert done["parents"]["start"] and FlowPolicy.load(tmp_path / "p", robot=ROBOT).bodies == ["real", "dream"]


def test_a_robot_is_added_to_a_policy_that_knows_none_like_it(folder: Path, tmp_path: Path):  # noqa: F811
    """The new one's body begins afresh, its statistics are of its data, and the others act as before."""
    real, hoist = opened(folder, "real"), opened(folder, "hoist")
    run(folder, tmp_path / "one", policy=partial(single, ROBOT), steps=2, dreams=[opened(folder, "dreams")])
    first, model = FlowPolicy.load(tmp_path / "one", robot=ROBOT), single(ROBOT, **BODIES)
    fresh = [p.detach().clone() for p in model.decode_action.parameters()]
    assert begin(model, tmp_path / "one", {"hoist": None, "hoist_dream": None}) == [2, 3]
    np.testing.assert_allclose(acts(model, real), acts(first, real), atol=1e-5)
    assert all(torch.equal(p[2:], q[2:]) for p, q in zip(model.decode_action.parameters(), fresh, strict=True))
    policy = partial(single, ROBOT, **BODIES)
    train(folder, tmp_path / "two", policy=policy, start=tmp_path / "one", steps=1,
          start_bodies={"hoist": None, "hoist_dream": None})  # fmt: skip
    found = FlowPolicy.load(tmp_path / "two", robot=HOIST)
    np.testing.assert_allclose(found.spaces.of(2).state.offset, hoist.states().mean(0), rtol=1e-5)
    assert torch.equal(found.normalise_action.offset, first.normalise_action.offset)
    assert torch.equal(found.encoder.palette, first.encoder.palette)
    begun = torch.cat([first.encoder.name] * 2)  # the second view's colours begin with the names of the first one's
    assert torch.equal(model.encoder.name, begun) and torch.equal(model.flare.target.name[2:], first.flare.target.name)


def test_a_body_that_was_trained_needs_no_data(folder: Path, tmp_path: Path):  # noqa: F811
    """A policy goes on with dreams alone, through their own body, or with videos alone."""
    run(folder, tmp_path / "one", policy=partial(single, ROBOT), steps=1)
    first, dreams = FlowPolicy.load(tmp_path / "one", robot=ROBOT), opened(folder, "dreams")
    video = Dataset(strip(folder / "dreams", tmp_path / "video"), ROBOT, actions=False)
    options = dict(start=tmp_path / "one", steps=1, batch_size=4, record={})
    for name, given in (("dreams", dict(dreams=[dreams])), ("videos", dict(videos=[video]))):
        train_policy(partial(single, ROBOT), None, out=tmp_path / name, **given, **options)
        found = FlowPolicy.load(tmp_path / name, robot=ROBOT)
        assert torch.equal(found.normalise_state.offset, first.normalise_state.offset)
        assert not torch.equal(found.encoder.name, first.encoder.name)
    with pytest.raises(ValueError, match="acts for the body 'real', and the data train 'dream' alone"):
        train_policy(partial(single, ROBOT), None, [dreams], out=tmp_path / "a", start_bodies={"real": None}, **options)
    for given in (dict(start_bodies={"real": None}, videos=[video]), {}):
        with pytest.raises(ValueError, match="got neither real data nor dreams"):
            train_policy(partial(single, ROBOT), None, out=tmp_path / f"b{len(given)}", **given, **options)


def test_statistics_are_taken_of_chunks_that_mean_the_same(tmp_path: Path):
    single(ROBOT).save(tmp_path / "p")
    save(tmp_path / "unended/training", 1, single(ROBOT), None, [])
    told = dict(frame="recorded", cumulative=True, _target_="dreamgen.policies.policy.FlowPolicy")
    write_json(tmp_path / "unended/run.json", {"config": {"policy": told}})
    there = "of the robot 'point' with policy.frame=recorded and policy.cumulative=True, .* here they are"
    for out in (tmp_path / "p", tmp_path / "unended"):
        for changes in (dict(cumulative=False), dict(frame="absolute")):
            with pytest.raises(ValueError, match=there):
                begin(single(ROBOT, **changes), out)
        assert begin(single(ROBOT, frame="relative"), out) == []  # its deltas are summed either way
    afresh = {"real": None, "dream": None}
    assert begin(single(ROBOT, cumulative=False), tmp_path / "p", afresh) == [0, 1]
    write_json(tmp_path / "unended/run.json", {"config": {}})
    assert begin(single(ROBOT, cumulative=False), tmp_path / "unended") == []  # nobody knows


def test_it_is_asked_where_a_body_begins(folder: Path, joint: Path, tmp_path: Path):  # noqa: F811
    there = "it has real of 'point', dream of 'point', hoist of 'hoist', hoist_dream of 'hoist'"
    with pytest.raises(ValueError, match=f"no body 'real' of the robot 'hoist' .*{there}.*start_bodies={{real: ...}}"):
        begin(single(HOIST), joint)
    with pytest.raises(ValueError, match=f"no body 'latent' of the robot 'point' with which the body 'new' .*{there}"):
        begin(single(ROBOT, bodies=["real", "new"]), joint, {"new": "latent"})
    with pytest.raises(ValueError, match="'real' cannot begin as 'real' of .*: its states and actions have .3, 3. ent"):
        begin(single(HOIST, bodies=["real"]), joint, {"real": "real"})
    with pytest.raises(ValueError, match="no embodiment 'arm'"):
        begin(single(ROBOT), joint, {"arm": None})
    with pytest.raises(ValueError, match="is no beginning for this model"):
        begin(single(ROBOT, layers=3), joint)
    (tmp_path / "unended").mkdir()
    with pytest.raises(ValueError, match="a training that has not ended, which does not say which bodies it has"):
        begin(single(ROBOT), tmp_path / "unended", {"dream": None})
    with pytest.raises(ValueError, match="start_bodies is .*, and there is no stage.start"):
        train(folder, tmp_path / "q", start_bodies={"hoist": None})
