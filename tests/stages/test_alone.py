"""Stages that are the work of one process say so where several were started."""

import importlib
import inspect
import os
import re
from pathlib import Path
from unittest import mock

import pytest

import dreamgen.stages

TRAINING = ("pretrain", "train_judge", "train_labeler", "train_policy", "train_probe",
            "train_tracker")  # fmt: skip
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize("started", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
@pytest.mark.parametrize("name", TRAINING)
def test_training_on_several_processes_is_refused_before_anything_is_written(name, started, tmp_path):
    stage = inspect.unwrap(getattr(importlib.import_module(f"dreamgen.stages.{name}"), name))  # its types unchecked
    taken = [key for key, given in inspect.signature(stage).parameters.items() if given.default is given.empty]
    with mock.patch.dict(os.environ, started), pytest.raises(ValueError) as told:
        stage(**dict.fromkeys(taken) | {"out": tmp_path / "out"})
    assert str(told.value).startswith(f"{name} is the work of one process, and torchrun or srun has started 2")
    assert not (tmp_path / "out").exists()


def test_no_training_is_left_out():
    """All but `finetune` and `finetune_actions`, whose processes share the work."""
    files = sorted(Path(dreamgen.stages.__path__[0]).glob("*.py"))
    trains = {
        path.stem
        for path in files
        if re.search(r"^from dreamgen.engine.train import .*\btrain\b", path.read_text(), re.M)
    }
    assert trains - {"finetune", "finetune_actions"} == set(TRAINING) - {
        "train_probe"
    }  # a probe is fitted, not trained
