"""Does what the model dreams of other actions come true? The same streams, executed in the simulator.

Every clip of a `dream` over action prompts is replayed from its own first state. The judge speaks of the dream, the
simulator of what really happens; where a tracker is given, final positions of objects are compared as well.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dreamgen.core.manifest import Stage, replacing, require_complete, write_json
from dreamgen.core.protocols import Judge, Sim, Tracker
from dreamgen.data.clips import ClipFolder
from dreamgen.engine.precision import place
from dreamgen.engine.progress import progress
from dreamgen.filters.judged import require_known
from dreamgen.sims.rollout import begin
from dreamgen.stages.agreement import auroc_interval
from dreamgen.video.sheet import captioned, grid, png
from dreamgen.video.tiling import tile


def evaluate_counterfactuals(
    dreams: Path,
    judge: Judge,
    sim: Callable[[], Sim] | None,
    *,
    out: Path,
    locator: Tracker | None = None,
    near: float = 0.03,
    hand: str = "hand",
    sheets: int = 8,
    seed: int = 0,
    record: dict,
) -> dict:
    """Results: success {auroc, low, high, n, positives}; optimism (share of real failures that the judge calls
    successes in the dream), pessimism; by_stream {stream: real and dreamt success rates, n}, all of the clips that
    the judge speaks of; with a tracker `positions`, of all clips, by thing (see there).

    hand: the tracked name of the gripper. Writes `pairs.json`: {pair: [{id, stream, real, probability}]}, and contact
    sheets of `sheets` pairs.

    Raises ValueError without a simulator, for clips whose origin has no actions or no first state in the simulator, for
    a judge that knows none of their instructions or is of another robot, another simulator than that of the first
    frames, and for an unfinished dream.
    """
    if sim is None:
        raise ValueError("counterfactuals are checked against a simulator and the recipe has none; choose sim=...")
    require_complete(dreams, "the dreams")
    with Stage(out, "evaluate_counterfactuals", config=record, parents={"dreams": dreams}, seed=seed) as run:
        if run.complete:
            return run.manifest()
        folder = ClipFolder(Path(dreams) / "clips")
        ids = folder.ids()
        require_known(judge, sorted({folder.info(id)["instruction"] for id in ids}))
        place(judge, locator)
        world, threshold = sim(), getattr(judge, "threshold", 0.5)
        pairs: dict[str, list[dict]] = defaultdict(list)
        try:
            for part, name in ((judge, "the judge"), (locator, "the tracker")):
                world.robot.require_same(part, name)
            for id in progress(ids, len(ids), "replay", out, unit="clip"):
                clip = folder.read(id)
                actions, origin = clip.origin.get("actions"), clip.origin
                if actions is None or "seed" not in origin or "instruction" not in origin:
                    raise ValueError(f"clip '{id}' of {dreams} has no actions or no state in the simulator; dream "
                                     "them with mode=actions and first frames from the simulator")  # fmt: skip
                begin(world, origin["instruction"], int(origin["seed"]), clip.state)
                begun = world.objects() if locator is not None else {}
                clip = replace(clip, action=np.array(actions, np.float32))
                real = any([world.step(action) for action in clip.action])
                row = {"id": id, "pair": clip.pair, "stream": origin.get("stream", ""), "real": real,
                       "probability": float(judge.judge([clip])[0])}  # fmt: skip
                if locator is not None:
                    where, seen = world.objects(), world.observe().views
                    picture = tile(world.robot, {name: view[None] for name, view in seen.items()})
                    row["begun"], row["positions"] = ([at[name].tolist() for name in locator.names]
                                                      for at in (begun, where))  # fmt: skip
                    row["read"], row["dreamt"] = locator.track(np.stack([picture[0], clip.video[-1]])).tolist()
                pairs[clip.pair].append(row)
        finally:
            world.close()
        rows = [row for group in pairs.values() for row in group]
        write_json(run.out / "pairs.json", {pair: [{k: None if v != v else v for k, v in row.items()} for row in group]
                                            for pair, group in pairs.items()})  # fmt: skip
        for pair in list(pairs)[:sheets]:
            with replacing(run.out / "sheets" / f"{pair}.png") as temporary:
                temporary.write_bytes(png(captioned([told(folder, row) for row in pairs[pair]])))
        found = outcomes(rows, threshold)
        if locator is not None:
            found["positions"] = positions(list(pairs.values()), locator.names, near, hand)
        return run.finish(clips=len(rows), pairs=len(pairs), **found)


def told(folder: ClipFolder, row: Mapping) -> tuple[str, np.ndarray]:
    """A line of a contact sheet: caption and frames."""
    said = "no judgement" if row["probability"] != row["probability"] else f"judged {row['probability']:.2f}"
    text = f"{row['stream']}: {said}, really {'succeeded' if row['real'] else 'failed'}"
    return text, grid(folder.read(row["id"]).video, count=8, columns=8, height=64)


def outcomes(rows: Sequence[Mapping], threshold: float) -> dict:
    """Agreement of judged dreams with what really happened; abstentions do not count."""
    told = np.array([row["probability"] for row in rows], np.float64)
    real = np.array([row["real"] for row in rows], bool)
    spoken, yes = np.isfinite(told), told >= threshold

    def share(part: np.ndarray, of: np.ndarray) -> float | None:
        return float(part[of].mean()) if of.any() else None

    streams: dict[str, list[int]] = defaultdict(list)
    for k, row in enumerate(rows):
        streams[row["stream"]].append(k)
    by_stream = {name: {"n": int(spoken[ks].sum()), "real": share(real[ks], spoken[ks]),
                        "dreamt": share(yes[ks], spoken[ks])} for name, ks in streams.items()}  # fmt: skip
    return {
        "success": auroc_interval(told, real, groups=[row["pair"] for row in rows]),
        "optimism": share(yes, spoken & ~real),
        "pessimism": share(~yes, spoken & real),
        "abstained": int((~spoken).sum()),
        "by_stream": by_stream,
    }


def positions(groups: Sequence[Sequence[Mapping]], names: Sequence[str], near: float, hand: str) -> dict:
    """Final positions of the things that really moved by more than `near`, under some stream of their pair.

    {name: error (m, median), floor (the tracker's, on the simulator's picture of the same), coverage (share of the real
    positions to which a dreamt one of that thing comes within `near`), precision (the reverse), read (coverage by what
    the tracker reads off the simulator's pictures: what a perfect model reaches), held (coverage by where it began:
    what a still picture reaches), n}, and the same of "all" but the hand. What nothing moves proves nothing.
    """
    rows: dict[str, list[tuple]] = {}
    for group in groups:
        at = {key: np.array([row[key] for row in group]) for key in ("begun", "positions", "read", "dreamt")}  # m n 3
        for n, name in enumerate(names):
            real = at["positions"][:, n]
            if (np.linalg.norm(real - at["begun"][:, n], axis=-1) > near).any():
                far, seen, still = (np.linalg.norm(real[:, None] - at[key][None, :, n], axis=-1)
                                    for key in ("dreamt", "read", "begun"))  # fmt: skip
                of_pair = (far.diagonal(), seen.diagonal(),
                           *(gap < near for gap in (far.min(1), far.min(0), seen.min(1), still.min(1))))  # fmt: skip
                rows.setdefault(name, []).append(of_pair)
    found = {}
    for name, told in [*rows.items(), ("all", [row for name, each in rows.items() if name != hand for row in each])]:
        if told:
            error, floor, covered, precise, seen, held = map(np.concatenate, zip(*told, strict=True))
            found[name] = {"error": float(np.median(error)), "floor": float(np.median(floor)),
                           "coverage": float(covered.mean()), "precision": float(precise.mean()),
                           "read": float(seen.mean()), "held": float(held.mean()), "n": len(error)}  # fmt: skip
    return found
