"""The root of every configuration, and how a command line becomes one.

The root is a dataclass, so an unknown top-level key does not compose; below it the constructors are the schema. An
experiment names its steps: `steps.demos: "collect stage.episodes=280"` is the job `collect` with these overrides, so
`python -m jobs.collect experiment=demo step=demos` does the same as that step of `python -m jobs.pipeline`.
"""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from jobs.dreams import asked
from jobs.kinds import settings

SAMPLED = {"steps": "world_model.steps", "guidance": "world_model.guidance", "best_of": "best_of"}  # of a dream's stage


@dataclass
class Recipe:
    """All top-level keys. The groups are filled by `conf/<group>/<option>.yaml`."""

    name: str = "default"  # of the recipe; names the folder that `out` proposes
    out: str = "runs/default"  # everything is written below it, one folder a step
    step: str = ""  # which of `steps` a job runs, and the folder it writes; a job's primary config proposes one
    steps: dict[str, str] = field(default_factory=dict)  # name: "job override override ...", in order
    instructions: Any = None  # what the target robot is shown; null is all that the simulator knows
    seed: int = 0
    workers: int = 1  # processes; never changes a result
    shard: int = 0
    num_shards: int = 1  # machines or processes that share one step of items; never changes a result
    skip_bad: bool = False  # leave out bad episodes, and count them, instead of stopping at the first
    apart: bool = True  # each step of a pipeline in a process of its own, for its memory's sake
    debug: bool = False  # a traceback before the line that tells the error
    embodiment: Any = None
    data: Any = None
    heldout: Any = None  # a dataset that nothing is trained on
    sim: Any = None
    world_model: Any = None
    prompts: Any = None
    mode: Any = None  # what is dreamed of a first frame: instructions or actions
    labeler: Any = None
    policy: Any = None
    protocol: Any = None  # of the policy server
    filter: Any = None  # name to filter
    judge: Any = None
    stage: Any = None
    launcher: Any = None
    experiment: Any = None


def register() -> None:
    """Make the schema known to Hydra, as `schema` in the defaults list of `conf/recipe.yaml`."""
    ConfigStore.instance().store(name="schema", node=Recipe)


def load(job: str, overrides: Sequence[str] = ()) -> tuple[DictConfig, list[str]]:
    """The configuration of a job, or of one of its steps, and the overrides that compose it.

    Raises ValueError for keys that no recipe has and for steps that are none of this job's; Hydra's own exceptions
    for what it refuses itself. A value that begins with `~/` is a path below the home folder, as in a shell.
    """
    overrides = [re.sub(r"^([^=]+=)~(?=/)", lambda found: found[1] + os.path.expanduser("~"), w) for w in overrides]
    register()
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        # what is set within a group may be of one that the step chooses
        which = [word for word in overrides if (key := word.partition("=")[0].lstrip("+~")).startswith("steps.")
                 or "." not in key]  # fmt: skip
        cfg, every = composed(job, with_step(compose(job, overrides=which), job, overrides))
    GlobalHydra.instance().clear()
    unknown = sorted(set(cfg) - {f.name for f in fields(Recipe)})
    if unknown:  # `+foo=1` slips past Hydra
        known = ", ".join(f.name for f in fields(Recipe))
        raise ValueError(f"no recipe has the key{'s' * (len(unknown) > 1)} {', '.join(unknown)}; it has {known}")
    return cfg, every


def composed(job: str, every: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """The configuration under these overrides, and they, those marked that set what no file lists."""
    try:
        return compose(job, overrides=[*every]), [*every]
    except ConfigCompositionException:
        listed = compose(job, overrides=[word for word in every if "." not in word.partition("=")[0]])
        every = [unlisted(listed, word) for word in every]
        return compose(job, overrides=every), every


def unlisted(cfg: DictConfig, word: str) -> str:
    """An override; `+` in front of one for a setting that the constructor knows and no file lists."""
    where, _, name = word.partition("=")[0].rpartition(".")
    node = OmegaConf.select(cfg, where) if re.fullmatch(r"[\w.]+", where) else None
    if (
        not isinstance(node, DictConfig)
        or name in node
        or not str(node.get("_target_")).startswith(("dreamgen.", "idm."))
    ):
        return word
    return f"+{word}" if name in settings(get_object(node._target_)) else word


def with_step(cfg: DictConfig, job: str, overrides: Sequence[str]) -> list[str]:
    """The step's own overrides, then the command line's, which therefore win; but a step's own seed is moved by that of
    the command line, so that the steps of a recipe differ under any: what is held out stays held out.

    Where the command line names no step, it is the one that the job's primary config proposes, and for a stage of
    another name, as `evaluate stage=labels`, a folder of that name. `plan` takes what it knows of the first `finetune`:
    the settings that it has too, the world model, the robot and the dataset; and of the first `dream` (see `dreamt`).
    """
    named = any(word.startswith("step=") for word in overrides)
    stage = next((word.partition("=")[2] for word in reversed(overrides) if word.startswith("stage=")), job)
    name = cfg.step or (job if stage == job else f"{job}_{stage}")
    if job == "plan":  # what the recipe's fine-tuning is asked to do
        tuning = next((words for words in map(shlex.split, lines(cfg).values()) if words[0] == "finetune"), [])
        known = {f"stage.{key}" for key in cfg.stage}
        own = [word for word in tuning if (key := word.lstrip("+").partition("=")[0]) in known
               or key.partition(".")[0] in ("embodiment", "world_model", "data")]  # fmt: skip
        return [*own, *dreamt(cfg, overrides), *overrides, f"step={name}"]
    owner, *own = shlex.split(lines(cfg)[name]) if name in cfg.steps else ["", ""]
    if owner == job:
        seeds = [
            [int(word[5:]) for word in words if re.fullmatch(r"seed=\d+", word)][-1:] for words in (own, overrides)
        ]
        moved = [f"seed={seeds[0][0] + seeds[1][0]}"] if all(seeds) else []
        return [*own, *overrides, *moved, f"step={name}"]
    if named and owner:
        raise ValueError(f"step '{name}' of recipe '{cfg.name}' is run by jobs.{owner}, not by jobs.{job}")
    if named and cfg.steps:
        raise ValueError(f"recipe '{cfg.name}' has no step '{name}'; it has {', '.join(cfg.steps)}")
    return [*overrides, f"step={name}"]


def dreamt(cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """What `plan` asks of a recipe's first `dream` (of instructions, not of actions): how it is sampled, and how many
    there are, as far as is known before."""
    steps = [words for words in map(shlex.split, lines(cfg).values()) if words[0] == "dream"]
    own = next((words[1:] for words in steps if not {"mode=actions", "prompts=actions"} & {*words}), None)
    if own is None:
        return []
    given = [word for word in overrides if re.split("[.=]", word.lstrip("+~"))[0] not in ("stage", "step")]
    stage = composed("dream", [*own, *given])[0].stage
    found = {f"dreaming.{key}": OmegaConf.select(stage, where) for key, where in SAMPLED.items()}
    found["dreams"] = asked(stage.prompts)
    return [f"stage.{key}={value}" for key, value in found.items() if value is not None]


def lines(cfg: DictConfig) -> dict[str, str]:
    """The steps of a recipe as they are written: what stands in `${...}` is resolved where they run."""
    return OmegaConf.to_container(cfg.steps, resolve=False)
