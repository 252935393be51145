"""What a manifest remembers of a configuration: all that can change a result, and nothing else."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dreamgen.core.manifest import Stage, write_json
from jobs.recipe import load
from jobs.running import record, run_stage
from jobs.steps import inputs

MADE = {"stage": "of one", "config": {}}  # what every stage says


def test_a_record_holds_what_changes_the_result_and_no_place() -> None:
    def of(*overrides: str) -> dict:
        return record(load("label", overrides)[0].stage)

    assert of() == of("out=somewhere/else", "workers=3", "shard=1", "num_shards=2", "embodiment.description=words")
    assert of() == of("skip_bad=true")  # the remedy that an error names; the manifest counts what was left out
    assert of() != of("embodiment=tabletop_two_views")
    assert "runs/" not in str(of())


def test_a_record_holds_what_inputs_hold(tmp_path) -> None:
    def of(*overrides: str) -> dict:
        return record(load("evaluate", ["stage=correlation", f"out={tmp_path}", *overrides])[0].stage)

    judge = tmp_path / "judge"
    judge.mkdir()
    write_json(judge / "manifest.json", {"id": "first", **MADE})
    first = of()
    assert first["judge"]["path"] == "first"
    write_json(judge / "manifest.json", {"id": "second", **MADE})
    assert of() != first
    judge.rename(tmp_path / "elsewhere")
    assert of(f"stage.judge.path={tmp_path}/elsewhere")["judge"]["path"] == "second"
    assert of("stage.judge.path=team/judge")["judge"]["path"] == "team/judge"  # of a hub


def test_an_empty_path_is_not_the_folder_that_one_works_in(tmp_path, monkeypatch) -> None:
    def read(path: object) -> str:
        pytest.fail(f"{path} is read")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr("dreamgen.core.manifest.tree_digest", read)
    cfg, _ = load("finetune", ["world_model.path=", "out=runs"])
    assert record(cfg.stage)["world_model"]["path"] == "" and Path() not in inputs(cfg.stage)
    with pytest.raises(ValueError, match="path of the world model is empty; give a diffusers folder"):
        run_stage(load("plan", ["world_model.path=", "out=runs"])[0])
    with pytest.raises(ValueError, match="path of an input is empty"):
        Stage(tmp_path / "runs", "dream", {}, parents={"world_model": ""})


def test_a_record_holds_what_the_world_of_a_feature_target_holds(tmp_path) -> None:
    world, over = tmp_path / "run" / "world", ["labeler=latent_continuous", f"out={tmp_path}/run"]

    def of(path: object) -> dict:
        cfg, _ = load("train_labeler", [*over, f"labeler.target={{world: {path}}}"])
        return record(cfg.stage)["labeler"]["target"]

    world.mkdir(parents=True)
    (tmp_path / "run" / "demos").mkdir()
    write_json(tmp_path / "run" / "demos" / "manifest.json", {"id": "recorded", **MADE})
    with pytest.raises(ValueError, match="run/world is unfinished"):
        run_stage(load("train_labeler", [*over, f"labeler.target={{world: {world}}}"])[0])
    write_json(world / "manifest.json", {"id": "first", **MADE})
    assert of(world) == {"world": "first"}
    write_json(world / "manifest.json", {"id": "tuned again", **MADE})
    assert of(world.rename(tmp_path / "elsewhere")) == {"world": "tuned again"}


def test_a_question_of_ones_own_is_remembered_by_its_text(tmp_path) -> None:
    mine = tmp_path / "mine.md"

    def asked(question: object) -> str:
        over = [
            "filter=[vlm_instruction]",
            "filter.vlm_instruction.model=x",
            f"filter.vlm_instruction.question={question}",
        ]
        return record(load("curate", [*over, f"out={tmp_path}/run"])[0].stage)["filters"]["vlm_instruction"]["question"]

    mine.write_text("did it {instruction}?")
    first = asked(mine)
    mine.write_text("did it really {instruction}?")
    assert asked(mine) != first and asked("physics") == "physics"


def test_a_server_may_be_moved_and_waited_for_longer() -> None:
    """What the error of a server that does not answer advises; the scores so far are kept."""

    def asked(*changes: str) -> dict:
        over = [f"filter.vlm_instruction.{change}" for change in ("model=x", *changes)]
        return record(load("curate", ["filter=[vlm_instruction]", *over])[0].stage)

    moved = ["url=http://elsewhere:1/v1", "timeout=300", "retries=9", "pause=5", "parallel=1", "key_variable=MINE"]
    assert asked() == asked(*moved)
    assert asked() != asked("model=y") and asked() != asked("frames=6") and asked() != asked("max_tokens=null")


def test_no_manifest_holds_what_a_server_is_shown() -> None:
    for name, where in (("OpenpiPolicy", "address"), ("OpenpiPolicy.load", "path")):
        policy = f"{{_target_: dreamgen.serve.clients.{name}, {where}: 'ws://a:1', key: secret}}"
        told = record(
            OmegaConf.create(f"{{out: runs/x, policy: {policy}, sim: {{views: [{{name: front, key: a.b}}]}}}}")
        )
        assert "secret" not in str(told) and told["policy"][where] == "ws://a:1"
        assert told["sim"]["views"][0]["key"] == "a.b"
