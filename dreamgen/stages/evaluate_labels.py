"""How far can labels be trusted? Scores on recorded video held out, and success when replayed in the simulator.

The chain of replays shows where success is lost: recorded actions -> labels of real video -> labels of dreams.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import Stage, write_json
from dreamgen.core.protocols import Labeler, Sim
from dreamgen.data.lerobot import Dataset
from dreamgen.engine.progress import progress
from dreamgen.sims.rollout import replay, success_interval
from dreamgen.stages.label import integrated
from dreamgen.stages.label_scores import score_labels
from dreamgen.stages.train_labeler import recorded_clip


def held(action: np.ndarray, robot: Embodiment, steps: int) -> np.ndarray:
    """Actions (s a) and `steps` more of holding still: deltas rest, absolute and binary parts keep their last value."""
    rest = np.repeat(action[-1:], steps, axis=0)
    for part in robot.action:
        if part.kind == "delta":
            rest[:, part.slice] = 0
    return np.concatenate([action, rest])


def state_errors(labeler: Labeler, clips: Sequence, actions: Sequence[np.ndarray], dataset: Dataset,
                 episodes: Iterable[int]) -> dict:  # fmt: skip
    """Mean absolute error by state part of the pseudo-states: read from frames, and integrated from labels."""
    robot = labeler.robot
    if not robot.state_dim:
        return {}
    true = [dataset.episode(i).state[: len(a)] for i, a in zip(episodes, actions, strict=True)]
    labels = labeler.label(clips)
    found = {"integrated": [integrated(robot, t[0], label.value)[0] for t, label in zip(true, labels, strict=True)]}
    if hasattr(labeler, "states"):
        found["read"] = [s[: len(t)] for s, t in zip(labeler.states(clips, labels), true, strict=True)]
    errors = {kind: np.abs(np.concatenate(states) - np.concatenate(true)) for kind, states in found.items()}
    return {kind: {part.name: float(error[:, part.slice].mean()) for part in robot.state}
            for kind, error in errors.items()}  # fmt: skip


def _replayed(sim: Sim, items: list[tuple[str, str, int, np.ndarray]], settle: int, name: str, out: Path) -> dict:
    """Success of (instruction, scene, seed, actions): overall with its interval, by instruction, and one by one."""
    done: list[tuple[str, bool]] = []
    for instruction, scene, seed, action in progress(items, len(items), f"replay {name}", out, unit="episode"):
        options = {} if scene == instruction else {"scene_of": scene}
        done.append((instruction, bool(replay(sim, instruction, seed, held(action, sim.robot, settle), **options))))
    texts = sorted({text for text, _ in done})
    groups = {text: [ok for other, ok in done if other == text] for text in texts}
    return {**success_interval(sum(ok for _, ok in done), len(done)),
            "by_instruction": {text: success_interval(sum(oks), len(oks)) for text, oks in groups.items()}}  # fmt: skip


def evaluate_labels(labeler: Labeler, dataset: Dataset, sim: Callable[[], Sim] | None = None, *, out: Path,
                    dreams: Path | None = None, episodes: int | None = None, settle: int = 6, batch_size: int = 16,
                    seed: int = 0, record: dict) -> dict:  # fmt: skip
    """Score `labeler` on `dataset`, whose episodes it must never have seen.

    sim: makes the simulator in which the episodes were recorded; without one, nothing is replayed. dreams: a labelled
    dataset; those of its episodes whose first frame came from the simulator (meta "origin": instruction, seed) are
    replayed from it. episodes: only the first so many of each. settle: steps of holding still after the labels.

    Results: idm {r2, mae, control_mae, lag, drift, auroc, accuracy, calibration, state, by part}; replay {recorded,
    idm_real, idm_dream: {successes, n, rate, low, high, by_instruction}}. They are also written to `scores.json`.
    """
    parents = {"dataset": dataset.root} | ({"dreams": dreams} if dreams else {})
    parents |= {"labeler": labeler.path} if getattr(labeler, "path", None) else {}
    with Stage(out, "evaluate_labels", config=record, parents=parents, seed=seed) as run:
        if run.complete:
            return run.manifest()
        robot = labeler.robot
        robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
        chosen = range(min(len(dataset), episodes or len(dataset)))
        clips, actions = zip(*(recorded_clip(dataset, i, labeler.clock) for i in chosen), strict=True)
        labels = []
        batches = [clips[i : i + batch_size] for i in range(0, len(clips), batch_size)]
        for batch in progress(batches, len(batches), "label held-out video", out, unit="batch"):
            labels += labeler.label(batch)
        scores = score_labels(labels, actions, robot)
        scores["state"] = state_errors(labeler, clips, actions, dataset, chosen)
        results: dict = {"idm": scores, "replay": {}}
        if sim is not None:
            world = sim()
            known = [i for i in chosen if "seed" in dataset.episode(i).meta]
            recorded = [dataset.episode(i) for i in known]
            begun = [(e.instruction, e.meta.get("scene_of") or e.instruction, int(e.meta["seed"])) for e in recorded]
            chain = {"recorded": [(*start, e.action) for start, e in zip(begun, recorded, strict=True)],
                     "idm_real": [(*start, labels[i].value) for start, i in zip(begun, known, strict=True)]}
            if dreams:
                chain["idm_dream"] = dreamed(Dataset(dreams, robot), episodes)
            for name, items in chain.items():
                if items:
                    results["replay"][name] = _replayed(world, items, settle, name, out)
            world.close()
        write_json(Path(out) / "scores.json", results)
        return run.finish(episodes=len(clips), **results)


def dreamed(dataset: Dataset, episodes: int | None) -> list[tuple[str, str, int, np.ndarray]]:
    """(instruction, scene, seed, actions) of the labelled dreams whose first frame came from the simulator."""
    found = []
    for index in range(min(len(dataset), episodes or len(dataset))):
        episode = dataset.episode(index)
        origin = episode.meta.get("origin") or {}
        if "seed" in origin and "instruction" in origin:
            found.append((episode.instruction, origin["instruction"], int(origin["seed"]), episode.action))
    return found
