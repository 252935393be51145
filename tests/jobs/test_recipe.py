"""A command line becomes a configuration, or one sentence that says why not."""

from contextlib import nullcontext
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dreamgen.core.manifest import Stage, write_json
from jobs import steps
from jobs.errors import explain
from jobs.recipe import load
from jobs.running import check, parts, prepare, record, require_apart, run_stage


def refused(job: str, *overrides: str) -> str:
    with pytest.raises((ValueError, HydraException, OmegaConfBaseException)) as caught:
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


def test_a_setting_that_no_file_lists_is_taken_where_the_constructor_knows_it() -> None:
    words = ["world_model.precision=fp32", "world_model.windows=2", "stage.steps=3"]
    cfg, every = load("finetune", words)
    assert (cfg.stage.world_model.precision, cfg.world_model.windows) == ("fp32", 2) and words[2] in every
    check(cfg.stage)
    assert (
        load("finetune", ["world_model=wan22_i2v_a14b", "world_model.precision=fp32"])[0].world_model.expert == "both"
    )
    for word in ("world_model.precise=fp32", "world_model.robot.x=1", "nowhere.precision=fp32"):
        assert word.partition("=")[0] in refused("finetune", word)


def test_unknown_options_list_the_known() -> None:
    assert "tabletop_random" in refused("collect", "sim=moon")
    assert "demos, heldout" in refused("collect", "experiment=demo", "step=moon")
    assert "jobs.finetune" in refused("collect", "experiment=demo", "step=world")


def test_a_wrong_type_is_named() -> None:
    assert "workers" in refused("collect", "workers=many") and "Integer" in refused("collect", "workers=many")


def test_the_plan_of_a_recipe_is_that_of_its_fine_tuning() -> None:
    own = ["experiment=robot", "embodiment=gr1", "data.root=path/to/it"]
    stage = load("plan", own)[0].stage
    assert (stage.method, stage.steps, stage.hop, stage.accumulate, stage.short) == ("lora", 2000, 4, 16, "pad")
    assert load("plan", [*own, "stage.steps=7"])[0].stage.steps == 7 and load("plan")[0].stage.steps == 1000
    check(stage)
    words = "finetune world_model=ltx_video world_model.frames=49 data.root=other stage.copies=3 stage.shift=2"
    stage = load("plan", [*own[:2], f'steps.world="{words}"', "world_model.steps=7"])[0].stage
    tuned = load("finetune", [*own[:2], f'steps.world="{words}"', "step=world"])[0].stage
    assert (stage.model, stage.frames, stage.dataset) == (tuned.world_model.path, 49, "other")
    assert (stage.copies, stage.denoising_steps, tuned.world_model.frames) == (3, 7, 49)
    assert stage.dreaming == {"steps": 7, "guidance": stage.guidance, "best_of": 1} and stage.dreams is None


def test_the_plan_of_a_recipe_is_that_of_its_dreams() -> None:
    stage = load("plan", ["experiment=demo"])[0].stage
    assert (stage.dreams, stage.denoising_steps, stage.dreaming.steps, stage.dreaming.best_of) == (420, 20, 12, 1)
    words = "dream prompts.first_frames=5 stage.best_of=4 stage.filter=${filter.frozen} stage.world_model.guidance=1.5"
    own = ['steps.demos="dream mode=actions"', f'steps.dreams="{words}"', "prompts.repeats=3", "stage.dreaming.steps=9"]
    stage = load("plan", ["experiment=demo", *own])[0].stage
    assert stage.dreaming == {"steps": 9, "guidance": 1.5, "best_of": 4} and stage.dreams == 5 * 3


@pytest.mark.parametrize(
    ("job", "word", "told"),
    [
        ("finetune", "stage.steps=two", "stage.steps is 'two'; expected a whole number"),
        ("finetune", "stage.steps=1e3", "stage.steps is 1000.0; expected a whole number"),
        ("finetune", "stage.lr=true", "stage.lr is True; expected a number"),
        ("finetune", "stage.lengths=17", "stage.lengths is 17; expected [a list] or null"),
        ("finetune", "stage.dataset=path/to/it", "`_target_: dreamgen.data.lerobot.Dataset`"),
        ("collect", "stage.source=nobody", "expected expert, play, policy, perturbed"),
        ("validate", "~embodiment._target_", "`_target_: dreamgen.core.embodiment.Embodiment`"),
        ("validate", "data=folder", "data.root is not given; add data.root=..."),
        ("dream", "prompts=pictures", "prompts.folder is not given; add prompts.folder=..."),
    ],
)
def test_a_value_of_another_kind_is_named(job: str, word: str, told: str) -> None:
    assert told in refused(job, word)


def test_values_that_fit_are_taken() -> None:
    words = ["stage.lr=1", "stage.lengths=[17,9]", "stage.patience=3", "stage.cache=some/folder", "stage.rank=null"]
    check(load("finetune", [*words, "world_model.video_hz=7.5", "embodiment.robot_hz=29.97"])[0].stage)


def test_an_empty_out_is_not_the_root(tmp_path) -> None:
    with pytest.raises(ValueError, match="out is empty"):
        run_stage(load("describe", ["data=folder", f"data.root={tmp_path}", "out="])[0])


def test_places_that_cannot_be_written_are_named(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        Stage(tmp_path / "file" / "step", "collect", config={})
    assert explain(caught.value) == f"{tmp_path / 'file' / 'step'}: Not a directory. Choose another path, or mend it"


def test_a_configuration_that_is_no_yaml_is_named(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("name: x\n  views: [\n")
    with pytest.raises(YAMLError) as caught:
        OmegaConf.load(tmp_path / "mine.yaml")
    told = explain(caught.value) or ""
    assert told.startswith("a configuration cannot be read") and "mine.yaml" in told and "line 2" in told


def test_only_code_of_known_origin_is_run() -> None:
    assert "os.system" in refused("collect", "+stage.policy={_target_: os.system, command: ls}")


def test_the_command_line_wins_over_the_step() -> None:
    assert load("collect", ["experiment=demo", "step=heldout"])[0].stage.episodes == 56
    assert load("collect", ["experiment=demo", "step=heldout", "stage.episodes=7"])[0].stage.episodes == 7


@pytest.mark.parametrize(("replaces", "adds"), [("", "+"), ("++", "++")])
def test_a_step_may_be_replaced_and_added_by_any_sign(replaces: str, adds: str) -> None:
    given = ["experiment=demo", f'{replaces}steps.world="finetune stage.steps=7"', f'{adds}steps.kept="curate seed=5"']
    assert load("finetune", [*given, "step=world"])[0].stage.steps == 7
    assert load("curate", [*given, "step=kept"])[0].seed == 5
    assert "has no step 'world'" in refused("finetune", "experiment=demo", "~steps.world", "step=world")


def test_the_seeds_of_a_recipe_move_together() -> None:
    recipe = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf/experiment/tabletop.yaml"))[
        "steps"
    ]
    job = {name: line.split()[0] for name, line in recipe.items()}
    for name in ("demos", "heldout", "policy_real", "policy_real_1", "success_real", "success_real_4"):
        own, moved = (load(job[name], ["experiment=tabletop", f"step={name}", *words])[0].seed
                      for words in ((), ("seed=1",)))  # fmt: skip
        assert moved == own + 1, name
    assert load("collect", ["seed=1"])[0].seed == 1


def test_a_setting_may_be_one_of_the_stage_that_the_step_chooses() -> None:
    cfg, _ = load("evaluate", ["experiment=evaluator", "step=correlation", "stage.blind=[demos]"])
    assert cfg.stage.blind == ["demos"] and cfg.stage._target_.endswith(".correlation")
    assert "blind" in refused("evaluate", "experiment=evaluator", "step=tried", "stage.blind=[]")


def test_an_unfinished_input_is_said(tmp_path) -> None:
    cfg, _ = load("label", [f"out={tmp_path}"])
    with pytest.raises(ValueError, match="labeler does not exist"):
        run_stage(cfg)
    (tmp_path / "labeler").mkdir()
    with pytest.raises(ValueError, match="labeler is unfinished"):
        run_stage(cfg)


def test_what_lies_within_a_finished_step_is_finished(tmp_path) -> None:
    more = ["stage.world_model.path=${out}/high", "stage.world_model.adapters=[{path: ${out}/low/adapter}]"]
    cfg, _ = load("dream", [f"out={tmp_path}", *more])
    (tmp_path / "low" / "adapter").mkdir(parents=True)
    (tmp_path / "low" / "adapter" / "weights").touch()
    write_json(tmp_path / "low" / "run.json", {"id": "low", "stage": "finetune", "config": {}})
    for step in ("high", "low"):
        with pytest.raises(ValueError, match=f"the input {tmp_path}/{step} (does not exist|is unfinished)"):
            prepare(cfg)
        write_json(tmp_path / step / "manifest.json", {"id": step, "stage": "finetune", "config": {}})
    prepare(cfg)
    own = [f"out={tmp_path}", "data=folder", "data.root=path/to/it"]
    prepare(load("finetune", [*own, "world_model.path=${out}/high/model"])[0])
    with pytest.raises(ValueError, match=f"the input {tmp_path}/other/model does not exist"):
        prepare(load("finetune", [*own, "world_model.path=${out}/other/model"])[0])


@pytest.mark.parametrize("out", [".", "runs/mine"])
def test_what_others_made_may_lie_where_is_written_to(out: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("recordings/meta/info.json", "wan/model_index.json"):
        (tmp_path / out / name).parent.mkdir(parents=True)
        (tmp_path / out / name).touch()
    given = [f"out={out}", "data=folder", f"data.root={out}/recordings", "world_model=wan22_ti2v_5b"]
    prepare(load("finetune", [*given, "world_model.path=${out}/wan"])[0])
    cfg = load("finetune", given)[0]
    prepare(cfg)
    assert record(cfg.stage)["world_model"]["path"] == "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    prepare(load("collect", [f"out={out}"])[0])
    (tmp_path / out / "recordings" / ".writing").touch()
    with pytest.raises(ValueError, match=f"the input {Path(out, 'recordings')} is unfinished"):
        prepare(cfg)
    with pytest.raises(ValueError, match="the input .*world does not exist"):
        prepare(load("dream", [f"out={out}"])[0])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("data.leave_out=[17]", r"episodes 0, 1, 2, 3 are held out and trained on; .*leave_out=\[0,1,2,3,17\]"),
        ("data.leave_out=null data.episodes=[2,5,8]", r"episodes 2 are held out and trained on; .*leave_out=\[2\]"),
        ("heldout.episodes=null", "heldout.episodes is null, so that all of some/data is held out"),
        ("data.leave_out=[9,3,2,1,0]", ""),
        ("data.leave_out=null data.episodes=[4,5]", ""),
        ("heldout.episodes=[7]", ""),
        ("heldout.episodes=null heldout.root=other/data", ""),
    ],
)
def test_what_is_held_out_is_not_trained_on_whatever_is_left_out(words: str, told: str) -> None:
    given = ["experiment=robot", "embodiment=tabletop", "data.root=some/data", *words.split()]
    with pytest.raises(ValueError, match=told) if told else nullcontext():
        prepare(load("finetune", [*given, "step=world"])[0])


def test_stages_that_do_not_read_the_data_may_be_given_what_is_held_out() -> None:
    given = ["experiment=robot", "embodiment=tabletop", "data.root=some/data", "data.leave_out=null"]
    for job, step in (("dream", "dreams"), ("train_policy", "policy_real")):
        with pytest.raises(ValueError, match="are held out and trained on"):
            require_apart(load(job, [*given, f"step={step}"])[0])
    for job, step in (("validate", "check_recorded"), ("evaluate", "score_real"), ("dream", "heldout_dreams")):
        require_apart(load(job, [*given, f"step={step}"])[0])
    require_apart(load("export", given)[0])


def test_errors_become_one_sentence() -> None:
    full = OSError(28, "No space left on device", "runs/demo/world/model")
    assert "disk is full (runs/demo/world/model)" in (explain(full) or "")
    wrapped = RuntimeError("writing failed")
    wrapped.__cause__ = full
    assert "disk is full" in (explain(wrapped) or "")
    assert explain(ValueError("row 3 holds nan")) == "row 3 holds nan"
    assert explain(RuntimeError("ours")) is None
    assert "continues" in (explain(KeyboardInterrupt()) or "")


def test_a_pipeline_hands_on_what_it_was_given_as_it_is_written(monkeypatch) -> None:
    task = ['steps.again="dream prompts.dataset=${heldout} seed=3"', "step=old", "seed=1"]
    given = OmegaConf.create({"heldout": {"root": "some"}, "overrides": {"task": task}})
    monkeypatch.setattr(steps.HydraConfig, "get", lambda: given)
    handed: list[str] = []
    monkeypatch.setattr(steps, "run_steps", lambda _, overrides: handed.extend(overrides))
    steps.run_pipeline(OmegaConf.create({}))
    assert handed == [task[0], task[2]]


@pytest.mark.parametrize(("job", "key"), [("train_policy", "policy"), ("collect", "sim"), ("train_judge", "judge")])
def test_unknown_keys_of_parts_are_named(job: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"stage.{key} '\w+' has no setting nonsense; it has"):
        check(load(job, [f"+{key}.nonsense=1"])[0].stage)


def test_a_refused_setting_does_not_lock_the_folder(tmp_path) -> None:
    out = tmp_path / "out"
    Stage(out, "collect", config={"instructions": ["fly"]})
    (out / "cache").mkdir()  # is named by what it was made of
    with pytest.raises(ValueError, match="the output of 'collect', not of 'dream'"):
        (out / "clips").mkdir()
        Stage(out, "dream", config={})
    (out / "clips").rmdir()
    with pytest.raises(ValueError, match=f"the input 'clips' of label: {out}/dreams does not exist"):
        Stage(tmp_path / "labels", "label", config={}, parents={"clips": out / "dreams"})
    with Stage(out, "collect", config={"instructions": ["lift"]}):
        (out / "episode.npz").touch()
    with pytest.raises(ValueError, match="another configuration"):
        Stage(out, "collect", config={"instructions": ["fly"]})


@pytest.mark.parametrize("text", ["1000 requested and 10 written", "[enforce fail] PytorchStreamWriter failed writing"])
def test_a_full_disk_is_known_by_its_words(text: str) -> None:
    assert "disk is full" in (explain(OSError(text)) or "")


@pytest.mark.parametrize("word", ["data.root=it's", "data.root=/x/y{z", "data.root=a=b", "instructions=[it's]"])
def test_a_value_that_is_to_be_quoted_is_said_in_one_line(word: str) -> None:
    told = refused("validate", "data=folder", word)
    assert f"'{word}' cannot be read" in told and "\n" not in told and "Lexer" not in told and "hydra" not in told
    key, _, value = word.partition("=")
    if value[0] != "[":
        quoted = f'{key}="{value}"'
        assert told.endswith(f"'{quoted}'") and load("validate", ["data=folder", quoted])[0].data.root == value


def test_a_path_may_begin_at_home(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    cfg, every = load("validate", ["data=folder", "data.root=~/recordings/a", "out=~/runs"])
    assert cfg.stage.root == "/somewhere/recordings/a" and cfg.stage.out == "/somewhere/runs/validate"
    assert load("validate", every)[0] == cfg  # what the command is called again with


def test_the_revision_of_a_dataset_is_that_of_every_reader() -> None:
    def asked(job: str, *overrides: str) -> list:
        hub = ["experiment=robot", "embodiment=tabletop", "data.root=org/name", "data.revision=v7"]
        stage = OmegaConf.to_container(load(job, [*hub, *overrides])[0].stage, resolve=True)
        return [part["revision"] for _, part in parts(stage) if "revision" in part]

    assert asked("validate") == asked("describe") == asked("export") == asked("evaluate", "stage=labels") == ["v7"]
    assert asked("train_policy", "stage.validation=${heldout}") == ["v7", "v7"]
    assert load("validate", ["data=video_folder", "data.root=path"])[0].stage.revision is None
