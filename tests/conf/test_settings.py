"""Every setting of a labeler, a dataset and a policy stands in its YAML, so that it can be set without a `+`."""

import inspect
import re
from pathlib import Path

import pytest
from hydra.utils import _locate, instantiate
from omegaconf import OmegaConf

import conf
from dreamgen.core.clock import Clock
from dreamgen.policies.policy import FlowPolicy
from idm.model import FlowIDM
from jobs.recipe import load

CONF = Path(conf.__file__).parent
LABELERS = sorted(path.stem for path in (CONF / "labeler").glob("*.yaml") if "idm." in path.read_text())
POLICIES = sorted(path.stem for path in (CONF / "policy").glob("*.yaml"))
DATA = sorted(path.stem for path in (CONF / "data").glob("*.yaml") if "_target_" in path.read_text())


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group, options in (("labeler", LABELERS), ("data", DATA), ("policy", POLICIES))
     for option in options],
)  # fmt: skip
def test_every_setting_can_be_set(group: str, option: str) -> None:
    node = load("collect", [f"{group}={option}"])[0][group]
    known = set(inspect.signature(_locate(node._target_)).parameters)
    assert set(node) - {"_target_", "_partial_"} == known - {"actions"}  # whose option is data=video


@pytest.mark.parametrize("option", POLICIES)
def test_what_the_docs_name_can_be_set_of_every_policy(option: str) -> None:
    rows = re.findall(r"^\| (`policy\..*?) \|", (CONF.parent / "docs" / "policies.md").read_text(), re.MULTILINE)
    named = {key for row in rows for key in re.findall(r"`policy\.(\w+)`", row)}
    assert {"frame", "target", "speaks"} < named <= set(load("train_policy", [f"policy={option}"])[0].policy)


def test_a_policy_s_settings_are_the_constructor_s_own() -> None:
    node = OmegaConf.to_container(load("train_policy", ["policy=flow"])[0].policy, resolve=True)
    own = {key: a.default for key, a in inspect.signature(FlowPolicy).parameters.items() if key != "robot"}
    assert {key: node[key] for key in own} == own | {"bodies": list(own["bodies"])}


def test_the_settings_are_the_constructor_s_own() -> None:
    """But for the merge rule, what the YAML says of a labeler is what it is without it."""
    node = load("label", ["labeler=flow"])[0].labeler
    made = instantiate(node, _convert_="all")
    plain = FlowIDM(robot=made.robot, clock=made.clock, rule="mean")
    assert made.config | {"augment": {}} == plain.config and made.augment == plain.augment


def test_settings_reach_the_labeler() -> None:
    words = ['labeler.spacings=["2","3/2"]', "labeler.augment.colour=0.12", "labeler.vision={channels: [8, 16]}",
             "labeler.state_weight=0.0", "labeler.precision=fp32",
             "labeler.time_shape=[3.0,2.0]", "seed=7"]  # fmt: skip
    made = instantiate(load("label", words)[0].labeler, _convert_="all")
    assert isinstance(made.clock, Clock) and made.spacings == ["2", "3/2"] and made.seed == 7 and not made.reads_state
    assert (made.augment.colour, made.augment.blur, made.precision, made.time_shape) == (0.12, 0.7, "fp32", (3, 2))
    latent = load("label", ["labeler=latent_quantised", "seed=7", "labeler.target={path: some/tower}"])[0].labeler
    assert (latent.seed, latent.codebook, latent.tokens, latent.target) == (7, 8, 4, {"path": "some/tower"})
    tower = load("label", ["labeler=dino", "labeler.vision.edge=56"])[0].labeler
    assert OmegaConf.to_container(tower.vision)["edge"] == 56 and tower.vision.frozen


@pytest.mark.parametrize(("job", "stage"), [("label", "label"), ("evaluate", "labels")])
def test_a_trained_labeler_is_used_as_it_was_saved_but_for_what_is_said(job: str, stage: str, tmp_path: Path) -> None:
    """Also one that does not know all of these settings."""
    for option in ("flow", "latent_continuous"):
        instantiate(load(job, [f"labeler={option}"])[0].labeler, _convert_="all").save(tmp_path / option)
    words = lambda option: [f"stage={stage}", f"labeler={option}", f"stage.labeler.path={tmp_path / option}"]  # noqa: E731
    opened = lambda *of: instantiate(load(job, [*of])[0].stage.labeler, _convert_="all")  # noqa: E731
    made = opened(*words("flow"), "labeler.rule=first")
    assert (made.rule, made.samples, made.flow_steps, made.correct) == ("mean", 2, 4, 1.0)
    made = opened(*words("flow"), "stage.labeler.rule=first", "stage.labeler.correct=0.0")
    assert (made.rule, made.samples, made.correct) == ("first", 2, 0.0)
    assert opened(*words("latent_continuous")).output == "latent"
    assert opened(*words("latent_continuous"), "stage.labeler.output=actions").output == "actions"


def test_the_published_labeler_has_its_published_training() -> None:
    words = ["labeler=flow_published", "stage=train_labeler_published", "embodiment.robot_hz=30",
             "labeler.clock.video_hz=15/8"]  # fmt: skip
    stage = load("train_labeler", words)[0].stage
    assert (stage.steps, stage.batch_size, stage.lr, list(stage.betas)) == (10000, 16, 1e-4, [0.95, 0.999])
    assert instantiate(stage.labeler.clock).stride == 16 and stage.out == "runs/default/labeler"


def test_the_first_weights_are_those_of_before() -> None:
    """Under seed 0, which recipes have."""
    made = instantiate(load("label", ["labeler=flow"])[0].labeler, _convert_="all")
    plain = FlowIDM(robot=made.robot, clock=made.clock)
    assert made.seed == 0 and all((a == b).all() for a, b in zip(made.parameters(), plain.parameters(), strict=True))
