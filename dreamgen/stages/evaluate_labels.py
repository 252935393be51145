"""How far can labels be trusted? Scores on recorded video held out, and success when replayed in the simulator.

The chain of replays shows where success is lost: recorded actions -> labels of real video -> labels of dreams.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamgen.core.clip import Clip, Labels
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.intervals import success_interval
from dreamgen.core.kinematics import follow
from dreamgen.core.manifest import FILE, Stage, is_complete, read_json, write_json
from dreamgen.core.protocols import Labeler, Sim
from dreamgen.core.rotations import straightened
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted, recorded_clip
from dreamgen.engine.precision import place
from dreamgen.engine.progress import progress
from dreamgen.sims.rollout import begin, can_begin, replay
from dreamgen.stages.drawn import frames_through
from dreamgen.stages.label import labels_and_states, pseudo_states
from dreamgen.stages.label_scores import errors, score_labels
from dreamgen.stages.latent_scores import by_gap, probe
from dreamgen.stages.recorded_video import batches_of, long_enough

log = logging.getLogger(__name__)


def held(action: np.ndarray, robot: Embodiment, steps: int) -> np.ndarray:
    """Actions (s a) and `steps` more of holding still: deltas rest, absolute and binary parts keep their last value."""
    rest = np.repeat(action[-1:], steps, axis=0)
    for part in robot.action:
        if part.kind == "delta":
            rest[:, part.slice] = part.rest
    return np.concatenate([action, rest])


def state_errors(robot: Embodiment, true: Sequence[np.ndarray], labels: Sequence[Labels],
                 pseudo: Sequence[np.ndarray], read: Sequence[np.ndarray]) -> dict:  # fmt: skip
    """Mean absolute error by state part, of a rotation the angle in its unit (else rad), against the recorded states
    (s d): integrated from labels, read from frames (s + 1, d) where they are, and pseudo_state, which is what the stage
    `label` writes."""
    if not robot.state_dim:
        return {}
    found = {"integrated": [follow(robot, t[0], label.value)[0][:-1] for t, label in zip(true, labels, strict=True)],
             "pseudo_state": pseudo}  # fmt: skip
    if read:
        found["read"] = [s[: len(t)] for s, t in zip(read, true, strict=True)]
    rows, seen = {kind: np.concatenate(states) for kind, states in found.items()}, np.concatenate(true)
    return {kind: {part.name: float(errors(part, states[:, part.slice], seen[:, part.slice]).mean())
                   for part in robot.state} for kind, states in rows.items()}  # fmt: skip


def by_part(labels: Sequence[np.ndarray], actions: Sequence[np.ndarray], robot: Embodiment, clock: Clock) -> dict:
    """n, and R2 and MAE by part of labels (s a) against actions (s a); {} without any."""
    if not labels:
        return {}
    made = [Labels(value=label, spread=np.zeros_like(label)) for label in labels]
    scores = score_labels(made, actions, robot, clock)
    return {"n": len(labels), "r2": scores["r2"], "mae": scores["mae"]}


def coarse(clip: Clip) -> np.ndarray:
    """All frames but the last on a grid of 12 cells a side, (k d) float32 in [0, 1]."""
    frames = torch.from_numpy(clip.video[:-1]).permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.adaptive_avg_pool2d(frames, 12).flatten(1).numpy()


def previous_frame(seen: Sequence[np.ndarray], actions: Sequence[np.ndarray], clock: Clock, robot: Embodiment,
                   seed: int) -> dict:  # fmt: skip
    """Control: R2 by part of each gap's mean action from the frame before it alone, by probes on `coarse` pixels."""
    if len(seen) < 4:
        return {}
    actions = straightened(robot.action, actions)
    true = [by_gap(a, clock.with_frames(len(s) + 1)).astype(np.float64) for a, s in zip(actions, seen, strict=True)]
    return probe(seen, true, robot, seed, context=False)


def require_labelled_by(labeler: Any, dreams: Path, fingerprint: str | None) -> None:
    """Raise ValueError where the dataset `dreams` says that another labeler than this one made its labels."""
    made = read_json(Path(dreams) / FILE).get("parents", {}).get("labeler") if is_complete(dreams) else None
    if made and fingerprint and made != fingerprint:
        raise ValueError(f"the dreams {dreams} were labelled by labeler {made}, but {fingerprint} ({labeler.path}) is "
                         f"scored; label them with it and name that folder, or set stage.dreams=null")  # fmt: skip


def laid_out(sim: Sim, texts: Sequence[tuple[str, str]]) -> list[int]:
    """Which of the dreams of (instruction, scene) the simulator can begin; a warning counts the others."""
    kept = [k for k, (instruction, scene) in enumerate(texts) if can_begin(sim, instruction, scene)]
    if left := len(texts) - len(kept):
        log.warning("%d of %d dreams are not replayed: the simulator does not know their instruction, or cannot lay "
                    "out the scene of another one for it", left, len(texts))  # fmt: skip
    return kept


def _scene(instruction: str, scene: str) -> dict[str, str]:
    """How a simulator is asked for a scene."""
    return {} if scene == instruction else {"scene_of": scene}


def _replayed(sim: Sim, items: list[tuple[str, str, int, np.ndarray, np.ndarray]], settle: int, name: str,
              out: Path) -> dict:  # fmt: skip
    """Success of (instruction, scene, seed, first state, actions): overall with its interval, and by instruction."""
    done: list[tuple[str, bool]] = []
    for instruction, scene, seed, state, action in progress(items, len(items), f"replay {name}", out, unit="episode"):
        action = held(action, sim.robot, settle)
        done.append((instruction, bool(replay(sim, instruction, seed, action, state, **_scene(instruction, scene)))))
    texts = sorted({text for text, _ in done})
    groups = {text: [ok for other, ok in done if other == text] for text in texts}
    return {**success_interval(sum(ok for _, ok in done), len(done)),
            "by_instruction": {text: success_interval(sum(oks), len(oks)) for text, oks in groups.items()}}  # fmt: skip


def evaluate_labels(labeler: Labeler, dataset: Dataset, sim: Callable[[], Sim] | None = None, *, out: Path,
                    dreams: Path | None = None, world_model: Any = None, decoded_clips: int = 16,
                    episodes: int | None = None, settle: int = 6, batch_size: int = 16, seed: int = 0,
                    record: dict) -> dict:  # fmt: skip
    """Score `labeler` on `dataset`, whose episodes it must never have seen; those shorter than its window are left out.

    sim: makes the simulator in which the episodes were recorded; without one, nothing is replayed. dreams: a dataset
    labelled by this labeler; those of its episodes whose first frame came from the simulator (meta "origin":
    instruction, seed) are replayed from it, as far as it can lay them out. world_model: labels of `decoded_clips`
    recordings that passed its autoencoder are scored too. episodes: only the first so many of each. settle: steps of
    holding still afterwards.

    Results: idm {r2, mae, control_mae, lag, drift, auroc, accuracy, calibration, by part; state: errors of
    pseudo-states; previous_frame: a control that sees no motion; decoded: R2 and MAE on decoded recordings; dreamt: the
    same of dreams against what was recorded from the same first frame under the same instruction, which is low too
    where a dream does the task in another way: it measures world model and labeler together}; replay {recorded,
    idm_real, idm_dream: {successes, n, rate, low, high, by_instruction}}. They are also written to `scores.json`.
    too_short: how many episodes were left out. Raises ValueError if all were, and, before anything is labelled, for a
    simulator in which the episodes or the dreams begin otherwise.
    """
    parents = {"dataset": dataset.root} | ({"dreams": dreams} if dreams else {})
    parents |= {"labeler": labeler.path} if getattr(labeler, "path", None) else {}
    parents |= {"world_model": world_model.folder} if getattr(world_model, "folder", None) else {}
    with Stage(out, "evaluate_labels", config=record, parents=parents, seed=seed) as run, ExitStack() as opened:
        if run.complete:
            return run.manifest()
        robot = labeler.robot
        robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
        dataset.require_actions("stage.dataset")
        if dreams:
            require_labelled_by(labeler, dreams, run.spec["parents"].get("labeler"))
        first = range(min(len(dataset), episodes or len(dataset)))
        chosen, too_short = long_enough(dataset, first, [labeler])
        dreamt = Dataset(dreams, robot) if dreams else None
        known, begun, redreamt = [], [], []
        if sim is not None:
            world = sim()
            opened.callback(world.close)
            known = [i for i in chosen if "seed" in dataset.episode(i).meta]
            begun = [(e.instruction, e.meta.get("scene_of") or e.instruction, int(e.meta["seed"]),
                      dataset.first_state(i)) for i, e in ((i, dataset.episode(i)) for i in known)]  # fmt: skip
            redreamt = dreamed(dreamt, episodes, world) if dreamt is not None else []
            for text, scene, own, state, *_ in [*begun[:1], *redreamt[:1]]:
                begin(world, text, own, state, **_scene(text, scene))
        place(labeler, world_model)
        labels, actions, read, pseudo, seen = [], [], [], [], []
        batches = batches_of(dataset, chosen, labeler.clock, batch_size)
        for clips, true in progress(batches, -(-len(chosen) // batch_size), "label held-out video", out, unit="batch"):
            made, states = labels_and_states(labeler, clips)
            labels += made
            actions += true
            read += states or []
            pseudo += [state for state, _ in pseudo_states(robot, clips, made, states)]
            seen += [coarse(clip) for clip in clips]
        scores = score_labels(labels, actions, robot, labeler.clock)
        true = [dataset.episode(i).state[: len(label.value)] for i, label in zip(chosen, labels, strict=True)]
        scores["state"] = state_errors(robot, true, labels, pseudo, read)
        scores["previous_frame"] = previous_frame(seen, actions, labeler.clock, robot, seed)
        scores["decoded"] = decoded(labeler, world_model, dataset, chosen[:decoded_clips]) if world_model else {}
        if dreamt is not None:
            pairs = beside_recorded(dreamt, dataset, chosen, run.spec["parents"]["dataset"], episodes)
            scores["dreamt"] = by_part(*pairs, robot, labeler.clock)
        results: dict = {"idm": scores, "replay": {}}
        label_of = dict(zip(chosen, labels, strict=True))
        chain = {
            "recorded": [(*start, dataset.episode(i).action) for start, i in zip(begun, known, strict=True)],
            "idm_real": [(*start, label_of[i].value) for start, i in zip(begun, known, strict=True)],
            "idm_dream": redreamt,
        }
        for name, items in chain.items():
            if items:
                results["replay"][name] = _replayed(world, items, settle, name, out)
        write_json(Path(out) / "scores.json", results)
        return run.finish(episodes=len(chosen), too_short=too_short, **noted(dataset, dreamt), **results)


def decoded(labeler: Any, world_model: Any, dataset: Dataset, episodes: Sequence[int]) -> dict:
    """Scores of the labels of recordings that passed the autoencoder: how well dreams can be labelled at best."""
    frames = frames_through(world_model, labeler.clock.frames)
    read = [recorded_clip(dataset, i, labeler.clock) for i in episodes]
    read = [(clip, action) for clip, action in read if len(clip.video) >= frames]
    videos = [torch.from_numpy(clip.video[:frames])[None] for clip, _ in read]
    through = [world_model.decode(world_model.encode(video))[0].cpu().numpy() for video in videos]
    seen = [replace(clip, video=video) for (clip, _), video in zip(read, through, strict=True)]
    labels = [label.value for label in labeler.label(seen)] if seen else []
    true = [action[: len(label)] for (_, action), label in zip(read, labels, strict=True)]
    return by_part(labels, true, labeler.robot, labeler.clock)


def beside_recorded(dreams: Dataset, dataset: Dataset, chosen: Sequence[int], name: str,
                    count: int | None) -> tuple[list[np.ndarray], list[np.ndarray]]:  # fmt: skip
    """Labels of dreams, and what was recorded from the same first frame under the same instruction, (s a) each: in the
    `chosen` episodes of `dataset`, found by the dataset's fingerprint `name`, the number of the episode and the row, or
    of dreams of no recording of it by the seed of a simulator, which siblings share."""
    by_seed, by_number = {}, {}
    for i in chosen:
        e = dataset.episode(i)
        by_number[name, dataset.index(i), e.instruction] = e.action
        if "seed" in e.meta:
            by_seed[e.instruction, str(e.meta["seed"])] = e.action
    labels, actions = [], []
    for index in range(min(len(dreams), count or len(dreams))):
        dream = dreams.episode(index)
        origin, text = dream.meta.get("origin") or {}, dream.instruction
        if origin.get("dataset") == name:
            true = by_number.get((name, origin.get("episode"), text), dream.action[:0])[origin.get("row", 0) :]
        else:
            key = (text, str(origin.get("seed"))) if origin.get("instruction") == text else None
            true = by_seed.get(key, dream.action[:0])
        if len(true) >= len(dream.action):
            labels.append(dream.action)
            actions.append(true[: len(dream.action)])
    return labels, actions


def dreamed(dataset: Dataset, episodes: int | None,
            sim: Sim) -> list[tuple[str, str, int, np.ndarray, np.ndarray]]:  # fmt: skip
    """(instruction, scene, seed, first state, actions) of the labelled dreams whose first frame a simulator drew, and
    that `sim` can lay out."""
    found = []
    for index in range(min(len(dataset), episodes or len(dataset))):
        episode = dataset.episode(index)
        origin = episode.meta.get("origin") or {}
        if "seed" in origin and "instruction" in origin:
            begun = dataset.first_state(index)
            found.append((episode.instruction, origin["instruction"], int(origin["seed"]), begun, episode.action))
    return [found[k] for k in laid_out(sim, [item[:2] for item in found])]
