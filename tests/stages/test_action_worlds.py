"""Training an action-conditioned world model and a tracker on a tiny random pipeline and drawn squares."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from dreamgen.core.clip import Episode, Past, Prompt
from dreamgen.core.kinematics import follow
from dreamgen.core.seeding import rng_for
from dreamgen.data.groups import others
from dreamgen.data.lerobot import Dataset
from dreamgen.data.motion import motion_of, weights
from dreamgen.data.writer import write_dataset
from dreamgen.engine.train import read_losses
from dreamgen.stages.action_windows import Source
from dreamgen.stages.evaluate_world import evaluate_world
from dreamgen.stages.finetune_actions import Check, finetune_actions
from dreamgen.stages.train_tracker import train_tracker
from dreamgen.worlds.action import ActionWorld
from dreamgen.worlds.prefix import PrefixWorld, open_pipeline
from dreamgen.worlds.rollout import rollout
from dreamgen.worlds.tracker import KeypointTracker
from tests.worlds.conftest import pipeline_folder  # noqa: F401
from tests.worlds.test_action import CAMERA, robot

TEXTS = ["open the drawer", "put the red block on the plate"]


def drawn(place: np.ndarray) -> np.ndarray:
    """A bright square where the camera sees a point (3,)."""
    picture = np.full((32, 48, 3), 40, np.uint8)
    (u, v), _ = CAMERA.project(place)
    y, x = int(np.clip(32 * v, 2, 29)), int(np.clip(48 * u, 2, 45))
    picture[y - 2 : y + 3, x - 2 : x + 3] = (250, 200, 30)
    return picture


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    root = tmp_path_factory.mktemp("squares") / "play"
    episodes = []
    for i in range(5):
        rng = np.random.default_rng(i)
        action = rng.uniform(-0.2, 0.2, (25, 4)).astype(np.float32)
        action[:, 2], action[:, 3] = 0, np.sign(action[:, 3])
        state = follow(robot(), np.array([0, 0, 0, 1], np.float32), action)[0][:-1]
        measured = state + np.array([0.02, 0, 0.01, 0.4], np.float32) * (np.arange(25)[:, None] > 0)  # not as commanded
        episodes.append(Episode(
            instruction=TEXTS[i % 2], state=measured, action=action,
            video={"front": np.stack([drawn(s[:3]) for s in state])}, extra={"object.hand": state[:, :3]},
            meta={"seed": i, "success": bool(i % 2)},
        ))  # fmt: skip
    write_dataset(root, episodes, robot())
    return Dataset(root, robot())


@pytest.fixture(scope="module")
def pipe(pipeline_folder):  # noqa: F811
    return open_pipeline(str(pipeline_folder))


@pytest.fixture
def make(pipeline_folder, pipe):  # noqa: F811
    def built(**changed) -> ActionWorld:
        torch.manual_seed(0)
        world = PrefixWorld(robot=robot(), path=str(pipeline_folder), frames=9, steps=2, guidance=1.0, text_length=15,
                            precision="fp32", pipeline=pipe)  # fmt: skip
        return ActionWorld(world=world, width=20, **{"maps": True, "history": [0.2], **changed})

    return built


def test_a_row_of_a_batch_is_what_a_rollout_sees(make, dataset, tmp_path):
    world = make()
    source = Source(world, dataset, hop=4, validation=1, root=tmp_path, seed=0)
    assert [len(source.held), len(source.windows), len(source.train)] == [1, 5 * 3, 4 * 3]
    list(source.cache.build(source.encode))
    k = source.number[2, 8]
    row = source.row(k, 5)
    assert row["latents"].shape == (6, 2, 4, 6) and row["features"].shape == (1, 16) and row["maps"].shape[:2] == (8, 2)
    assert np.allclose(row["ages"], [0.4, 0.2])  # rows 0 and 4 of a robot at 20 Hz
    frames = torch.from_numpy(dataset.canvas(2, [0, 4]))[:, None]
    assert np.allclose(row["memory"], world.encode(frames)[:, :, 0].transpose(0, 1).numpy(), atol=1e-5)
    assert world.memory_rows(4) == [0, 2]  # the same moments, in frames of a video at 10 Hz
    episode, seen = dataset.episode(2), []
    prompt = Prompt(id="x", image=dataset.canvas(2, [0])[0], instruction="", seed=0, state=episode.state[0])

    def chunk(pasts: list, actions: list) -> list:
        seen.append(world.drawn(np.arange(0, 9, 2), actions[0], pasts[0].state))
        return [np.zeros((4, 32, 48, 3), np.uint8)]

    for part in (episode.action[:8], episode.action[:16]):
        rollout(chunk, world.robot, world.clock.with_frames(5), [Past.begin(prompt, 4)], [part])
    assert np.allclose(row["maps"], seen[-1]) and len(seen) == 3
    assert not np.allclose(row["maps"], world.drawn(np.arange(0, 9, 2), episode.action[8:16], episode.state[8]))


def test_windows_of_labelled_video_show_their_own_rows(make, dataset, tmp_path):
    """Its pictures stand for two rows; those between are of the row before."""
    episodes, clock = [], make().clock
    for i in range(3):
        source, fresh = dataset.episode(i), np.arange(25) % 2 == 0
        episodes.append(replace(source, video=dataset.views(i, np.arange(25) // 2 * 2),
                                extra={"frame_fresh": fresh[:, None].astype(np.float32)}))  # fmt: skip
    write_dataset(tmp_path / "labels", episodes, robot())
    data = Dataset(tmp_path / "labels", robot())
    source = Source(make(history=[0.15]), data, hop=1, validation=0, root=tmp_path / "cache", seed=0)
    assert [source.places[k][1] for k in source.train] == [0, 2, 4, 6, 8] * 3 and source.old == 3 * 4
    list(source.cache.build(source.encode))
    row = source.row(source.number[1, 6], 5)  # 0.15 s before row 6 is row 3, which shows row 2
    assert np.allclose(row["ages"], [0.3, 0.2])
    assert np.allclose(row["memory"][:, 1], source.cache[source.number[1, 2]][: len(row["memory"]), 0], atol=1e-3)
    assert clock.rows.tolist() == list(range(0, 17, 2))
    with pytest.raises(
        ValueError, match="of 6 windows of .* none is left to train on: 6 show pictures of earlier rows"
    ):
        slow = replace(episodes[0], extra={"frame_fresh": (np.arange(25) % 3 == 0)[:, None].astype(np.float32)})
        write_dataset(tmp_path / "slow", [slow, slow], robot())
        Source(make(), Dataset(tmp_path / "slow", robot()), hop=4, validation=0, root=tmp_path / "cache", seed=0)


def test_other_actions_are_those_of_another_first_state(make, dataset, tmp_path):
    assert others(["a", "a", "b", "b", "c"]) == [2, 2, 4, 4, 0] and others(["a", "a"]) == [1, 0] and others([]) == []
    held = [Source(make(), dataset, hop=4, validation=1, root=tmp_path, seed=seed) for seed in (0, 1, 2)]
    for source in held:
        list(source.cache.build(source.encode))
    check = Check(make(), held, tmp_path, lambda texts: torch.zeros(len(texts), 15, 32), samples=3, size=4, seed=0,
                  write=False)  # fmt: skip
    assert [source for source, _ in check.rows[:3]] == held and len(check.rows) == 16 and len(check.prompts) == 3


def test_samples_are_dreamt_a_few_at_a_time_and_out_of_memory_names_their_setting(make, dataset, tmp_path, monkeypatch):
    world, dreamt, sizes = make(), {}, []
    source = Source(world, dataset, hop=4, validation=1, root=tmp_path, seed=0)
    list(source.cache.build(source.encode))
    check = partial(Check, world, [source] * 3, tmp_path, lambda texts: torch.zeros(len(texts), 15, 32), seed=0,
                    samples=3, write=False)  # fmt: skip
    dream = PrefixWorld.dream
    monkeypatch.setattr(PrefixWorld, "dream", lambda self, prompts: sizes.append(len(prompts)) or dream(self, prompts))
    for size in (4, 2):
        dreamt[size] = np.stack(check(size=size)._dreamed(world, 7)).astype(int)
    assert sizes == [3, 2, 1] and np.abs(dreamt[4] - dreamt[2]).max() <= 1  # one and three round otherwise

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PrefixWorld, "descend", full)
    with pytest.raises(ValueError, match="out of memory dreaming samples at step 7, 2 at a time.*stage.samples=0"):
        check(size=2)._dreamed(world, 7)


def test_an_instruction_is_asked_for_before_anything_is_encoded_and_only_where_it_is_read(make, dataset, tmp_path,
                                                                                         monkeypatch):  # fmt: skip
    def missing(*_):
        raise ValueError("it has no instruction")

    options = dict(steps=1, batch_size=2, hop=8, validation=1, samples=1, method="actions", record={})
    for given, words in ((lambda *_: "put the red block " * 3, "a prompt has .* text_length is 15"),
                         (missing, "it has no instruction")):  # fmt: skip
        monkeypatch.setattr(Dataset, "instruction", given)
        with pytest.raises(ValueError, match=words):
            finetune_actions(make(), [dataset], out=tmp_path, **options)
        assert not (tmp_path / "cache").exists()
    assert finetune_actions(make(instructions=False), [dataset], out=tmp_path / "none", **options)["results"]


def test_windows_in_which_much_is_commanded_are_drawn_more_often(make, dataset, tmp_path):
    make = partial(Source, make(), dataset, hop=4, validation=1, root=tmp_path, seed=0)
    source = make(rest=0.2)
    motion = motion_of(dataset.robot.action, [dataset.episode(i).action for i in range(len(dataset))])
    moved = np.array([motion[i][start : start + 16].mean() for i, start in (source.places[k] for k in source.train)])
    wanted = weights(moved, 0.2) / weights(moved, 0.2).sum()
    assert wanted.max() > 1.2 * wanted.min()
    drawn = [source.draw(rng_for(3, "draw", n)) for n in range(4000)]
    found = np.array([drawn.count(k) for k in source.train]) / 4000
    assert np.abs(found - wanted).max() < 0.03
    alike = [make(rest=1.0).draw(rng_for(3, "draw", n)) for n in range(400)]
    assert set(alike) == set(source.train.tolist())


def test_it_trains_saves_and_dreams_on(make, dataset, tmp_path):
    options = dict(steps=4, batch_size=3, lr=1e-2, warmup=1, hop=4, validation=2, validate_every=0, samples=1, seed=1,
                   method="actions", record={})  # fmt: skip
    done = finetune_actions(make(), [dataset, dataset], out=tmp_path, shares=[1, 2], **options)
    assert done["results"]["lengths"] == [5, 9] and done["results"]["validation"] == 2
    last = read_losses(tmp_path)[-1]
    assert last["val_loss"] > 0 and last["val_loss_shuffled"] > 0 and last["val_loss_without"] > 0
    assert (tmp_path / "samples" / "step_000004.mp4").is_file()
    world = ActionWorld.load(tmp_path)
    assert not torch.equal(world.extension.normaliser.scale, torch.ones(16))
    assert (world.extension.proj_out.weight != 0).any()
    episode = dataset.episode(0)
    prompt = Prompt(id="x", image=dataset.canvas(0, [0])[0], instruction=TEXTS[0], seed=3, state=episode.state[0],
                    action=episode.action[:24])  # fmt: skip
    assert world.dream([prompt])[0].video.shape == (13, 32, 48, 3)
    assert finetune_actions(make(), [dataset, dataset], out=tmp_path, shares=[1, 2], **options)["id"] == done["id"]
    told, read, place = [], world.read, world.place
    world.read, world.place = lambda texts: told.append(texts) or read(texts), lambda: told.append("placed") or place()
    found = evaluate_world(world, dataset, out=tmp_path / "world", episodes=2, films=0, record={})["results"]
    assert set(told[0]) <= set(TEXTS) and told[1:] == ["placed"]
    assert found["frames"] == 13 and found["drift"]["1s"]["psnr"] > 0 and found["listening"]["pixels"] > 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_transformer_trains_too(pipeline_folder, dataset, tmp_path, method):  # noqa: F811
    torch.manual_seed(0)
    base = PrefixWorld(robot=robot(), path=str(pipeline_folder), frames=9, steps=2, guidance=1.0, text_length=15,
                       precision="fp32")  # fmt: skip
    before = {name: value.clone() for name, value in base.transformer.state_dict().items()}
    world = ActionWorld(world=base, width=20, history=[0.2])
    options = {} if method == "full" else {"method": "lora", "rank": 2, "alpha": 2}  # full is the default
    done = finetune_actions(world, [dataset], out=tmp_path, steps=2, batch_size=2, lr=1e-2, warmup=1, ema=None, hop=8,
                            validation=0, record={}, **options)  # fmt: skip
    assert done["results"]["validation"] == 0
    again = ActionWorld.load(tmp_path, robot=robot(), steps=2)
    after = again.world.transformer.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after.get(name, value), value)}
    assert bool(moved) == (method == "full") and any("lora" in name for name in after) == (method == "lora")
    episode = dataset.episode(0)
    prompt = Prompt(id="x", image=dataset.canvas(0, [0])[0], instruction=TEXTS[0], seed=3, state=episode.state[0],
                    action=episode.action[:16])  # fmt: skip
    world.world.steps, videos = 2, [one.dream([prompt])[0].video.astype(int) for one in (world.eval(), again)]
    assert np.abs(videos[0] - videos[1]).max() <= 1


def test_bad_settings_are_named(make, dataset, tmp_path):
    for changed, message in (({"method": "half"}, "method is 'half'"), ({"shares": [1, 2]}, "for 1 datasets"),
                             ({"lengths": [7]}, r"lengths are \[7\]"), ({"rest": 0.0}, "rest is 0.0")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            finetune_actions(make(), [dataset], out=tmp_path, record={}, **changed)


def test_the_tracker_learns_where_things_are(dataset, tmp_path):
    small = partial(KeypointTracker, robot=robot(), channels=[8, 12], keypoints=6, width=24)
    done = train_tracker(small, [dataset], out=tmp_path, held_out=1, steps=120, batch_size=24, lr=2e-2, warmup=5,
                         precision="fp32", record={})  # fmt: skip
    spread = np.median(np.linalg.norm(dataset.states()[:, :3] - dataset.states()[:, :3].mean(0), axis=1))
    assert done["results"]["error"]["hand"] < 0.8 * spread
    tracker = KeypointTracker.load(tmp_path, robot=robot())
    assert tracker.names == ("hand",) and tracker.track(dataset.canvas(1, [0, 5, 9])).shape == (3, 1, 3)
    with pytest.raises(ValueError, match="the tracker of 'gripper' reads"):
        tracker.track(np.zeros((2, 8, 8, 3), np.uint8))
