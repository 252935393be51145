"""A run's folders -> `report.html`, one file with its videos inside, and `results.json`."""

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import Stage, replacing, write_json
from dreamgen.engine.train import read_losses
from dreamgen.report import plots, scenes
from dreamgen.report.results import evaluations, gather, manifests, pooled
from dreamgen.report.table import differences, errors, successes, table
from dreamgen.report.tree import trees


def report(
    robot: Embodiment,
    *,
    out: Path,
    folder: Path,
    steps: Sequence[str],
    demos: Path | None = None,
    heldout: Path | None = None,
    dreams: Path | None = None,
    counterfactuals: Path | None = None,
    alternatives: Path | None = None,
    alternatives_truth: Path | None = None,
    labels: Path | None = None,
    policies: Mapping[str, str | Sequence[str]] | None = None,
    title: str = "",
    command: str = "",
    clips: int = 8,
    groups: int = 2,
    record: dict,
) -> dict:
    """Write the report of the run in `folder`.

    steps: the run's steps, in order; those that are not there are left out. demos, heldout: recordings (LeRobot);
    dreams: output of `dream`; counterfactuals: the same, from which one first frame under many instructions is shown
    (default: `dreams`); alternatives: the same under many streams of actions, shown as trees, with the outcomes that
    `alternatives_truth` (of `evaluate stage=counterfactuals`) knows; labels: output of `label`. policies: key in
    results.json to the step that evaluated the policy, or to those that evaluated its trainings. clips, groups: how
    many pairs of clips and how many first frames are shown.
    """
    found = manifests({name: Path(folder) / name for name in steps if Path(folder) / name != out})
    parents = {name: Path(folder) / name for name in found}
    parents |= {"data": demos} if demos is not None and Path(demos).exists() and demos not in parents.values() else {}
    with Stage(out, "report", config=record, parents=parents) as run:
        if run.complete:
            return run.manifest()
        results = gather(found, policies or {})
        recordings = scenes.Recordings([scenes.open_dataset(heldout, robot), scenes.open_dataset(demos, robot)])
        many = scenes.clips_of(counterfactuals) or scenes.clips_of(dreams)
        dreamed, labelled = scenes.clips_of(dreams), scenes.open_dataset(labels, robot)
        page = {
            "title": title or "dreamgen",
            "robot": robot,
            "command": command,
            "results": results,
            "successes": [(name, s, plots.interval(s["rate"], s["low"], s["high"])) for name, s in successes(results)],
            "differences": differences(results),
            "errors": errors(results),
            "pipeline": [(name, m["stage"], counts(m["results"])) for name, m in found.items()],
            "pairs": scenes.pairs(dreamed, recordings, clips) if dreamed else [],
            "counterfactuals": scenes.counterfactuals(many, groups, 8) if many else [],
            "trees": trees(alternatives, alternatives_truth, groups),
            "curves": scenes.recovered(labelled, recordings, 3) if labelled else [],
            "calibrations": calibrations(results),
            "correlations": correlations(found),
            "curated": curated(found, Path(folder)),
            "losses": [(name, loss_plot(Path(folder) / name)) for name in found if loss_plot(Path(folder) / name)],
            "instructions": by_instruction(found, policies or {}),
            "bad": bad_episodes(found),
            "versions": next(reversed(found.values()))["versions"] if found else {},
            "duration": plots.duration,
            "total": sum(stage["seconds"] for stage in results["stages"].values()),
        }
        write_json(out / "results.json", results)
        with replacing(out / "report.html") as temporary:
            temporary.write_text(render(page), encoding="utf-8")
        return run.finish(table=table(results), results=results)


def render(page: Mapping[str, Any]) -> str:
    """The page as HTML. Values are escaped; plots are SVG of our own."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")).render(page)


def counts(results: Mapping) -> str:
    """Whole numbers among a step's results that are not 0: "280 episodes, 10080 rows"."""
    whole = [f"{value} {key.replace('_', ' ')}" for key, value in results.items() if type(value) is int and value]
    return ", ".join(whole[:3])


def loss_plot(step: Path) -> str:
    """Training and validation loss of a step that trained, "" for others."""
    rows = read_losses(step)
    curves = []
    for key, style in (("loss", "a"), ("val_loss", "c")):
        if known := [row for row in rows if key in row]:
            curves.append(plots.Line(key, [row["step"] for row in known], [row[key] for row in known], style))
    return plots.lines(curves, title="loss", x_name="steps", log=True) if curves else ""


def calibrations(results: Mapping) -> list[tuple[str, str]]:
    """(part, plot) of the labels' error over their spread, where the spread varies."""
    plotted = []
    for part, curve in results.get("idm", {}).get("calibration", {}).items():
        if len(curve.get("spread", [])) > 1:
            line = plots.Line("RMS error", curve["spread"], curve["error"], "a")
            ideal = plots.Line("error = spread", curve["spread"], curve["spread"], "b")
            plotted.append((part, plots.lines([line, ideal], title=f"error of {part}", x_name="spread")))
    return plotted


def correlations(found: Mapping[str, Mapping]) -> list[tuple[str, str]]:
    """(caption, plot) of every comparison of policies' success in the dream with that in the simulator."""
    plotted = []
    for name, results in ((n, m["results"]["correlation"]) for n, m in found.items() if m["stage"] == "correlation"):
        points = [(policy, row["real"], row["dream"]) for policy, row in results["policies"].items()]
        told = ", ".join(f"{key} {results[key]:.3f}" for key in ("r", "mmrv", "bias") if results.get(key) is not None)
        plot = plots.scatter(points, title=name, x_name="success in the simulator", y_name="in the dream")
        plotted.append((f"{name}: {len(points)} policies{', ' if told else ''}{told}", plot))
    return plotted


def curated(found: Mapping[str, Mapping], folder: Path) -> list[tuple[str, str]]:
    """(caption, picture) of each filter's best and worst clips, for every step that curated."""
    pictures = []
    for name in (n for n, manifest in found.items() if manifest["stage"] == "curate"):
        for sheet in sorted((folder / name / "sheets").glob("*.png")):
            data = base64.b64encode(sheet.read_bytes()).decode()
            pictures.append((f"{name}: {sheet.stem}, best and worst clips", f"data:image/png;base64,{data}"))
    return pictures


def by_instruction(found: Mapping[str, dict], policies: Mapping[str, str | Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Success by instruction, over all trainings: {instruction: {policy key: {successes, n, ...}}}."""
    rows: dict[str, dict[str, list]] = {}
    for key, steps in policies.items():
        for one in evaluations(found, steps):
            for text, success in one.get("by_instruction", {}).items():
                rows.setdefault(text, {}).setdefault(key, []).append(success)
    return {text: {key: pooled(rates) for key, rates in row.items()} for text, row in rows.items()}


def bad_episodes(found: Mapping[str, Mapping]) -> list[tuple[str, str, str]]:
    """(step, episode, reason) of every bad episode that was left out, by choice."""
    rows = []
    for name, manifest in found.items():
        skipped = manifest["results"].get("skipped")
        if isinstance(skipped, Mapping):
            rows += [(name, str(episode), str(reason)) for episode, reason in skipped.items()]
    return rows
