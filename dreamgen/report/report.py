"""A run's folders -> `report.html`, one file with its videos inside, and `results.json`."""

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dreamgen.core.embodiment import Embodiment
from dreamgen.core.intervals import pooled
from dreamgen.core.manifest import Stage, replacing, write_json
from dreamgen.engine.train import read_losses
from dreamgen.report import plots, scenes
from dreamgen.report.results import evaluations, gather, manifests
from dreamgen.report.table import differences, errors, successes, table
from dreamgen.report.tree import trees

# what is shown of a report card of `correlation`, and how it is called there
CARD = {"r": "r", "r_drop_one": "r, one left out", "rho": "rho", "mmrv": "MMRV", "mae": "MAE", "bias": "bias",
        "regret": "regret", "episode_auroc": "AUROC", "tpr": "TPR", "tnr": "TNR"}  # fmt: skip

# the counts of a step that its card may tell, the first three that it has
COUNTS = ("episodes", "clips", "held_out", "successes", "steps", "parameters", "first_frames", "instructions", "frames",
          "rows", "pairs")  # fmt: skip


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
    revision: str | None = None,
    title: str = "",
    command: str = "",
    clips: int = 8,
    groups: int = 2,
    record: dict,
) -> dict:
    """Write the report of the run in `folder`.

    steps: the run's steps, in order; those that are not there are left out. demos, heldout: recordings (LeRobot), of
    the hub at `revision`; dreams: output of `dream`; counterfactuals: the same, from which one first frame under many
    instructions is shown (default: `dreams`); alternatives: the same under many streams of actions, shown as trees,
    with the outcomes that `alternatives_truth` (of `evaluate stage=counterfactuals`) knows; labels: output of `label`.
    policies: key in results.json to the step that evaluated the policy, or to those that evaluated its trainings.
    clips, groups: how many pairs of clips and how many first frames are shown.
    """
    found = manifests({name: Path(folder) / name for name in steps if Path(folder) / name != out})
    parents = {name: Path(folder) / name for name in found}
    parents |= {"data": demos} if demos is not None and Path(demos).exists() and demos not in parents.values() else {}
    with Stage(out, "report", config=record, parents=parents, anew=True) as run:
        results = gather(found, policies or {})
        recordings = scenes.Recordings([scenes.open_dataset(each, robot, revision) for each in (heldout, demos)])
        many = scenes.clips_of(counterfactuals) or scenes.clips_of(dreams)
        dreamed, labelled = scenes.clips_of(dreams), scenes.open_dataset(labels, robot)
        page = {
            "title": title or "dreamgen",
            "robot": robot,
            "command": command,
            "results": results,
            "where": place_of(found, policies or {}),
            "successes": [(name, s, plots.interval(s["rate"], s["low"], s["high"])) for name, s in successes(results)],
            "differences": differences(results),
            "errors": errors(results),
            "pipeline": [(name, m["stage"], counts(m["results"])) for name, m in found.items()],
            "pairs": scenes.pairs(dreamed, recordings, clips) if dreamed else [],
            "counterfactuals": scenes.counterfactuals(many, groups) if many else [],
            "trees": trees(alternatives, alternatives_truth, groups),
            "curves": scenes.recovered(labelled, recordings, 3) if labelled else [],
            "calibrations": calibrations(results),
            "correlations": correlations(found),
            "cards": [
                (name, cards(m["results"]["correlation"])) for name, m in found.items() if m["stage"] == "correlation"
            ],
            "card_heads": list(CARD.values()),
            "executed": sheets(
                found, Path(folder), "evaluate_counterfactuals", "dreamed, judged and executed", 2 * groups
            ),
            "curated": sheets(found, Path(folder), "curate", "best and worst clips"),
            "losses": [plotted for name in found for plotted in loss_plots(name, Path(folder) / name)],
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
    """A step in a few words: its success, or up to three of its counts ("280 episodes, 10,080 frames"), or ""."""
    if card := results.get("correlation"):
        r = "" if card.get("r") is None else f", r {card['r']:.2f}"
        return f"{card.get('k', len(card['policies']))} policies{r}"
    if "rate" in (success := results.get("success") or {}):
        return f"{success['successes']:,} of {success['n']:,} succeed"
    known = {key.removeprefix("final_"): value for key, value in results.items()}
    told = [f"{known[key]:,} {key.replace('_', ' ')}" for key in COUNTS if type(known.get(key)) is int and known[key]]
    return ", ".join(told[:3])


def loss_plots(name: str, step: Path) -> list[tuple[str, str]]:
    """(caption, plot) of training and validation loss: of a step, and of what it trains apart (a decoder, a
    regression). Empty for one that does not train."""
    plotted = []
    for folder in [step, *sorted(path.parent for path in step.glob("*/losses.jsonl"))]:
        rows, curves = read_losses(folder), []
        for key, style in (("loss", "a"), ("val_loss", "c")):
            if known := [row for row in rows if key in row]:
                curves.append(plots.Line(key, [row["step"] for row in known], [row[key] for row in known], style))
        if curves:
            caption = name if folder == step else f"{name}: {folder.name}"
            plotted.append((caption, plots.lines(curves, title="loss", x_name="steps", log=True)))
    return plotted


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
        k = results.get("k", len(points))
        apart = f" (figures of the {k} that gave no data to the world model)" if k < len(points) else ""
        told = ", ".join(
            f"{CARD[key]} {results[key]:.2f}" for key in ("r", "mmrv", "bias") if results.get(key) is not None
        )
        plot = plots.scatter(points, title=name, x_name="success in the simulator", y_name="in the dream")
        plotted.append((f"{name}: {len(points)} policies{apart}{', ' if told else ''}{told}", plot))
    return plotted


def cards(results: Mapping) -> list[tuple[str, list[str]]]:
    """(evaluator, figures in the order of CARD): the dream, corrected, of seen policies, by the probe; blind ones."""
    rows = {"the dream": results}
    rows |= {f"the dream, {key}": results[key] for key in ("corrected", "seen") if results.get(key)}
    rows |= {"the dream, by the probe": results["probe"]} if results.get("probe") else {}
    rows |= {f"blind: {key.replace('_', ' ')}": card for key, card in results.get("blind", {}).items()}
    return [(name, [figure(card, key) for key in CARD]) for name, card in rows.items()]


def figure(card: Mapping, key: str) -> str:
    """A figure of a report card with its interval, "" where there is none."""
    value = card.get(key)
    if value is None or (isinstance(value, list) and None in value):
        return ""
    if isinstance(value, list):
        return f"{value[0]:.2f} to {value[1]:.2f}"
    low, high = (card.get(f"{key}_{end}") for end in ("low", "high"))  # cards of before have that of r alone
    return f"{value:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def sheets(
    found: Mapping[str, Mapping], folder: Path, stage: str, told: str, count: int | None = None
) -> list[tuple[str, str]]:
    """(caption, picture) of the contact sheets that every step of `stage` has left, of each at most `count`."""
    pictures = []
    for name in (n for n, manifest in found.items() if manifest["stage"] == stage):
        for sheet in sorted((folder / name / "sheets").glob("*.png"))[:count]:
            data = base64.b64encode(sheet.read_bytes()).decode()
            pictures.append((f"{name}: {sheet.stem}, {told}", f"data:image/png;base64,{data}"))
    return pictures


def by_instruction(found: Mapping[str, dict], policies: Mapping[str, str | Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Success by instruction, over all trainings: {instruction: {policy key: {successes, n, ...}}}."""
    rows: dict[str, dict[str, list]] = {}
    for key, steps in policies.items():
        for one in evaluations(found, steps):
            for text, success in one.get("by_instruction", {}).items():
                if success:  # a judge may have abstained
                    rows.setdefault(text, {}).setdefault(key, []).append(success)
    return {text: {key: pooled(rates) for key, rates in row.items()} for text, row in rows.items()}


def place_of(found: Mapping[str, dict], policies: Mapping[str, str | Sequence[str]]) -> str:
    """Where policies were tried, in words."""
    steps = [step for one in policies.values() for step in ([one] if isinstance(one, str) else one)]
    if any(found[step]["stage"] == "evaluate_dreamt" for step in steps if step in found):
        return "in dreams of a world model, as its judge answers, from first frames of recordings"
    return "in the simulator on seeds that nothing was trained on"


def bad_episodes(found: Mapping[str, Mapping]) -> list[tuple[str, str, str, list[str]]]:
    """(dataset, episode, reason, steps) of every bad episode that steps left out, by choice."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, manifest in found.items():
        for one in manifest["results"].get("skipped", ()):
            rows.setdefault((one["dataset"], str(one["episode"]), one["reason"]), []).append(name)
    return [(*row, steps) for row, steps in rows.items()]
