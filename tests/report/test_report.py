"""Figures find their keys, and a page is made of whatever a run left."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from dreamgen.core.clip import Clip, Episode
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.intervals import difference_interval, mean_interval, success_interval
from dreamgen.core.manifest import Stage, fingerprint
from dreamgen.data.clips import ClipFolder
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.data.writer import write_dataset
from dreamgen.report import plots, scenes
from dreamgen.report.report import calibrations, counts, report
from dreamgen.report.results import gather
from dreamgen.report.table import table
from dreamgen.stages.export import export
from jobs.steps import complete

ROBOT = Embodiment(
    name="toy", robot_hz="10", views=(View(name="front", key="observation.images.front", height=16, width=24),),
    state=(Part(name="x", start=0, stop=2, unit="m"),), action=(Part(name="x", start=0, stop=2, moves="x"),),
)  # fmt: skip
CALIBRATION = {"x": {"spearman": 0.9, "spread": [0.1, 0.2, 0.4], "error": [0.2, 0.3, 0.5]},
               "y": {"spearman": float("nan"), "spread": [], "error": []}}  # fmt: skip
PAIRED = difference_interval(3, 1, 8)
SUCCESS = success_interval(3, 4)
TEXTS = ["go <left>", "go right", "stay"]


def picture(rows: int, shade: int) -> np.ndarray:
    video = np.full((rows, 16, 24, 3), 30 * shade, np.uint8)
    video[:, 4:8, 4:8, 0] = 250
    return video


def finish(out: Path, stage: str, **results: object) -> None:
    with Stage(out, stage, config={}) as run:
        run.finish(**results)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of a few steps: recordings, dreams of the same first frames, their labels."""
    action = np.stack([np.sin(np.arange(11) / 3), np.zeros(11)], 1).astype(np.float32)
    recorded = [Episode(instruction=text, state=action, action=action, video={"front": picture(11, k)},
                        meta={"sim": "toy", "seed": 40 + k, "instruction": text})
                for k, text in enumerate(TEXTS)]  # fmt: skip
    finish_dataset(tmp_path / "heldout", recorded, "collect")
    clips = ClipFolder(tmp_path / "dreams" / "clips")
    for k, text in enumerate(TEXTS):
        origin = {"sim": "toy", "seed": 40 + k, "instruction": text}
        clips.write(Clip(id=f"d{k}", video=picture(5, k), video_hz="5", instruction=text, pair="one", origin=origin))
    finish(tmp_path / "dreams", "dream", clips=3)
    labelled = [Episode(instruction=e.instruction, state=e.state, action=e.action + 0.1, video=e.video,
                        meta={"origin": e.meta}) for e in recorded]  # fmt: skip
    finish_dataset(tmp_path / "labels", labelled, "label")
    (tmp_path / "policy").mkdir()
    rows = [{"step": k, "seconds": 0.1, "loss": 1 / (k + 1)} for k in range(5)]
    rows[-1] |= {"val_loss": 0.3, "val_psnr": 26.6}
    (tmp_path / "policy" / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "policy" / "regression").mkdir()
    (tmp_path / "policy" / "regression" / "losses.jsonl").write_text(json.dumps(rows[0]) + "\n")
    finish(tmp_path / "policy", "train_policy", steps=5)
    finish(tmp_path / "scores", "evaluate_labels", idm={"r2": {"x": float("nan")}, "calibration": CALIBRATION},
           replay={"recorded": SUCCESS})  # fmt: skip
    finish(tmp_path / "won", "evaluate", success=SUCCESS, by_instruction={"stay": SUCCESS}, against=PAIRED)
    return tmp_path


def finish_dataset(out: Path, episodes: list[Episode], stage: str) -> None:
    with Stage(out, stage, config={}) as run:
        write_dataset(out, episodes, ROBOT)
        run.finish(episodes=len(episodes))


def test_a_run_becomes_one_file_and_its_figures(folder: Path) -> None:
    steps = ["heldout", "dreams", "labels", "policy", "scores", "won", "absent", "report"]
    report(ROBOT, out=folder / "report", folder=folder, steps=steps, heldout=folder / "heldout",
           dreams=folder / "dreams", labels=folder / "labels", policies={"real": "won", "real_dreams": "absent"},
           title="A <run>", command="python -m jobs.pipeline a='<b>'", record={})  # fmt: skip
    results = json.loads((folder / "report" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["difference"] == {"real": PAIRED}
    assert results["policy"] == {"real": SUCCESS} and results["replay"] == {"recorded": SUCCESS}
    assert results["idm"]["r2"] == {"x": None}
    assert [part for part, _ in calibrations(results)] == ["x"]
    assert set(results["stages"]) == set(steps) - {"absent", "report"}
    page = (folder / "report" / "report.html").read_text()
    assert 'aria-label="error of x: RMS error, error = spread"' in page
    assert "A &lt;run&gt;" in page and "a=&#39;&lt;b&gt;&#39;" in page and "go <left>" not in page
    assert page.count("<video") == 3 + 3 and page.count('class="frame"') == 1
    assert page.count("<polyline") == 2 * 3 + 2 + 1 and page.count("<circle") == 2  # a single value is a point
    assert "<figcaption>policy: regression</figcaption>" in page
    assert 'aria-label="loss: loss, val_loss"' in page  # other figures of a validation have other units
    assert "+25.0 points [-26.4, +66.4], 3 won and 1 lost of 8, p 0.62" in page
    assert "same first frame" in page and "left out by choice" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)


def test_a_step_is_told_in_a_few_words(folder: Path) -> None:
    trained = {"parameters": 1159000, "processes": 1, "final_steps": 250, "episodes": ["a"], "rows": 0}
    assert counts(trained) == "250 steps, 1,159,000 parameters"
    assert counts({"success": SUCCESS, "episodes": 4}) == "3 of 4 succeed"
    assert counts({"correlation": {"policies": {"a": {}, "b": {}}, "r": 0.928}}) == "2 policies, r 0.93"
    assert counts({"correlation": {"policies": {"a": {}}, "r": None}}) == "1 policies" and counts({"idm": {}}) == ""
    for k in range(30):  # a long recipe is folded, a short one is not
        finish(folder / f"s{k}", "collect", episodes=1)
    report(ROBOT, out=folder / "few", folder=folder, steps=["heldout", "policy"], record={})
    report(ROBOT, out=folder / "many", folder=folder, steps=[f"s{k}" for k in range(30)], record={})
    few, many = ((folder / name / "report.html").read_text() for name in ("few", "many"))
    assert few.count("<details open>") == few.count("<details") == 3
    assert many.count("<details>") == many.count("<details") == 2 and "30 steps</summary>" in many


def test_a_report_of_half_a_run_is_made_anew_when_there_is_more(folder: Path) -> None:
    stage = OmegaConf.create({"out": str(folder / "report"), "folder": str(folder)})
    make = partial(report, ROBOT, out=folder / "report", folder=folder, policies={"real": "won", "more": "more"},
                   record={"out": "", "folder": ""})  # fmt: skip
    make(steps=["heldout", "dreams", "labels", "policy", "scores", "won", "more"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.steps.record", lambda stage: {})
        assert complete(stage)
        finish(folder / "more", "evaluate_dreamt", success=SUCCESS, by_instruction={"stay": SUCCESS, "go": None})
        assert not complete(stage)
    make(steps=["heldout", "dreams", "labels", "policy", "scores", "won", "more"])
    page = (folder / "report" / "report.html").read_text()
    assert "Success in dreams of a world model" in page and "<td>stay</td>" in page and "<td>go</td>" not in page
    finish(folder / "none", "evaluate_dreamt", success=None, by_instruction={"stay": None})
    report(ROBOT, out=folder / "judged", folder=folder, steps=["none"], policies={"real": "none"}, record={})
    assert "policy" not in json.loads((folder / "judged" / "results.json").read_text())


def test_a_first_frame_is_shown_under_all_its_instructions_or_it_is_said(folder: Path) -> None:
    clips = ClipFolder(folder / "dreams" / "clips")
    ((first, shown),) = scenes.counterfactuals(clips, 2)
    assert first.title == "first frame" and [one.title for one in shown] == sorted(TEXTS)
    ((first, shown),) = scenes.counterfactuals(clips, 2, most=2)
    assert first.title == "first frame, 2 of its 3 instructions" and len(shown) == 2


def test_a_single_value_is_a_point() -> None:
    line = plots.lines([plots.Line("loss", [3], [0.5], "c"), plots.Line("other", [3, 4], [1, 2], "a")], title="loss")
    assert line.count("<circle") == line.count("<polyline") == 1 and 'class="c" cx="' in line


def test_bad_episodes_are_listed_as_stages_leave_them_out(folder: Path) -> None:
    path = folder / "heldout" / "data" / "chunk-000" / "file-000.parquet"
    rows = pq.read_table(path)
    values = np.array(rows["action"].to_pylist(), np.float32)
    values[15] = np.nan  # a row of the second episode
    at = rows.column_names.index("action")
    actions = pa.FixedSizeListArray.from_arrays(values.ravel(), 2).cast(rows.schema.field(at).type)
    pq.write_table(rows.set_column(at, rows.schema.field(at), actions), path)
    data = Dataset(folder / "heldout", ROBOT, skip_bad=True)
    export(data, out=folder / "copy", record={})
    finish(folder / "trained", "train_labeler", **noted(data, None, data))
    report(ROBOT, out=folder / "report", folder=folder, steps=["copy", "trained"], record={})
    page = (folder / "report" / "report.html").read_text()
    assert "1 in all" in page and re.search(r"<td>heldout</td><td>1</td><td>[^<]*nan[^<]*</td><td>copy, trained<", page)


def test_trainings_are_added_up(tmp_path: Path) -> None:
    for k, (real, dreams, pair) in enumerate([(1, 3, (3, 1, 8)), (3, 3, (2, 2, 8)), (2, 4, (4, 0, 4))]):
        finish(tmp_path / f"real_{k}", "evaluate", success=success_interval(real, 4),
               by_instruction={"stay": success_interval(real, 4)})  # fmt: skip
        finish(tmp_path / f"dreams_{k}", "evaluate", success=success_interval(dreams, 4), by_instruction={},
               against=difference_interval(*pair))  # fmt: skip
    steps = [f"{name}_{k}" for name in ("real", "dreams") for k in range(3)]
    policies = {"real": steps[:3], "real_dreams": steps[3:], "absent": ["nowhere"]}
    report(ROBOT, out=tmp_path / "report", folder=tmp_path, steps=steps, policies=policies, record={})
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    rates = {"real": success_interval(6, 12) | {"trainings": [0.25, 0.75, 0.5]},
             "real_dreams": success_interval(10, 12) | {"trainings": [0.75, 0.75, 1.0]}}  # fmt: skip
    assert results["policy"] == rates
    found = results["difference"]["real_dreams"]
    low, high = found.pop("trainings_low"), found.pop("trainings_high")
    assert low == pytest.approx(mean_interval([0.25, 0.0, 1.0])[0]) and high == 1.0
    assert found == difference_interval(9, 3, 20) | {"trainings": [0.25, 0.0, 1.0]}
    page = (tmp_path / "report" / "report.html").read_text()
    assert "9 won and 3 lost of 20, p 0.15; of 3 trainings +25.0, +0.0, +100.0, their mean [-87.6, +100.0]" in page


def test_evaluator_and_filters_are_shown(tmp_path: Path) -> None:
    rows = {"good <one>": {"real": 0.9, "dream": 0.8}, "bad": {"real": 0.1, "dream": 0.4}}
    rows["known"] = {"real": 0.5, "dream": 0.6, "seen": True}
    told = {"policies": rows, "k": 2, "r": 1.0, "r_low": -1.0, "r_high": 1.0, "r_drop_one": [None, None], "mmrv": None,
            "bias": 0.1, "bias_low": 0.02, "bias_high": 0.2, "episode_auroc": 0.87, "episode_auroc_low": None,
            "episode_auroc_high": None, "probe": {"r": 0.5, "tnr": 0.75},
            "blind": {"first_frame": {"r": 0.25, "r_drop_one": [-0.1, 0.5]}}}  # fmt: skip
    finish(tmp_path / "compared", "correlation", correlation=told)
    finish(tmp_path / "executed", "evaluate_counterfactuals", clips=1)
    (tmp_path / "executed" / "sheets").mkdir()
    (tmp_path / "executed" / "sheets" / "f01.png").write_bytes(b"\x89PNH")
    finish(tmp_path / "kept", "curate", passed=1)
    (tmp_path / "kept" / "sheets").mkdir()
    (tmp_path / "kept" / "sheets" / "jerk.png").write_bytes(b"\x89PNG")
    report(ROBOT, out=tmp_path / "report", folder=tmp_path, steps=["compared", "executed", "kept"],
           record={})  # fmt: skip
    page = (tmp_path / "report" / "report.html").read_text()
    said = "compared: 3 policies (figures of the 2 that gave no data to the world model), r 1.00, bias 0.10"
    assert said in page and "good &lt;one&gt;: 0.90, 0.80" in page
    (x1, y1), (x0, y0), _ = ((float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', page))
    assert x1 < x0 and y1 > y0 and (x0 - x1) / (y1 - y0) == pytest.approx(2, abs=0.01)
    cells = re.findall(r"<tr><td>([^<]+)</td>((?:<td class=\"num\">[^<]*</td>){10})", page)
    figures = {name: re.findall(r">([^<]*)</td>", row) for name, row in cells}
    assert figures["the dream"][:2] == ["1.00 [-1.00, 1.00]", ""] and figures["the dream"][5] == "0.10 [0.02, 0.20]"
    assert figures["the dream"][6:8] == ["", "0.87"]
    assert figures["blind: first frame"][:2] == ["0.25", "-0.10 to 0.50"]
    assert figures["the dream, by the probe"][::9] == ["0.50", "0.75"]
    assert "executed: f01, dreamed, judged and executed" in page and "data:image/png;base64,iVBOSA==" in page
    assert "kept: jerk, best and worst clips" in page and "data:image/png;base64,iVBORw==" in page


def test_a_run_without_anything_still_has_a_page(tmp_path: Path) -> None:
    finish(tmp_path / "world", "finetune")
    report(ROBOT, out=tmp_path / "report", folder=tmp_path, steps=["world"], dreams=tmp_path / "none", record={})
    assert "Time and memory" in (tmp_path / "report" / "report.html").read_text()


def test_dreams_find_their_recording(folder: Path) -> None:
    recordings = scenes.Recordings([scenes.open_dataset(folder / "heldout", ROBOT)])
    assert recordings.find("stay", {"seed": 42})[1:] == (2, 0, True)
    known = {"dataset": fingerprint(folder / "heldout"), "episode": 2, "row": 3}
    assert recordings.find("stay", known)[1:] == (2, 3, True)
    assert recordings.find("stay", known | {"dataset": "another"})[1:] == (2, 0, False)  # episode 2 of other recordings
    assert recordings.find("stay", {"seed": 7})[1:] == (2, 0, False)
    assert recordings.find("fly", {"seed": 42}) is None
    clip = recordings.clip(recordings.find("stay", {"seed": 42}), 5, "5")
    assert clip.shape == (5, 16, 24, 3)
    still = np.zeros((8, 2), np.float32)
    siblings = [Episode(instruction="stay", state=still, action=still + k, video={"front": picture(8, k)},
                        meta={"seed": 5}) for k in range(3)]  # fmt: skip
    finish_dataset(folder / "siblings", siblings, "collect")
    recordings = scenes.Recordings([scenes.open_dataset(folder / "siblings", ROBOT)])
    known = {"seed": 5, "dataset": fingerprint(folder / "siblings"), "episode": 2, "row": 0}
    assert recordings.find("stay", known)[1:] == (2, 0, True) and recordings.find("stay", {"seed": 5})[1] == 0


def test_names_of_a_robot_are_text_on_the_page() -> None:
    part = Part(name="<b>", start=0, stop=2)
    (plot, _) = scenes.action_plots(replace(ROBOT, action=(part,)), np.eye(2, dtype=np.float32), np.zeros((2, 2)))
    assert "<figcaption>&lt;b&gt; 0</figcaption>" in plot and "<b>" not in plot


def test_recordings_of_a_hub_are_found(folder: Path, monkeypatch, caplog) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(folder / "heldout"))
    found = scenes.open_dataset(Path("someone/heldout"), ROBOT)  # a stage's settings of this kind are paths
    assert found is not None and len(found) == len(TEXTS)
    caplog.set_level("INFO", logger="dreamgen.report.scenes")
    assert scenes.open_dataset(folder / "nowhere", ROBOT) is None and "nowhere does not exist" in caplog.text
    assert scenes.open_dataset(None, ROBOT) is None


def test_the_table_shows_rates_with_their_intervals() -> None:
    found = {"won": {"stage": "evaluate", "seconds": 2.5, "peak_mb": 100.0, "results": {"success": SUCCESS}}}
    text = table(gather(found, {"real": "won"}))
    assert "75.0%   30.1% to  95.4%     4" in text and "2.5 s" in text


def test_a_plot_places_its_points() -> None:
    svg = plots.lines([plots.Line("y", [0, 1, 2], [0, 5, 10], "a")], title="t")
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert plots.lines([plots.Line("y", [0], [-1], "a")], title="t", log=True) == ""
    assert [plots.duration(s) for s in (5.25, 65.0, 3720.0)] == ["5.2 s", "1 min 05 s", "1 h 02 min"]


def test_open_loop_errors_of_several_trainings_are_averaged() -> None:
    by_part = [{"x": {"mae": value, "by_horizon": {"mae": [value, 1.0]}}} for value in (1.0, 3.0)]
    found = {f"t{k}": {"stage": "evaluate_open_loop", "seconds": 1, "peak_mb": 1,
                       "results": {"open_loop": {"mae": 1.0 + k, "mse": None, "by_part": by_part[k]}}}
             for k in range(2)}  # fmt: skip
    told = gather(found, {"real": ["t0", "t1"], "one": "t1"})["policy"]["open_loop"]
    assert told["real"] == {"mae": 1.5, "mse": None, "trainings": [1.0, 2.0],
                            "by_part": {"x": {"mae": 2.0, "by_horizon": {"mae": [2.0, 1.0]}}}}  # fmt: skip
    assert told["one"]["mae"] == 2.0 and "trainings" not in told["one"]


def test_the_control_of_open_loop_errors_is_called_what_it_is() -> None:
    text = table({"policy": {"open_loop": {"real": {"mae": 0.4, "control_mae": 0.3, "by_part": {}}}}, "stages": {}})
    assert "demonstrations only, open-loop mae" in text and "open-loop mae of the mean action" in text
    assert "control" not in text
