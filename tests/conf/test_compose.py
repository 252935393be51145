"""Every option of every group and every step of every experiment composes, and names only what is there."""

import inspect
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import _locate, instantiate
from omegaconf import OmegaConf

import conf
from dreamgen.core.manifest import differences
from jobs.cli import commands
from jobs.recipe import Recipe, lines, load
from jobs.running import ALLOWED, check, record, walk

CONF = Path(conf.__file__).parent
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and not path.name.startswith("_"))
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
EXPERIMENTS = [option for group, option in OPTIONS if group == "experiment"]
STAGES = [option for group, option in OPTIONS if group == "stage"]
DOWNLOADS = {"flow_published", "siglip2", "dino", "cosmos3"}  # weights from a hub: composed here, not built
NEEDED = dict.fromkeys(("gr1", "gr1_smoke"), ["data.root=some/folder"])  # what an experiment leaves to the command line
NEEDED["robot"] = ["data.root=some/folder", "embodiment=gr1"]


def job_of(stage: str) -> str:
    """The job that runs a stage: of the same name, or `evaluate`, which runs whatever `stage=` names."""
    return stage if stage in commands() else "evaluate"


def steps(experiment: str) -> list[tuple[str, str]]:
    """(job, step) of an experiment."""
    recipe = load("pipeline", [f"experiment={experiment}", *NEEDED.get(experiment, [])])[0]
    return [(shlex.split(line)[0], name) for name, line in lines(recipe).items()]


STEPS = [(experiment, *step) for experiment in EXPERIMENTS for step in steps(experiment)]


def nodes(node: Any) -> Iterator[dict]:
    """All parts of a plain configuration that name what they are."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        node = list(node.values())
    for child in node if isinstance(node, list) else ():
        yield from nodes(child)


def require_fitting(plain: Any) -> None:
    """Every `_target_` is there and takes the keys that it is given."""
    for node in nodes(plain):
        target = _locate(node["_target_"])
        assert node["_target_"].startswith(ALLOWED)
        given = {
            key: value for key, value in node.items() if key not in ("_target_", "_partial_", "_convert_", "_args_")
        }
        inspect.signature(target).bind_partial(**given)


def test_all_groups_are_keys_of_the_recipe() -> None:
    assert set(GROUPS) <= set(Recipe.__dataclass_fields__)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_fits(group: str, option: str) -> None:
    cfg, _ = load(job_of(option) if group == "stage" else "collect", [f"{group}={option}", *(NEEDED.get(option, []))])
    if group not in ("launcher", "experiment", "stage", "data") and cfg[group] is not None:
        require_fitting(OmegaConf.to_container(cfg[group], resolve=True))


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "embodiment"])
def test_every_embodiment_can_be_built(option: str) -> None:
    cfg, _ = load("collect", [f"embodiment={option}"])
    robot = instantiate(cfg.embodiment, _convert_="all")
    assert robot.action_dim > 0 and robot.canvas[0] > 0


@pytest.mark.parametrize(
    "option", [option for group, option in OPTIONS if group == "labeler" and option not in DOWNLOADS]
)
def test_every_labeler_can_be_built(option: str) -> None:
    cfg, _ = load("label", [f"labeler={option}"])
    labeler = instantiate(cfg.labeler, _convert_="all")
    assert getattr(labeler, "source", labeler.robot).name == "tabletop"


@pytest.mark.parametrize(("experiment", "job", "step"), STEPS)
def test_every_step_of_every_experiment_fits(experiment: str, job: str, step: str) -> None:
    cfg, _ = load(job, [f"experiment={experiment}", f"step={step}", *NEEDED.get(experiment, [])])
    assert cfg.stage.out.endswith(step)
    check(cfg.stage)
    require_fitting(OmegaConf.to_container(cfg.stage, resolve=True))


@pytest.mark.parametrize("option", STAGES)
def test_every_setting_of_a_stage_can_be_set(option: str) -> None:
    """Without a `+`: whatever the function takes stands in the YAML."""
    cfg, _ = load(job_of(option), [f"stage={option}"])
    assert set(cfg.stage) - {"_target_"} == set(inspect.signature(_locate(cfg.stage._target_)).parameters) - {"record"}


@pytest.mark.parametrize("job", [name for name in commands() if name != "check"])
def test_every_job_has_a_primary_config(job: str) -> None:
    cfg, _ = load(job)
    assert job == "pipeline" or cfg.stage._target_.endswith(f".{job}")


# folders that take a second run of a job, under a name of their own: `dreamgen collect step=heldout seed=1000`
SECOND = {"heldout", "play", "perturbed", "outcomes", "looks", "stock", "target", "heldout_dreams", "heldout_labels",
          "counterfactuals", "alternatives", "alternatives_truth"}  # fmt: skip


def test_each_stage_writes_where_the_next_one_reads() -> None:
    """Without a recipe, as the README's table has them: `dreamgen collect`, `dreamgen finetune`, `dreamgen dream`."""
    plain = {job: OmegaConf.to_container(load(job)[0].stage, resolve=True) for job in commands()
             if job not in ("check", "pipeline")}  # fmt: skip
    made = {stage.pop("out") for stage in plain.values()}
    assert len(made) == len(plain)
    for job, stage in plain.items():
        read = {text for _, text in walk(stage) if text.startswith("runs/default/")} - made
        assert {text.rpartition("/")[2] for text in read} <= SECOND, job
    assert {"runs/default/world", "runs/default/dreams", "runs/default/labeler", "runs/default/policy"} <= made


def test_a_job_runs_the_step_of_a_recipe_that_it_would_write() -> None:
    """Unless another one is named, or that one is another job's."""
    named, unnamed = (load("finetune", ["experiment=demo", *words])[0] for words in (["step=world"], []))
    assert named == unnamed and unnamed.stage.hop == 2
    assert load("evaluate", ["experiment=demo", "stage=labels"])[0].stage.out == "runs/demo/evaluate_labels"
    assert load("evaluate", ["stage=labels"])[0].stage.out != load("label")[0].stage.out


def test_a_policy_of_latent_actions_is_as_wide_as_its_labeler() -> None:
    for option, width in (("flow", 16), ("latent_continuous", 16), ("latent_quantised", 32)):
        cfg, _ = load("train_policy", [f"labeler={option}", "policy=tiny_latent"])
        assert cfg.policy.robots.latent.action[0].stop == width


def test_the_sweep_scores_each_labeler_on_its_labels_of_the_same_dreams() -> None:
    for size in (10, 50, 200, 500):
        made, scored = (load(job, ["experiment=labels_sweep", f"step={step}_{size}"])[0].stage
                        for job, step in (("label", "labels"), ("evaluate", "scores")))  # fmt: skip
        assert scored.dreams == made.out and scored.labeler.path == made.labeler.path
        assert made.clips.endswith("heldout_dreams")


def test_the_evaluators_judge_is_calibrated_on_the_dreams_that_it_judges() -> None:
    judge, *others = (
        record(load(job, ["experiment=evaluator", f"step={step}"])[0].stage)["world_model"]
        for job, step in (("train_judge", "judge"), ("evaluate", "tried"), ("evaluate", "correlation"))
    )
    assert judge["steps"] == 8 and [differences(judge, other) for other in others] == ["", ""]


def test_the_evaluators_policies_that_the_world_model_knows_are_apart() -> None:
    def folders(node: Any) -> set[str]:
        return {text for _, text in walk(OmegaConf.to_container(node, resolve=True)) if "/policy_" in text}

    learned = load("finetune_actions", ["experiment=evaluator", "step=action_world"])[0].stage.datasets
    novices = [one.root.rpartition("/")[2] for one in learned if "novice" in one.root]
    known = [folders(load("collect", ["experiment=evaluator", f"step={step}"])[0].stage.policy) for step in novices]
    for step in ("correlation", "correlation_perfect"):
        stage = load("evaluate", ["experiment=evaluator", f"step={step}"])[0].stage
        own = {name: folders(policy) for name, policy in stage.policies.items()}
        assert set().union(*(own.pop(name) for name in stage.seen)) == set().union(*known)
        assert len(own) == 24 == len(set().union(*own.values()) - set().union(*known))
        assert step != "correlation" or set(stage.demos) == {*own, *stage.seen}


def test_streams_of_actions_need_actions() -> None:
    """Prompts that bring none are refused by the mode; which prompts they are is no other result."""
    words = ["mode=actions", "prompts.sim=null", "prompts.dataset=${heldout}", "prompts.keyframes=[0,0.5]"]
    stage = load("dream", words)[0].stage
    check(stage)
    assert stage.prompts._target_.endswith(".ActionPrompts") and stage.prompts.dataset.root == "runs/default/heldout"
    other = load("dream", ["mode=actions", "prompts=dataset"])[0].stage
    assert stage.needs_actions and other.needs_actions and not load("dream")[0].stage.needs_actions
    assert "needs_actions" not in record(stage)


def test_episodes_that_are_asked_for_are_those_that_are_exported() -> None:
    """But for what a recipe exports beside the recordings, which has numbers of its own."""
    asked = ["data=folder", "data.root=some/folder", "data.episodes=[0,1,3]"]
    for words in (asked, ["experiment=gr1", "step=recorded_groot", *asked[1:]]):
        assert load("export", words)[0].stage.data.episodes == [0, 1, 3]
    for words in (["data=folder", "data.root=d"], ["experiment=gr1", "step=labels_groot", *asked[1:]]):
        assert load("export", words)[0].stage.data.episodes is None


def test_an_experiment_says_which_question_it_answers() -> None:
    for option in EXPERIMENTS:
        first = (CONF / "experiment" / f"{option}.yaml").read_text().splitlines()[:2]
        assert first[0] == "# @package _global_" and first[1].startswith("# ") and "?" in first[1], option
