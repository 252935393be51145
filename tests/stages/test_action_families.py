"""Training actions into every family on a Wan transformer, on adapters, in parts, and on recordings with gaps."""

from functools import partial

import numpy as np
import pytest
import torch

from dreamgen.core.clip import Episode, Prompt
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.engine.train import read_losses
from dreamgen.stages.action_windows import Source
from dreamgen.stages.finetune_actions import finetune_actions
from dreamgen.worlds.action import ActionWorld
from tests.stages.test_action_worlds import TEXTS, drawn
from tests.worlds import zoo
from tests.worlds.test_action import disturbed
from tests.worlds.test_action import robot as gripper

ROWS, NAMES = 25, ["wan22_ti2v_5b", "wan21_i2v_14b", "wan22_i2v_a14b"]
OPTIONS = dict(steps=2, batch_size=4, warmup=1, hop=4, ema=None, validation=1, samples=0, record={})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    root, rng = tmp_path_factory.mktemp("noise") / "play", np.random.default_rng(4)
    write_dataset(root, [
        Episode(instruction="open the drawer", state=np.zeros((ROWS, 2), np.float32),
                action=rng.uniform(-0.2, 0.2, (ROWS, 3)).astype(np.float32),
                video={"front": rng.integers(0, 255, (ROWS, 16, 32, 3), np.uint8)}, meta={"pair": "ab"[i // 4]})
        for i in range(6)
    ], zoo.robot())  # fmt: skip
    return Dataset(root, zoo.robot())


def prompt(**changed) -> Prompt:
    image = np.random.default_rng(1).integers(0, 255, (16, 32, 3), np.uint8)
    return Prompt(**{"id": "p", "image": image, "instruction": "open the drawer", "seed": 4,
                     "action": np.full((8, 3), 0.1, np.float32), **changed})  # fmt: skip


def apart(one: ActionWorld, other: ActionWorld, asked: Prompt) -> int:
    a, b = (world.dream([asked])[0].video.astype(int) for world in (one, other))
    return int(np.abs(a - b).max())


@pytest.mark.parametrize("name", NAMES)
def test_each_family_trains_on_all_lengths_and_is_validated(name, dataset, tmp_path):
    """Two windows are held out, under noise above and below the boundary of two experts."""
    base = zoo.world(name, zoo.save(name, tmp_path / "base"), steps=2, guidance=1.0)
    world = ActionWorld(world=base, width=8)
    done = finetune_actions(world, [dataset], out=tmp_path / "out", **OPTIONS)["results"]
    assert done["lengths"] == [5, 9] and done["validation"] >= 2
    last = read_losses(tmp_path / "out")[-1]
    assert all(np.isfinite(last[f"val_{key}"]) for key in ("loss", "loss_shuffled", "loss_without"))
    assert len({last["val_loss"], last["val_loss_without"]}) == 2
    again = ActionWorld.load(tmp_path / "out", steps=2, guidance=1.0)
    assert again.moved and apart(world, again, prompt()) <= 1


def test_one_expert_alone_is_not_taught_actions(dataset, tmp_path):
    base = zoo.world("wan22_i2v_a14b", "", pipeline=zoo.build("wan22_i2v_a14b"), expert="high")
    with pytest.raises(ValueError, match="its expert 'high' alone, .* set stage.world_model.world.expert=both"):
        finetune_actions(ActionWorld(world=base, width=8), [dataset], out=tmp_path, **OPTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_a_shorter_clip_is_cut_from_the_latents_of_a_longer_one(name):
    world = zoo.world(name, "", pipeline=zoo.build(name))
    frames = torch.from_numpy(np.random.default_rng(2).integers(0, 255, (2, 9, 16, 32, 3), np.uint8))
    short = world.encode(frames[:, :5])
    assert torch.allclose(world.cut(world.encode(frames), 5), short, atol=1e-5)
    whole = world.encode(frames)
    assert torch.equal(world.cut(whole, 9), whole)


def test_the_loss_of_two_experts_is_the_mean_of_each_ones_rows():
    base = zoo.world("wan22_i2v_a14b", "", pipeline=zoo.build("wan22_i2v_a14b"))
    world = disturbed(ActionWorld(world=base, width=8, anchor=False, history=()))
    latents, text = torch.randn(3, 8, 3, 2, 4), world.embed(["open the drawer"] * 3)
    batch = {"latents": latents, "text": text, "features": torch.randn(3, 2, 12), "noise": torch.randn_like(latents),
             "sigma": torch.tensor([0.95, 0.2, 0.97])}  # fmt: skip
    alone = [world.loss({key: value[k : k + 1] for key, value in batch.items()})[0] for k in range(3)]
    assert world.loss(batch)[0] == pytest.approx(float(sum(alone)) / 3, rel=1e-5)


@pytest.mark.parametrize("name", ["wan22_ti2v_5b", "wan21_i2v_14b"])
def test_parts_and_checkpointing_change_nothing_but_rounding(name, dataset, tmp_path):
    found, base = {}, zoo.save(name, tmp_path / "base")
    for out, options in (("plain", {}), ("less", {"accumulate": 2, "checkpointing": True})):
        torch.manual_seed(0)
        world = disturbed(ActionWorld(world=zoo.world(name, base), width=8))
        finetune_actions(world, [dataset], out=tmp_path / out, lr=1e-3, **OPTIONS, **options)
        found[out] = {**world.state_dict()}
        assert not world.world.transformer.is_gradient_checkpointing
    moved = [key for key, value in found["plain"].items() if key.startswith("extension.") and value.ndim > 1]
    assert all(torch.allclose(found["plain"][k], found["less"][k], atol=1e-4) for k in moved)
    one, other = (read_losses(tmp_path / out)[-1] for out in ("plain", "less"))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)
    with pytest.raises(ValueError, match="4 rows cannot be cut into 5 parts"):
        finetune_actions(world, [dataset], out=tmp_path / "more", **OPTIONS, accumulate=5)


@pytest.mark.parametrize("method", ["actions", "lora"])
def test_a_world_model_with_an_adapter_takes_actions(dataset, tmp_path, method):
    zoo.save("wan22_ti2v_5b", tmp_path / "base")
    base = zoo.world("wan22_ti2v_5b", tmp_path / "base", steps=2, guidance=1.0)
    plain = base.dream([prompt()])[0].video
    base.train_lora(rank=2, alpha=2)
    with torch.no_grad():
        for parameter in (p for p in base.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn_like(parameter))
    base.requires_grad_(False).save(tmp_path / "robot")
    opened = type(base).load(tmp_path / "robot")
    with pytest.raises(ValueError, match=r"has 1 adapters on it \(default_0\).*fuse_adapters"):
        opened.save(tmp_path / "lost")
    named, silent = opened.fingerprint(), prompt(action=np.zeros((0, 0), np.float32))
    world = ActionWorld(world=opened, width=8, history=[])
    alone = world.dream([silent])[0].video.astype(int)
    assert np.abs(alone - plain).max() > 2
    finetune_actions(world, [dataset], out=tmp_path / "out", method=method, **OPTIONS)
    assert opened.fingerprint() == named and not (tmp_path / "out" / "adapter").exists()
    again = ActionWorld.load(tmp_path / "out")
    assert apart(world, again, prompt()) <= 1
    if method == "actions":  # the world model is still what its adapter made of it
        assert np.abs(again.dream([silent])[0].video.astype(int) - alone).max() <= 1


def test_latents_of_other_episodes_are_not_taken(dataset, tmp_path):
    world = ActionWorld(world=zoo.world(NAMES[0], "", pipeline=zoo.build(NAMES[0])), width=8)
    make = partial(Source, world, hop=8, validation=0, root=tmp_path, seed=0)
    some, others = (make(Dataset(dataset.root, zoo.robot(), episodes=chosen)) for chosen in ([0, 1], [2, 3]))
    list(some.cache.build(some.encode))
    assert not some.cache.missing() and others.cache.missing()
    list(others.cache.build(others.encode))
    assert not np.array_equal(some.cache[0], others.cache[0])


def test_large_clips_are_encoded_a_few_at_a_time(dataset, tmp_path, monkeypatch):
    from dreamgen.worlds import autoencoder

    monkeypatch.setattr(autoencoder, "PIXELS", 9 * 16 * 32)
    world = ActionWorld(world=zoo.world(NAMES[0], "", pipeline=zoo.build(NAMES[0])), width=8)
    source = Source(world, dataset, hop=4, validation=0, root=tmp_path, seed=0)
    assert [len(items) for items in source.cache.missing()][:2] == [4, 4]


def test_windows_that_begin_in_an_unknown_state(tmp_path):
    """Of the first episode all of the state is known, of the second nothing, of the third what maps do not show."""
    robot = gripper()
    episodes = []
    for known in ([1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]):
        state = np.tile(np.array([0.1, 0.2, 0, 1], np.float32), (ROWS, 1)) * known
        episodes.append(Episode(instruction=TEXTS[0], state=state.astype(np.float32),
                                action=np.zeros((ROWS, 4), np.float32),
                                video={"front": np.stack([drawn(s[:3]) for s in state])},
                                extra={"state_known": np.tile(np.array(known, np.float32), (ROWS, 1))}))  # fmt: skip
    write_dataset(tmp_path / "dreams", episodes, robot)
    make = partial(Source, dataset=Dataset(tmp_path / "dreams", robot), hop=8, validation=0, root=tmp_path, seed=0)
    base = partial(zoo.world, NAMES[0], "", robot=robot, pipeline=zoo.build(NAMES[0]))
    drawing = make(ActionWorld(world=base(), maps=True))
    assert sorted({drawing.places[k][0] for k in drawing.train}) == [0] and drawing.unknown == 4
    plain = make(ActionWorld(world=base()))
    assert plain.unknown == 0 and len(plain.train) == 6
    only = Dataset(tmp_path / "dreams", robot, episodes=[1])
    with pytest.raises(ValueError, match="of 2 windows .* none is left.*2 begin in a state that is not known"):
        make(ActionWorld(world=base(), maps=True), dataset=only)
