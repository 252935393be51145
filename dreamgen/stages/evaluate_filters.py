"""What are filters worth? Their scores against the truth: each dream's labels replayed from its own first state.

Only a simulator can replay, so the truth is a ceiling for experiments (the oracle), never a filter.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dreamgen.core.intervals import success_interval
from dreamgen.core.manifest import Stage, read_json, require_complete, write_json
from dreamgen.core.protocols import Sim
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.engine.progress import progress
from dreamgen.sims.rollout import replay
from dreamgen.stages.agreement import auroc_interval, auroc_within, chosen_rate
from dreamgen.stages.curate import SCORES
from dreamgen.stages.evaluate_labels import held, laid_out
from dreamgen.stages.selection import totals


def evaluate_filters(
    scored: Path,
    dataset: Dataset,
    sim: Callable[[], Sim] | None,
    *,
    out: Path,
    settle: int = 6,
    share: float = 0.5,
    draws: int = 1000,
    seed: int = 0,
    record: dict,
) -> dict:
    """Replay the labels of every scored dream whose first frame came from the simulator, and which it can lay out, and
    compare.

    scored: a finished `curate`; dataset: the one it scored. settle: steps of holding still after the labels. share: of
    clips that a filter would keep, for its gain. draws: of the bootstrap, of first states with all their dreams.

    Writes `truth.json` ({id, episode, instruction, success}). Results: success (all replayed), filters {name: auroc,
    low, high, n, positives, within (one instruction only), chosen (success rate of the best `share`), gain (share of
    the oracle's gain over a random subset)}, "mean" for the mean rank over filters, `yields` as curate wrote them,
    clips, left_out: how many were replayed, and how many not.
    Raises ValueError without a simulator, for scores of another dataset, and where nothing can be replayed.
    """
    if sim is None:
        raise ValueError("evaluate_filters needs a simulator for the truth and the recipe has none; choose one")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected 0 < share <= 1")
    made = require_complete(scored, "the scores")
    parents = {"scored": scored, "dataset": dataset.root}
    with Stage(out, "evaluate_filters", config=record, parents=parents, seed=seed) as run:
        if run.complete:
            return run.manifest()
        rows = read_json(Path(scored) / SCORES)
        if made["parents"].get("dataset") != run.spec["parents"]["dataset"]:
            raise ValueError(f"{scored} scores another dataset than {dataset.root}; give the one that was curated")
        truth = replayed(rows, dataset, sim, settle, out)
        if not truth:
            raise ValueError(f"none of the {len(rows)} clips of {scored} has an origin in the simulator (instruction "
                             f"and seed) and an instruction that it knows; dream from prompts=sim, or from episodes "
                             f"that were collected, under its instructions")  # fmt: skip
        write_json(Path(out) / "truth.json", truth)
        success = {row["id"]: row["success"] for row in truth}
        every, rows = len(rows), [row for row in rows if row["id"] in success]
        names = list(rows[0]["scores"])
        scores = np.array([[row["scores"][name] for name in names] for row in rows], np.float64)
        positive = np.array([success[row["id"]] for row in rows])
        columns = dict(zip(names, scores.T, strict=True)) | {"mean": totals(scores, names)}
        texts, pairs = [row["instruction"] for row in rows], [row["pair"] for row in rows]
        found = {name: worth(column, positive, texts, pairs, share=share, draws=draws, seed=seed)
                 for name, column in columns.items()}  # fmt: skip
        return run.finish(success=success_interval(int(positive.sum()), len(positive)), filters=found,
                          yields=made["results"]["yields"], clips=len(rows), left_out=every - len(rows),
                          **noted(dataset))  # fmt: skip


def worth(score: np.ndarray, positive: np.ndarray, texts: list[str], pairs: list[str], *, share: float, draws: int,
          seed: int) -> dict:  # fmt: skip
    """AUROC with its interval, within one instruction, and what choosing the best `share` gains.

    texts, pairs: instruction and first state of each of (n,) scores.
    """
    count = max(1, round(share * len(positive)))
    chance, best, mine = positive.mean(), min(1.0, positive.sum() / count), chosen_rate(score, positive, share)
    gain = float((mine - chance) / (best - chance)) if best > chance else None
    return {**auroc_interval(score, positive, groups=pairs, draws=draws, seed=seed),
            "within": auroc_within(score, positive, texts), "abstained": int(np.isnan(score).sum()), "chosen": mine,
            "oracle": float(best), "gain": gain}  # fmt: skip


def replayed(rows: list[dict], dataset: Dataset, sim: Callable[[], Sim], settle: int, out: Path) -> list[dict]:
    """Which scored clips succeed in the simulator under their labels, from the state their first frame shows; those
    that it cannot lay out are left out."""
    number = {dataset.index(i): i for i in range(len(dataset))}
    known = [row for row in rows if {"seed", "instruction"} <= set(row["origin"]) and row["episode"] in number]
    world = sim()
    try:
        known = [known[k] for k in laid_out(world, [(r["instruction"], r["origin"]["instruction"]) for r in known])]
        found = []
        for row in progress(known, len(known), "replay", out, unit="episode"):
            origin: Mapping = row["origin"]
            scene = {} if row["instruction"] == origin["instruction"] else {"scene_of": origin["instruction"]}
            number_of = number[row["episode"]]
            action = held(dataset.episode(number_of).action, world.robot, settle)
            begun = dataset.first_state(number_of)
            done = replay(world, row["instruction"], int(origin["seed"]), action, begun, **scene)
            found.append({key: row[key] for key in ("id", "episode", "instruction")} | {"success": bool(done)})
    finally:
        world.close()
    return found
