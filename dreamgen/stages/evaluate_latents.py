"""Do latent actions hold the robot's actions? Probes beside controls, few labels, another clip's latents, codes.

Controls: the state alone, differences of pixels and of frozen features, the latents of other gaps; the ceiling is an
inverse dynamics model trained on all actions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamgen.core.clip import Clip
from dreamgen.core.clock import Clock
from dreamgen.core.manifest import Stage, replacing, write_json
from dreamgen.core.protocols import Labeler
from dreamgen.core.rotations import straightened
from dreamgen.core.seeding import rng_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.engine.precision import place
from dreamgen.engine.progress import progress
from dreamgen.stages.latent_scores import (
    by_gap,
    codebook_usage,
    label_efficiency,
    probe,
    r2_by_part,
    reachable,
    shuffled,
    split,
)
from dreamgen.stages.recorded_video import batches_of, long_enough


def pixel_differences(clip: Clip, cells: int = 16) -> np.ndarray:
    """(k d) differences of neighbouring frames, averaged over a grid of `cells` a side."""
    frames = torch.from_numpy(clip.video).permute(0, 3, 1, 2).float() / 255
    small = torch.nn.functional.adaptive_avg_pool2d(frames, cells).flatten(1).numpy()
    return small[1:] - small[:-1]


def feature_differences(clip: Clip, world_model: Any, cells: int = 8) -> np.ndarray:
    """(k d) differences of a world model's frozen latents of each frame by itself, averaged over a grid of at most
    `cells` a side: at 480 x 832 whole latents would be 74,880 entries of each gap."""
    found = world_model.encode(torch.from_numpy(clip.video)[:, None]).float().flatten(1, 2)
    sides = [min(side, cells) for side in found.shape[-2:]]
    small = torch.nn.functional.adaptive_avg_pool2d(found, sides).flatten(1).cpu().numpy()
    return small[1:] - small[:-1]


def swaps(labeler: Any, idm: Labeler, clips: Sequence[Clip], latents: Sequence[np.ndarray],
          actions: Sequence[np.ndarray], pictures: Path) -> dict:  # fmt: skip
    """Whose actions does the inverse dynamics model read from a clip's first frame under a donor's latents?

    R2 against the donor's actions and against the clip's own; `recorded` is its R2 on the donor's recording. Writes a
    picture: own recording, donor's recording, the clip's first frame under the donor's latents.
    """
    clock = Clock(robot_hz=labeler.source.robot_hz, video_hz=clips[0].video_hz, frames=len(clips[0].video))
    made, donors = [], []
    for n, clip in enumerate(clips):
        donor = (n + 1) % len(clips)
        length = min(len(latents[donor]), len(latents[n]), clock.frames - 1)
        video = labeler.carry_over(clip.video[0], latents[donor][:length])
        if video is None:
            return {}
        made.append(Clip(id=f"swap_{n}", video=video, video_hz=clip.video_hz, instruction=clip.instruction))
        donors.append(donor)
    spans = [clock.with_frames(len(clip.video)).steps for clip in made]
    read = np.concatenate([label.value for label in idm.label(made)])
    recorded = [label.value for label in idm.label(clips)]
    of_donor, own, seen = (
        np.concatenate([rows[i][:s] for i, s in zip(which, spans, strict=True)])
        for rows, which in ((actions, donors), (actions, range(len(clips))), (recorded, donors))
    )
    rows = [np.concatenate([*video[:8]], axis=1) for n in range(min(4, len(made)))
            for video in (clips[n].video, clips[donors[n]].video, made[n].video)]  # fmt: skip
    draw(pictures, rows)
    robot = labeler.source
    return {"donor": r2_by_part(read, of_donor, robot), "own": r2_by_part(read, own, robot),
            "recorded": r2_by_part(seen, of_donor, robot)}  # fmt: skip


def draw(path: Path, rows: Sequence[np.ndarray]) -> None:
    """Rows of pictures (h w 3) below each other, as a PNG, doubled in size."""
    from PIL import Image

    width = min(row.shape[1] for row in rows)
    picture = np.concatenate([row[:, :width] for row in rows]).repeat(2, 0).repeat(2, 1)
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, format="png")


def evaluate_latents(labeler: Any, dataset: Dataset, *, out: Path, idm: Labeler | None = None, world_model: Any = None,
                     episodes: int | None = None, pairs: Sequence[int] = (10, 50, 200, 1000), batch_size: int = 16,
                     seed: int = 0, record: dict) -> dict:  # fmt: skip
    """Score the latent-action model `labeler` on recordings that it was not trained on.

    idm: inverse dynamics of the same robot, the ceiling and the reader of donor swaps; null for neither. world_model:
    whose frozen latents are a control. pairs: sizes of the label-efficiency curve. Episodes shorter than a window of
    either labeler are left out.

    Results, also in `latents.json`: probe {latent, state, pixels, features, shuffled, idm: {linear, mlp: R2 by part}},
    efficiency {latent, pixels, features: {pairs: {part: {mean, std}}}}, pairs {there: gaps that probes train on,
    skipped: sizes above that}, head (R2 of the labelled head), swap, codes, change (share of the target that is not
    foretold), too_short: how many episodes were left out. `swap.png` shows the swaps. Raises ValueError if all were.
    """
    parents = {"dataset": dataset.root}
    parents |= {name: part.path for name, part in (("labeler", labeler), ("idm", idm)) if getattr(part, "path", None)}
    parents |= {"world_model": world_model.folder} if getattr(world_model, "folder", None) else {}
    with Stage(out, "evaluate_latents", config=record, parents=parents, seed=seed) as run:
        if run.complete:
            return run.manifest()
        robot = labeler.source
        robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
        dataset.require_actions("stage.dataset")
        place(labeler, idm, world_model)
        order = rng_for(seed, "latent episodes").permutation(len(dataset))
        chosen = sorted(order[: episodes or len(dataset)].tolist())
        chosen, too_short = long_enough(dataset, chosen, [labeler] if idm is None else [labeler, idm])
        gaps, actions, labels, shown = [], [], [], []
        features: dict[str, list] = {"latent": [], "pixels": []}
        features |= {} if world_model is None else {"features": []}
        batches = batches_of(dataset, chosen, labeler.clock, batch_size)
        count = -(-len(chosen) // batch_size)
        for clips, taken in progress(batches, count, "latents of held-out video", out, unit="batch"):
            gaps += labeler.gaps(clips)
            actions += taken
            if idm is not None:
                labels += idm.label(clips)
                shown += clips if len(shown) < 2 * batch_size else []
            features["pixels"] += [pixel_differences(clip) for clip in clips]
            if world_model is not None:
                features["features"] += [feature_differences(clip, world_model) for clip in clips]
        features["latent"] = [gap["latent"] for gap in gaps]
        clocks = [labeler.clock.with_frames(len(rows) + 1) for rows in features["latent"]]
        straight = straightened(robot.action, actions)
        true = [by_gap(a, clock).astype(np.float64) for a, clock in zip(straight, clocks, strict=True)]
        if robot.state_dim:
            states = straightened(robot.state, [dataset.episode(i).state for i in chosen])
            features["state"] = [state[clock.rows[:-1]] for state, clock in zip(states, clocks, strict=True)]
        features["shuffled"] = shuffled(features["latent"], seed)
        results: dict = {"probe": {name: probe(rows, true, robot, seed) for name, rows in features.items()}}
        results["efficiency"] = {name: label_efficiency(features[name], true, robot, seed, pairs=pairs)
                                 for name in ("latent", "pixels", "features") if name in features}  # fmt: skip
        there = len(split(true, seed).train)
        results["pairs"] = {"there": there, "skipped": reachable(pairs, there)[1]}
        if labeler.labelled:
            head = [np.concatenate([gap["action"][k, : b - a] for k, (a, b) in enumerate(clock.gaps())])
                    for gap, clock in zip(gaps, clocks, strict=True)]  # fmt: skip
            results["head"] = r2_by_part(np.concatenate(head), np.concatenate(actions), robot)
        if idm is not None:
            straight = straightened(robot.action, [label.value for label in labels])
            read = [by_gap(a, clock) for a, clock in zip(straight, clocks, strict=True)]
            found = r2_by_part(split(read, seed).test, split(true, seed).test, robot)
            results["probe"]["idm"] = {"linear": found, "mlp": found}
            few = len(shown)
            results["swap"] = swaps(labeler, idm, shown, features["latent"][:few], actions[:few], out / "swap.png")
        if "codes" in gaps[0]:
            results["codes"] = codebook_usage([gap["codes"] for gap in gaps], labeler.config["codebook"])
        results["change"] = float(sum(gap["left"].sum() for gap in gaps) / sum(gap["change"].sum() for gap in gaps))
        write_json(Path(out) / "latents.json", results)
        return run.finish(episodes=len(chosen), too_short=too_short, **noted(dataset), **results)
