"""A world model is fine-tuned on recordings of robots with other rates and views: each keeps its own."""

from dataclasses import replace

import numpy as np

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment
from dreamgen.data.buckets import ClipPool
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.stages.latents import Latents
from tests.worlds import zoo

ONE, TWO = zoo.robot(), replace(zoo.robot(16, 32, ("left", "wrist")), name="other", robot_hz="50")


def recorded(root, robot: Embodiment) -> Dataset:
    """Two episodes, of 41 rows each."""
    rng = np.random.default_rng(1)
    write_dataset(root, [
        Episode(instruction=text, state=np.zeros((41, 2), np.float32), action=np.zeros((41, 3), np.float32),
                video={v.name: rng.integers(0, 256, (41, v.height, v.width, 3), np.uint8) for v in robot.views},
                meta={})
        for text in zoo.TEXTS[:2]
    ], robot)  # fmt: skip
    return Dataset(root, robot)


def test_each_clip_is_told_by_the_views_of_its_own_robot(tmp_path):
    world = zoo.world("wan22_ti2v_5b", "", pipeline=zoo.build("wan22_ti2v_5b"), template="{views} {instruction}",
                      text_length=90)  # fmt: skip
    pool = ClipPool([recorded(tmp_path / "one", ONE), recorded(tmp_path / "two", TWO)], world.clock, hop=5)
    latents = Latents(world, pool, tmp_path, transform={})
    embedded, which = latents.texts(tmp_path, base="b", first=True)
    assert len(embedded) == 5 and len(set(which.tolist())) == 4  # and no text
    views = "The video shows 2 views of one robot: left is the view 'left', right is the view 'wrist'. "
    for k, number in enumerate(which.tolist()):
        told = views * (pool.episode(k)[0] == 1) + pool.instruction(k)
        assert latents.prompts[number] == world.prompt(pool.instruction(k), pool.robot(k)) == told
        assert np.array_equal(embedded.take(which[k : k + 1]), world.texts.take([told], world.device))


def test_latents_of_another_rate_are_others(tmp_path):
    """Those of a robot of the world model's rate are the ones that were always found."""
    data, keys = recorded(tmp_path / "one", ONE), []
    world = zoo.world("wan22_ti2v_5b", "", pipeline=zoo.build("wan22_ti2v_5b"))
    for robot in (ONE, replace(ONE, robot_hz="10")):
        data.robot = robot
        latents = Latents(world, ClipPool([data], world.clock), tmp_path, transform={"hop": 1})
        keys += [cache.key for cache in latents.caches.values()]
    assert [key["transform"].get("rates") for key in keys] == [None, ["10"]]
