"""A start from a policy whose pretrained encoder was tuned where it is frozen now, or frozen where it is tuned."""

from functools import partial

import pytest
import torch

from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.engine.state import save
from dreamgen.policies.policy import FlowPolicy
from dreamgen.policies.start import begin
from dreamgen.stages.train_policy import train_policy
from tests.policies.test_chunks import episode
from tests.policies.test_pretrained import folders, made, noise  # noqa: F401 (a fixture)
from tests.policies.toy import robot

FLARE = dict(align_weight=0.2, align_layer=1, future_tokens=2, target="qformer")


def moved(model: FlowPolicy) -> FlowPolicy:
    """As after a training of all that is trained; what gives FLARE's targets lags behind."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * p.requires_grad)
        for name, value in model.flare.target.named_buffers():
            if value.is_floating_point() and not (name.startswith("model.") and not model.encoder.tune):
                value.add_(0.25)
    return model


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("tuned", [True, False])
def test_the_encoder_is_taken_and_the_targets_hold_it_as_they_would(folders, tmp_path, tuned, ended):  # noqa: F811
    there = moved(made(folders, "siglip", tune=tuned, **FLARE))
    if ended:
        there.save(tmp_path)
    else:
        save(tmp_path / "training", 1, there, None, [])
    model = made(folders, "siglip", tune=not tuned, **FLARE)
    assert begin(model, tmp_path) == []
    old, new = there.state_dict(), model.state_dict()
    copies = {name for name in new if name.startswith("flare.target.model.")}
    assert all(torch.equal(new[name], old[name]) for name in new if name not in copies)
    assert bool(copies) != tuned and (model.flare.target.model is model.encoder.model) == tuned
    own = {name.removeprefix("encoder."): value for name, value in old.items() if name.startswith("encoder.model.")}
    assert all(torch.equal(new[name], own[name.removeprefix("flare.target.")]) for name in copies)
    assert all(p.requires_grad != tuned for p in model.encoder.model.parameters())


def test_what_an_unended_run_was_begun_with_and_does_not_train_is_kept(folders, tmp_path):  # noqa: F811
    """An encoder that an earlier policy has tuned, and that is frozen now."""
    moved(made(folders, "siglip", tune=True, **FLARE)).save(tmp_path / "tuned")
    want = FlowPolicy.load(tmp_path / "tuned").encoder.model.state_dict()
    write_dataset(tmp_path / "real", [episode(9, video=noise(9))], robot())

    def dies() -> FlowPolicy:
        model, calls = made(folders, "siglip", **FLARE), []
        loss = model.loss
        model.loss = lambda batch: calls.append(1) or (1 / 0 if len(calls) > 1 else loss(batch))
        return model

    run = partial(train_policy, real=Dataset(tmp_path / "real", robot()), out=tmp_path / "p", start=tmp_path / "tuned",
                  steps=2, batch_size=4, checkpoint_every=1, cache_features=False, record={})  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        run(dies)
    model = made(folders, "siglip", **FLARE)
    begin(model, tmp_path / "p")
    assert all(torch.equal(value, want[name]) for name, value in model.encoder.model.state_dict().items())
    run(partial(made, folders, "siglip", **FLARE))
    assert not (tmp_path / "p/training").exists()
