"""How far can an action-conditioned world model be followed? Drift, attention to actions, calibration, invented motion.

Recorded episodes are dreamt again from their first frame under their own actions, under another episode's, under small
and large disturbances, and under none. Pictures are compared with the recording; positions, which a tracker reads, with
the simulator's truth beside the tracker's own error on the recording.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dreamgen.core.clip import Prompt
from dreamgen.core.kinematics import follow
from dreamgen.core.manifest import Stage, write_json
from dreamgen.core.protocols import ActionWorldModel, Sim, Tracker
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.data.streams import noisy, still
from dreamgen.engine.progress import progress
from dreamgen.stages.train_tracker import truth_of
from dreamgen.video.metrics import by_frame, psnr_by_frame
from dreamgen.video.mp4 import write_mp4
from dreamgen.worlds.rollout import follow_prompts

STREAMS = ("true", "shuffled", "small", "large", "still")


def evaluate_world(
    world_model: ActionWorldModel,
    dataset: Dataset,
    *,
    out: Path,
    locator: Tracker | None = None,
    sim: Callable[[], Sim] | None = None,
    episodes: int = 16,
    seconds: Sequence[float | int] = (1, 2, 5, 10),
    batch_size: int = 8,
    small: float = 0.1,
    large: float = 0.6,
    astray: float = 0.05,
    moved: float = 0.03,
    hand: str = "hand",
    films: int = 4,
    seed: int = 0,
    record: dict,
) -> dict:
    """Dream the `episodes` longest episodes of `dataset`, all as long as the shortest of them.

    seconds: horizons, as far as the episodes reach. small, large: disturbances, shares of an entry's half range; their
    effect is compared with that in `sim`, else by the embodiment's rule. astray: metres off that are a hallucination;
    moved: metres by which a thing has moved. hand: the tracked name of the gripper.

    Results: drift {horizon: psnr, ssim, lpips, hold_psnr (the first frame held), positions {name: error, floor} in m},
    before_hallucination (share of a rollout), listening {pixels, hand: error under shuffled / under true actions},
    calibration {small, large: dreamt, real, ratio of the hand's displacement}, untouched (share of things that move
    when nothing is commanded), frames_per_second. Raises ValueError for episodes too short for one latent frame.
    """
    parents = {"dataset": dataset.root}
    with Stage(out, "evaluate_world", config=record, parents=parents, seed=seed) as run:
        if run.complete:
            return run.manifest()
        if hasattr(world_model, "place"):
            world_model.place()
        robot, names = world_model.robot, locator.names if locator is not None else ()
        robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
        dataset.require_actions("stage.dataset")
        chosen, rows = choose(world_model, dataset, episodes, seed)
        real = np.stack([dataset.canvas(i, rows) for i in chosen])
        begun = time.perf_counter()
        streams = actions_of(robot, dataset, chosen, int(rows[-1]), small=small, large=large, seed=seed)
        dreams = {name: dreamt(world_model, dataset, chosen, real, streams[name], batch_size, seed)
                  for name in progress(STREAMS, len(STREAMS), "evaluate_world", out, unit="stream")}  # fmt: skip
        rate = real.shape[0] * (real.shape[1] - 1) * len(STREAMS) / (time.perf_counter() - begun)
        for k in range(min(films, len(chosen))):
            shown = np.concatenate([real[k], *(dreams[name][k] for name in STREAMS)], 2)
            write_mp4(run.out / "films" / f"{k:02d}.mp4", shown, world_model.clock.video_hz)
        hz = float(robot.rate / world_model.clock.stride)
        found = {"frames": len(rows), "episodes": len(chosen), "frames_per_second": rate,
                 "drift": drift(real, dreams["true"], seconds, hz)}  # fmt: skip
        error = {name: ((dreams[name][:, 1:] - real[:, 1:].astype(np.float32)) ** 2).mean() for name in STREAMS}
        found["listening"] = {"pixels": float(error["shuffled"] / max(error["true"], 1e-9))}
        if locator is not None:
            truth = np.stack([truth_of(dataset, i, names)[rows] for i in chosen])
            seen = {name: np.stack([locator.track(video) for video in dreams[name]]) for name in STREAMS}
            floor = np.stack([locator.track(video) for video in real])
            found |= tracked(names, truth, seen, floor, hz=hz, seconds=seconds, astray=astray, moved=moved, hand=hand,
                             listening=found["listening"], drifts=found["drift"])  # fmt: skip
            if hand in names:
                effect = real_effect(robot, dataset, chosen, streams, sim, hand)
                found["calibration"] = calibration(seen, effect, names.index(hand))
        write_json(run.out / "results" / "world.json", found)
        return run.finish(**found, **noted(dataset))


def choose(world: ActionWorldModel, dataset: Dataset, episodes: int, seed: int) -> tuple[list[int], np.ndarray]:
    """The longest episodes, and the rows of the frames that all of them have."""
    order = rng_for(seed, "episodes").permutation(len(dataset))
    chosen = sorted(sorted(order, key=lambda i: -dataset.length(int(i)))[:episodes])
    gap, clock = getattr(world, "gaps", 1), world.clock
    frames = clock.frames_in(min(dataset.length(int(i)) for i in chosen))
    frames = (frames - 1) // gap * gap + 1
    if frames < 2 or len(chosen) < 2:
        raise ValueError(f"{dataset.root} has {len(dataset)} episodes, the shortest of the longest {episodes} shows "
                         f"{frames} frames; expected 2 or more episodes of at least {gap + 1} frames")  # fmt: skip
    return [int(i) for i in chosen], clock.with_frames(frames).rows


def actions_of(robot: object, dataset: Dataset, chosen: Sequence[int], steps: int, *, small: float, large: float,
               seed: int) -> dict[str, list[np.ndarray]]:  # fmt: skip
    """The streams (s a) of every episode."""
    own = [dataset.episode(i).action[:steps] for i in chosen]
    rngs = [rng_for(seed, "disturbed", i) for i in chosen]
    return {"true": own, "shuffled": own[1:] + own[:1],
            "small": [noisy(robot, a, small, rng, smooth=0.6) for a, rng in zip(own, rngs, strict=True)],
            "large": [noisy(robot, a, large, rng, smooth=0.6) for a, rng in zip(own, rngs, strict=True)],
            "still": [still(robot, a) for a in own]}  # fmt: skip


def dreamt(
    world: ActionWorldModel,
    dataset: Dataset,
    chosen: Sequence[int],
    real: np.ndarray,
    actions: Sequence[np.ndarray],
    batch_size: int,
    seed: int,
) -> np.ndarray:
    """The dreams (m t h w 3) of the episodes under these actions."""
    prompts = []
    for k, index in enumerate(chosen):
        episode = dataset.episode(index)
        prompts.append(Prompt(id=f"w{k:05d}", image=real[k][0], instruction=episode.instruction,
                              seed=seed_for(seed, "world", index), state=episode.state[0], action=actions[k],
                              origin=dict(episode.meta)))  # fmt: skip
    return np.stack([past.video for past in follow_prompts(world, prompts, batch_size=batch_size)])


def horizons(seconds: Sequence[float | int], hz: float, frames: int) -> dict[str, int]:
    """Frame of every horizon that the episodes reach, and of their end."""
    known = {f"{s:g}s": round(s * hz) for s in seconds if round(s * hz) < frames}
    return known | {"end": frames - 1}


def drift(real: np.ndarray, dream: np.ndarray, seconds: Sequence[float | int], hz: float) -> dict:
    """Likeness of single frames at each horizon, mean over episodes; LPIPS where it can be had."""
    found = {}
    for name, k in horizons(seconds, hz, real.shape[1]).items():
        found[name] = {key: float(value.mean()) for key, value in by_frame(real[:, k], dream[:, k]).items()}
        found[name]["hold_psnr"] = float(psnr_by_frame(real[:, k], real[:, 0]).mean())
    return found


def tracked(names: Sequence[str], truth: np.ndarray, seen: dict[str, np.ndarray], floor: np.ndarray, *, hz: float,
            seconds: Sequence[float | int], astray: float, moved: float, hand: str, listening: dict,
            drifts: dict) -> dict:  # fmt: skip
    """What positions (m t n 3) say; adds to `listening` and `drifts`."""
    far = np.linalg.norm(seen["true"] - truth, axis=-1)  # episodes frames things
    own = np.linalg.norm(floor - truth, axis=-1)
    for name, k in horizons(seconds, hz, truth.shape[1]).items():
        drifts[name]["positions"] = {thing: {"error": float(np.median(far[:, k, n])),
                                             "floor": float(np.median(own[:, k, n]))}
                                     for n, thing in enumerate(names)}  # fmt: skip
    wrong = (far > astray).any(-1) & (own <= astray).all(-1)  # what the tracker misreads in reality is no hallucination
    twice = wrong[:, :-1] & wrong[:, 1:]
    first = np.where(twice.any(1), twice.argmax(1), truth.shape[1] - 1)
    found = {"before_hallucination": float((first / (truth.shape[1] - 1)).mean())}
    if hand in names:
        n = names.index(hand)
        other = np.linalg.norm(seen["shuffled"][:, 1:, n] - truth[:, 1:, n], axis=-1).mean()
        listening["hand"] = float(other / max(far[:, 1:, n].mean(), 1e-9))
    things = [n for n, name in enumerate(names) if name != hand]
    went = np.linalg.norm(seen["still"][:, -1] - seen["still"][:, 0], axis=-1)[:, things]
    return found | {"untouched": float((went > moved).mean()), "untouched_m": float(np.median(went))}


def real_effect(robot: object, dataset: Dataset, chosen: Sequence[int], streams: dict, sim: Callable[[], Sim] | None,
                hand: str) -> dict[str, np.ndarray]:  # fmt: skip
    """Where the hand really ends under each stream (m 3): in the simulator, else by the embodiment's rule."""
    ends: dict[str, list] = {name: [] for name in ("true", "small", "large")}
    world = sim() if sim is not None else None
    try:
        for k, i in enumerate(chosen):
            meta, state = dataset.episode(i).meta, dataset.episode(i).state[0]
            for name, found in ends.items():
                if world is not None and hasattr(world, "objects") and "seed" in meta:
                    world.reset(meta["instruction"], int(meta["seed"]))
                    for action in streams[name][k]:
                        world.step(action)
                    found.append(world.objects()[hand])
                else:
                    part = robot.tools[0].position if robot.tools else robot.state[0].name
                    where = next(p.slice for p in robot.state if p.name == part)
                    found.append(follow(robot, state, streams[name][k])[0][-1][where])
    finally:
        if world is not None:
            world.close()
    return {name: np.stack(found) for name, found in ends.items()}


def calibration(seen: dict[str, np.ndarray], effect: dict[str, np.ndarray], n: int) -> dict:
    """How far a disturbance moves the hand's last position, dreamt and really, m; their ratio is 1 if calibrated."""
    found = {}
    for name in ("small", "large"):
        dream = np.linalg.norm(seen[name][:, -1, n] - seen["true"][:, -1, n], axis=-1).mean()
        real = np.linalg.norm(effect[name] - effect["true"], axis=-1).mean()
        found[name] = {"dreamt": float(dream), "real": float(real), "ratio": float(dream / max(real, 1e-9))}
    return found
