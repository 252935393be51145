"""How a saved policy acts is set where it is asked."""

from pathlib import Path

import numpy as np
import yaml
from hydra.utils import instantiate

import conf
from dreamgen.core.clip import Observation
from dreamgen.policies.encoder import TinyEncoder
from dreamgen.policies.policy import FlowPolicy
from jobs.recipe import load
from jobs.running import check, record


def test_settings_of_acting(tmp_path: Path):
    settings = ["stage.policy.euler_steps=2", "stage.policy.compile=default", "stage.policy.speaks=dream"]
    cfg = load("serve", [f"stage.policy.path={tmp_path}"])[0]
    robot = instantiate(cfg.embodiment, _convert_="all")
    encoder = TinyEncoder(width=20, channels=(6, 10), halvings=1, keypoints=4, patches=2, text_width=11, buckets=31)
    saved = FlowPolicy(robot=robot, encoder=encoder, horizon=5, layers=2, heads=2, head_width=8, euler_steps=3).eval()
    saved.save(tmp_path)
    same = instantiate(cfg.stage.policy, _convert_="all")
    node = load("serve", [f"stage.policy.path={tmp_path}", *settings])[0].stage
    check(node)
    other = instantiate(node.policy, _convert_="all")
    assert (other.euler_steps, other.config["compile"], other.speaks) == (2, "default", 1)
    rng = np.random.default_rng(0)
    views = {v.name: rng.integers(0, 256, (v.height, v.width, 3), dtype=np.uint8) for v in robot.views}
    seen = [Observation(views=views, state=np.zeros(robot.state_dim, np.float32), instruction="open the drawer")]
    three = saved.act(seen, [3])
    np.testing.assert_array_equal(same.act(seen, [3]), three)
    saved.euler_steps, saved.speaks, other.compiling = 2, 1, None  # it would take a minute
    two = other.act(seen, [3])
    np.testing.assert_array_equal(two, saved.act(seen, [3]))
    assert np.abs(two - three).max() > 1e-4


def test_what_a_server_of_another_stack_does_not_say_is_told_with_a_plus():
    remote = ["stage.policy._target_=dreamgen.serve.clients.OpenpiPolicy.load", "stage.policy.path=ws://127.0.0.1:8000"]
    node = load("evaluate", [*remote, "+stage.policy.horizon=50", "+stage.policy.key=secret"])[0].stage
    check(node)
    assert node.policy.horizon == 50 and "secret" not in str(record(node))


def test_stages_that_ask_a_policy_are_alike():
    folder = Path(conf.__file__).parent / "stage"
    serve, evaluate, open_loop = (yaml.safe_load((folder / f"{name}.yaml").read_text())["policy"]
                                  for name in ("serve", "evaluate", "open_loop"))  # fmt: skip
    assert serve == evaluate == open_loop and {"compile", "euler_steps", "speaks"} < serve.keys()
