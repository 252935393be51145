"""How far can an action-conditioned world model be followed? Drift, attention to actions, calibration, invented motion.

Recorded episodes are dreamt again from their first frame under their own actions, under another episode's, under small
and large disturbances, and under none. Pictures are compared with the recording; positions, which a tracker reads, with
the simulator's truth beside the tracker's own error on the recording.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dreamgen.core.clip import Prompt
from dreamgen.core.kinematics import follow
from dreamgen.core.manifest import Stage, write_json
from dreamgen.core.protocols import ActionWorldModel, Sim, Tracker
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.groups import group_of, others
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.data.streams import noisy, still
from dreamgen.engine.precision import place
from dreamgen.engine.progress import progress
from dreamgen.sims.rollout import begin
from dreamgen.stages.train_tracker import truth_of
from dreamgen.video.metrics import by_frame, psnr_by_frame
from dreamgen.video.mp4 import write_mp4
from dreamgen.video.tiling import tile
from dreamgen.worlds.rollout import follow_prompts

STREAMS = ("true", "shuffled", "small", "large", "still")
EXECUTED = ("true", "small", "large", "still")  # in the simulator, too


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
    before_hallucination (share of a rollout until a thing is astray that the tracker reads rightly on the recording at
    that time), readable (share of positions for which it does), listening {pixels, hand: error under shuffled / under
    true actions}, calibration {small, large: the hand's displacement dreamt, real, read off the simulator's picture,
    ratio of dreamt to read}, untouched, untouched_floor (share of things that move when nothing is commanded, in the
    dream and, which is the tracker's error, in the simulator), frames_per_second. Without a simulator nothing is read
    and the ratio is that to the embodiment's rule.

    Raises ValueError for episodes too short for one latent frame, a tracker of another robot, and a simulator in which
    the episodes begin otherwise.
    """
    parents = {"dataset": dataset.root}
    with Stage(out, "evaluate_world", config=record, parents=parents, seed=seed) as run, ExitStack() as opened:
        if run.complete:
            return run.manifest()
        robot, names = world_model.robot, locator.names if locator is not None else ()
        robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
        robot.require_same(locator, "the tracker")
        dataset.require_actions("stage.dataset")
        chosen, rows = choose(world_model, dataset, episodes, seed)
        world = sim() if sim is not None and locator is not None else None
        if world is not None:
            opened.callback(world.close)
            for i in [i for i in chosen if recorded_in(world, dataset, i)][:1]:
                begin_as(world, dataset, i)
        if hasattr(world_model, "read"):  # before the transformer takes the text encoder's place
            world_model.read(list(dict.fromkeys(dataset.episode(i).instruction for i in chosen)))
        place(world_model, locator)
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
            ends, read = executed(dataset, chosen, streams, world, locator, hand)
            if read:
                found["untouched_floor"] = float((went(read["still"], floor[:, 0], names, hand) > moved).mean())
            if hand in names:
                found["calibration"] = calibration(seen, ends, read, names.index(hand))
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
    return {"true": own, "shuffled": [own[k] for k in others([group_of(dataset, i) for i in chosen])],
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
                              seed=seed_for(seed, "world", index), state=dataset.first_state(index), action=actions[k],
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
    readable = own <= astray  # what the tracker misreads in reality is no hallucination
    wrong = (far > astray) & readable
    twice = (wrong[:, :-1] & wrong[:, 1:]).any(-1)
    first = np.where(twice.any(1), twice.argmax(1), truth.shape[1] - 1)
    found = {"before_hallucination": float((first / (truth.shape[1] - 1)).mean()), "readable": float(readable.mean())}
    if hand in names:
        n = names.index(hand)
        other = np.linalg.norm(seen["shuffled"][:, 1:, n] - truth[:, 1:, n], axis=-1).mean()
        listening["hand"] = float(other / max(far[:, 1:, n].mean(), 1e-9))
    far = went(seen["still"][:, -1], seen["still"][:, 0], names, hand)
    return found | {"untouched": float((far > moved).mean()), "untouched_m": float(np.median(far))}


def went(last: np.ndarray, first: np.ndarray, names: Sequence[str], hand: str) -> np.ndarray:
    """How far the things (m n 3) are from where they were, without the hand, (m n)."""
    return np.linalg.norm(last - first, axis=-1)[:, [n for n, name in enumerate(names) if name != hand]]


def recorded_in(world: Sim, dataset: Dataset, i: int) -> bool:
    """Whether episode i has a seed from which the simulator begins, and it tells where things are."""
    return hasattr(world, "objects") and "seed" in dataset.episode(i).meta


def begin_as(world: Sim, dataset: Dataset, i: int) -> None:
    """Begin as episode i does."""
    meta = dataset.episode(i).meta
    begin(world, meta["instruction"], int(meta["seed"]), dataset.first_state(i))


def executed(dataset: Dataset, chosen: Sequence[int], streams: dict, world: Sim | None, locator: Tracker,
             hand: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:  # fmt: skip
    """Where the hand really ends under each stream (m 3), and where the tracker sees all things on the simulator's last
    picture (m n 3). Where no simulator recorded the episodes the first is by the embodiment's rule, the second empty.
    """
    ends: dict[str, list] = {name: [] for name in EXECUTED}
    read: dict[str, list] = {name: [] for name in EXECUTED}
    robot = dataset.robot
    for k, i in enumerate(chosen):
        for name in EXECUTED:
            if world is not None and recorded_in(world, dataset, i):
                begin_as(world, dataset, i)
                for action in streams[name][k]:
                    world.step(action)
                if hand in locator.names:
                    ends[name].append(world.objects()[hand])
                picture = tile(robot, {view: seen[None] for view, seen in world.observe().views.items()})
                read[name].append(locator.track(picture)[0])
            elif hand in locator.names:
                part = robot.tools[0].position if robot.tools else robot.state[0].name
                where = next(p.slice for p in robot.state if p.name == part)
                ends[name].append(follow(robot, dataset.episode(i).state[0], streams[name][k])[0][-1][where])
    whole = all(len(found) == len(chosen) for found in read.values())
    return ({name: np.stack(found) for name, found in ends.items() if found},
            {name: np.stack(found) for name, found in read.items()} if whole else {})  # fmt: skip


def calibration(seen: dict[str, np.ndarray], ends: dict[str, np.ndarray], read: dict[str, np.ndarray], n: int) -> dict:
    """How far a disturbance moves the hand's last position, m: dreamt, really, and as the tracker reads it off the
    simulator's pictures; the ratio of dreamt to read (really, where nothing was read) is 1 if calibrated."""
    found = {}
    for name in ("small", "large"):
        dream = np.linalg.norm(seen[name][:, -1, n] - seen["true"][:, -1, n], axis=-1).mean()
        real = np.linalg.norm(ends[name] - ends["true"], axis=-1).mean()
        told = np.linalg.norm(read[name][:, n] - read["true"][:, n], axis=-1).mean() if read else None
        found[name] = {"dreamt": float(dream), "real": float(real), "read": None if told is None else float(told),
                       "ratio": float(dream / max(real if told is None else told, 1e-9))}  # fmt: skip
    return found
