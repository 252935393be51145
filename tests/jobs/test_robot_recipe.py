"""The recipe for a robot of one's own, from a dataset to the report, on tiny twins of the models that it names."""

import json
import re
import shlex
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.utils import instantiate
from transformers import SiglipConfig

from dreamgen.core.clip import Episode
from dreamgen.data.writer import write_dataset
from jobs.recipe import lines, load
from jobs.running import run_check, run_stage
from jobs.steps import complete, run_steps
from tests.policies.test_pretrained import WORDS, twin
from tests.worlds import zoo

SMALL = {"steps": 2, "accumulate": 2, "hop": 4, "validate_every": 1, "degraded_clips": 2, "batch_size": 2,
         "validation": 1}  # fmt: skip
MORE = {"train_policy": "stage.steps=2 stage.batch_size=2 stage.warmup=1 stage.checkpoint_every=1",
        "finetune": "stage.batch_size=4 stage.warmup=1 stage.samples=1"}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five episodes of a robot that has one camera and no simulator."""
    robot = instantiate(load("pipeline", ["experiment=smoke"])[0].embodiment, _convert_="all")
    rng, out = np.random.default_rng(0), tmp_path_factory.mktemp("recorded") / "mine"

    def episode(k: int) -> Episode:
        rows = 30 + k
        action = rng.uniform(-0.9, 0.9, (rows, 4)).astype(np.float32)
        action[:, 3] = np.sign(action[:, 3])
        state = np.concatenate([0.04 * action[:, :3].cumsum(0), rng.uniform(0, 1, (rows, 1))], 1).astype(np.float32)
        video = np.kron(rng.integers(0, 256, (rows, 8, 8, 3), np.uint8), np.ones((1, 8, 8, 1), np.uint8))
        return Episode(instruction=zoo.TEXTS[k % 2], state=state, action=action, video={"front": video})

    write_dataset(out, (episode(k) for k in range(5)), robot)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny Wan2.2-TI2V and a tiny SigLIP, as the hub would give them, in the places of the recipe's."""
    root = tmp_path_factory.mktemp("hub")
    vision = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, patch_size=16)
    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(WORDS))
    siglip = twin(root / "siglip", SiglipConfig(vision_config={**vision, "image_size": 64},
                  text_config={**text, "max_position_embeddings": 64, "projection_size": 16}))  # fmt: skip
    return [f"world_model.path={zoo.save('wan22_ti2v_5b', root / 'wan')}", "world_model.frames=9",
            "world_model.steps=2", "world_model.text_length=18", "world_model.weights=fp32",
            f"labeler.vision.path={siglip}", "labeler.width=24", "labeler.heads=2", "labeler.layers=2",
            "labeler.flow_steps=2", f"policy.encoder.path={siglip}", "policy.encoder.width=16", "policy.layers=2",
            "policy.heads=2", "policy.head_width=8", "policy.horizon=8", "policy.align_layer=1"]  # fmt: skip


def smaller(line: str) -> str:
    """A step of the recipe with the same settings in the same places, each as small as it goes."""
    for key, value in SMALL.items():
        line = re.sub(rf"stage\.{key}=\d+", f"stage.{key}={value}", line)
    job = shlex.split(line)[0]
    return f"{line} {MORE.get(job, '')}".strip()


def test_it_runs_from_a_dataset_to_the_report(recorded: Path, models: list[str], tmp_path: Path) -> None:
    given = ["experiment=robot", "embodiment=tabletop", f"data.root={recorded}", "heldout.episodes=[0,1]",
             f"out={tmp_path}", "apart=false", *models]  # fmt: skip
    steps = {name: smaller(line) for name, line in lines(load("pipeline", given)[0]).items()}
    quoted = [f"steps.{name}={json.dumps(line)}" for name, line in steps.items()]
    run_steps(load("pipeline", [*given, *quoted])[0], [*given, *quoted])
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert set(results["idm"]["r2"]) == {"translation", "gripper"} and set(results["stages"]) == set(steps) - {"report"}
    assert set(results["policy"]["open_loop"]) == {"real", "real_dreams"}
    trained = json.loads((tmp_path / "world" / "manifest.json").read_text())
    assert trained["config"]["method"] == "lora" and trained["config"]["dataset"]["leave_out"] == [0, 1]
    assert len(list((tmp_path / "dreams").rglob("*.mp4"))) == 30  # three episodes, ten times each


def test_what_was_made_of_a_dataset_of_the_hub_is_complete(recorded: Path, tmp_path: Path, monkeypatch) -> None:
    kept, asked = shutil.copytree(recorded, tmp_path / "kept"), []

    def snapshot(name: str, **options: str) -> str:
        asked.append((name, options["revision"]))
        return str(kept)

    def unreachable(name: str, **options: str) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    hub = ["experiment=robot", "embodiment=tabletop", "data.root=org/mine", "data.revision=v7", f"out={tmp_path}/run"]
    for job in ("validate", "export"):
        cfg = load(job, hub)[0]
        assert not complete(cfg.stage)
        run_stage(cfg)
        assert complete(cfg.stage) and set(asked) == {("org/mine", "v7")}
    (kept / "more.txt").write_text("of another commit")
    assert not complete(cfg.stage)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert not complete(cfg.stage)


def test_a_bad_episode_is_left_out_and_counted(recorded: Path, tmp_path: Path) -> None:
    data = shutil.copytree(recorded, tmp_path / "mine")
    path = data / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    action = table["action"].to_pylist()
    action[30 + 31 + 4][1] = float("nan")  # in episode 2
    at = table.column_names.index("action")
    pq.write_table(table.set_column(at, "action", pa.array(action, table["action"].type)), path)
    given = ["experiment=robot", "embodiment=tabletop", f"data.root={data}", f"out={tmp_path}/run",
             "step=check_recorded", "heldout.episodes=[0]"]  # fmt: skip
    cfg = load("validate", given)[0]
    assert run_stage(cfg)["results"]["errors"] == 1
    cfg.skip_bad = True
    run_check(cfg)  # ends with status 0: the steps after it start
    results = json.loads((tmp_path / "run/check_recorded/manifest.json").read_text())["results"]
    assert [one["episode"] for one in results["skipped"]] == [2] and (results["errors"], results["episodes"]) == (0, 5)
    cfg.skip_bad, cfg.data.episodes = False, [0, 1, 3, 4]
    few = run_stage(cfg)["results"]
    assert (few["errors"], few["episodes"], few["skipped"]) == (0, 4, [])
