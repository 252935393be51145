"""A command line becomes a configuration, or one sentence that says why not."""

import pytest
from hydra.errors import HydraException

from jobs.errors import explain
from jobs.recipe import load
from jobs.running import check, record, run_stage


def refused(job: str, *overrides: str) -> str:
    with pytest.raises((ValueError, HydraException)) as caught:
        check(load(job, overrides)[0].stage)
    return explain(caught.value) or ""


def test_unknown_keys_are_named() -> None:
    assert "nonsense" in refused("collect", "nonsense=1")
    assert "nonsense" in refused("collect", "+nonsense=1") and "num_shards" in refused("collect", "+nonsense=1")
    assert "stage.nonsense" in refused("collect", "stage.nonsense=1")
    assert "nonsense" in refused("collect", "+stage.nonsense=1") and "episodes" in refused(
        "collect", "+stage.nonsense=1"
    )
    assert "+" not in refused("collect", "nonsense=1")


def test_unknown_options_list_the_known() -> None:
    assert "tabletop_random" in refused("collect", "sim=moon")
    assert "demos, heldout" in refused("collect", "experiment=demo", "step=moon")
    assert "jobs.finetune" in refused("collect", "experiment=demo", "step=world")


def test_a_wrong_type_is_named() -> None:
    assert "workers" in refused("collect", "workers=many") and "Integer" in refused("collect", "workers=many")


def test_only_code_of_known_origin_is_run() -> None:
    assert "os.system" in refused("collect", "+stage.policy={_target_: os.system, command: ls}")


def test_the_command_line_wins_over_the_step() -> None:
    assert load("collect", ["experiment=demo", "step=heldout"])[0].seed != 7
    assert load("collect", ["experiment=demo", "step=heldout", "seed=7"])[0].seed == 7


def test_a_record_holds_what_changes_the_result_and_no_place() -> None:
    def of(*overrides: str) -> dict:
        return record(load("label", overrides)[0].stage)

    assert of() == of("out=somewhere/else", "workers=3", "shard=1", "num_shards=2", "embodiment.description=words")
    assert of() != of("embodiment=tabletop_two_views")
    assert "runs/" not in str(of())


def test_an_unfinished_input_is_said(tmp_path) -> None:
    cfg, _ = load("label", [f"out={tmp_path}"])
    with pytest.raises(ValueError, match="labeler does not exist"):
        run_stage(cfg)
    (tmp_path / "labeler").mkdir()
    with pytest.raises(ValueError, match="labeler is unfinished"):
        run_stage(cfg)


def test_errors_become_one_sentence() -> None:
    full = OSError(28, "No space left on device", "runs/demo/world/model")
    assert "disk is full (runs/demo/world/model)" in (explain(full) or "")
    wrapped = RuntimeError("writing failed")
    wrapped.__cause__ = full
    assert "disk is full" in (explain(wrapped) or "")
    assert explain(ValueError("row 3 holds nan")) == "row 3 holds nan"
    assert explain(RuntimeError("ours")) is None
    assert "continues" in (explain(KeyboardInterrupt()) or "")
