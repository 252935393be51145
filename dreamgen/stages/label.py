"""Dreams, or recordings without actions -> a LeRobot dataset with pseudo-actions, their spread, pseudo-states and
provenance.

Rows are robot steps: a dream's frame stands at the row that shows it and is repeated until the next one. The column
`frame_fresh` marks the rows whose picture is new (`meta["frame_rows"]` lists them): only these are observations.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dreamgen.core.clip import Clip, Episode, Labels
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.kinematics import follow
from dreamgen.core.manifest import Stage, is_complete, require_complete
from dreamgen.core.protocols import Labeler
from dreamgen.data.clips import ClipFolder, dreamt_by
from dreamgen.data.layout import INFO
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import Recordings, noted
from dreamgen.data.video_folder import VideoFolder, is_video_folder
from dreamgen.data.writer import require_free, write_dataset
from dreamgen.engine.precision import place
from dreamgen.engine.progress import progress
from dreamgen.stages.sharing import Parts, Shard, alone, grouped
from dreamgen.video.tiling import untile

PART = ("value", "spread", "state", "known")  # what is stored of a clip's labels until all are there
BAD = "bad"  # and, in their place, why a bad clip was left out
log = logging.getLogger(__name__)


def labels_and_states(labeler: Labeler, clips: Sequence[Clip]) -> tuple[list[Labels], list[np.ndarray] | None]:
    """Labels of the clips, and the states (s + 1, d) that a labeler reads from the same frames; None: it reads none."""
    if hasattr(labeler, "labels_and_states"):
        return labeler.labels_and_states(clips)
    return labeler.label(clips), None


def pseudo_states(robot: Embodiment, clips: Sequence[Clip], labels: Sequence[Labels],
                  read: Sequence[np.ndarray] | None) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Per clip the states (s d) and which entries are known (s d) float32.

    The first state is known where the clip brings it. Later ones are what was `read` from the frames, if it was, else
    what follows of the first under the labels (`dreamgen.core.kinematics`); without either they are zero and unknown.
    """
    found = []
    for clip, label, seen in zip(clips, labels, read or [None] * len(clips), strict=True):
        steps = len(label.value)
        first_known = clip.state.size == robot.state_dim and robot.state_dim > 0
        if seen is not None:
            state, known = seen[:steps].astype(np.float32), np.ones((steps, robot.state_dim), np.float32)
        elif first_known:
            state, sure = follow(robot, clip.state, label.value)
            state, known = state[:-1], np.repeat(sure[None], steps, axis=0).astype(np.float32)
        else:
            state = np.zeros((steps, robot.state_dim), np.float32)
            known = np.zeros_like(state)
        if first_known:
            state[0], known[0] = clip.state, 1.0
        found.append((state, known))
    return found


def labelled_episode(robot: Embodiment, clip: Clip, label: Labels, state: np.ndarray, known: np.ndarray,
                     source: dict) -> Episode:  # fmt: skip
    """One row per robot step; the last frame only ends the last step and has no row. The seed is that of the dream, or
    that which a simulator began the recording with."""
    clock = Clock(robot_hz=robot.robot_hz, video_hz=clip.video_hz, frames=len(clip.video))
    steps = np.arange(len(label.value))
    frame = np.searchsorted(clock.rows, steps, side="right") - 1
    fresh = np.isin(steps, clock.rows)
    views = {name: frames[frame] for name, frames in untile(robot, clip.video).items()}
    extra = {"label_spread": label.spread, "state_known": known, "frame_fresh": fresh[:, None].astype(np.float32)}
    if not robot.state_dim:
        extra.pop("state_known")
    seed = clip.seed if source.get("source", "dream") == "dream" else clip.origin.get("seed")
    meta = {"prompt": clip.id, **({} if seed is None else {"seed": seed}), "pair": clip.pair, "origin": clip.origin,
            "scores": {**clip.scores, "label_spread": float(label.spread.mean())},
            "frame_rows": np.flatnonzero(fresh).tolist(), "video_hz": clip.video_hz, **source}  # fmt: skip
    return Episode(instruction=clip.instruction, state=state, action=label.value, video=views, extra=extra, meta=meta)


def label(
    labeler: Labeler,
    clips: str | Path | Dataset,
    *,
    out: Path,
    robot: Embodiment,
    batch_size: int = 16,
    codec: str = "h264",
    crf: int | None = None,
    workers: int = 1,
    shard: int = 0,
    num_shards: int = 1,
    skip_bad: bool = False,
    seed: int = 0,
    record: dict,
) -> dict:
    """Label the dreams of the finished stage `clips` and write them as a LeRobot dataset to `out`, in order of id.

    clips: also a LeRobot dataset of the robot, with or without actions, which are not looked at, a folder of video
    files, or any dataset that is open already; all of these must bring instructions, as what is written will. skip_bad:
    leave out episodes and dreams that cannot be read or labelled (rate, size or length), and list them in the manifest.

    Shards share out the labelling, batch by batch; the call that finds all labels there writes the dataset, on
    `workers` threads.

    Raises ValueError for unfinished dreams, no dreams, a shard out of range, a labeler of another robot, and clips that
    it cannot label (rate, size or length; names the clip).
    """
    mine = Shard(shard, num_shards)
    dataset = _recorded(clips, robot, labeler, skip_bad)
    clips, recorded = Path(clips) if dataset is None else dataset.root, dataset is not None
    made = {} if recorded else require_complete(clips, "dreams")
    # a labeler of latent actions reads the videos of one embodiment and writes the actions of another
    getattr(labeler, "source", labeler.robot).require(robot.contract(), "the dreams' robot")
    robot, kind = labeler.robot, "recordings" if recorded else "dreams"
    parents = {kind: clips} | ({"labeler": labeler.path} if getattr(labeler, "path", None) else {})
    require_free(out)
    with Stage(out, "label", config=record, parents=parents, seed=seed, shared=True) as run:
        if run.complete:
            return run.manifest()
        parts = Parts(Path(out) / "parts")
        folder = (ClipFolder(clips / "clips") if dataset is None else
                  Recordings(dataset, labeler.clock, run.spec["parents"][kind]))  # fmt: skip
        batches = grouped(folder.ids(), batch_size)
        if not batches:
            raise ValueError(f"{clips} holds no {kind}; give its stage at least one prompt")
        stored = parts.stored()
        left = [number for number in mine.of(range(len(batches))) if number not in stored]
        if left:
            place(labeler)
        for number in progress(left, len(left), mine.title("label"), out, unit="batch"):
            parts.write(number, _labelled(labeler, folder, batches[number], skip_bad))
        missing = len(batches) - len(parts.stored())
        if missing:
            return {"complete": False, "batches": len(batches) - missing, "left": missing}
        source = {"source": "recording" if recorded else "dream", kind: run.spec["parents"][kind],
                  "labeler": run.spec["parents"].get("labeler", "")}  # fmt: skip
        if not recorded:
            source["world_model"] = dreamt_by(made)

        def episodes() -> Iterator[Episode]:
            for number, ids in enumerate(batches):
                part = parts.read(number)
                for row, id in [(row, id) for row, id in enumerate(ids) if f"{row}/{BAD}" not in part]:
                    value, spread, state, known = (part[f"{row}/{name}"] for name in PART)
                    found = Labels(value=value, spread=spread)
                    yield labelled_episode(robot, folder.read(id), found, state, known, source)

        with alone(out, mine) as may_end:  # shards that end together do not write twice
            if not may_end:
                return {"complete": False, "batches": len(batches), "left": 0}
            if is_complete(out):
                return run.manifest()
            spreads, bad = _stored(parts, batches)
            if not spreads:
                raise ValueError(f"none of the {kind} of {clips} can be read ({next(iter(bad.values()))}); mend them, "
                                 f"delete {out} and label again")  # fmt: skip
            write_dataset(out, episodes(), robot, codec=codec, crf=crf, workers=workers)
            spread = np.mean([rows.mean(0) for rows in spreads], axis=0)
            by_part = {part.name: float(spread[part.slice].mean()) for part in robot.action}
            told = noted(dataset)
            told["skipped"] += [{"dataset": clips.name, "episode": id, "reason": why} for id, why in bad.items()]
            manifest = run.finish(episodes=len(spreads), rows=sum(map(len, spreads)), spread=by_part, **told)
            shutil.rmtree(parts.root)
            return manifest


def _recorded(clips: str | Path | Dataset, robot: Embodiment, labeler: Labeler, skip_bad: bool) -> Dataset | None:
    """The videos to be labelled where they are not a stage's dreams. ValueError if one has no instruction."""
    if isinstance(clips, Dataset):
        dataset = clips
        robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
    elif (Path(clips) / INFO).is_file():
        dataset = Dataset(clips, robot, skip_bad=skip_bad, actions=False)
    elif is_video_folder(Path(clips)):
        dataset = VideoFolder(clips, robot, skip_bad=skip_bad, video_hz=labeler.clock.video_hz)
    else:
        return None
    for i in range(len(dataset)):
        dataset.instruction(i)
    return dataset


def _labelled(labeler: Labeler, folder: ClipFolder | Recordings, ids: Sequence[str],
              skip_bad: bool) -> dict[str, np.ndarray]:  # fmt: skip
    """Labels and pseudo-states of a batch, by row and name."""
    clips, made = {}, {}
    check = getattr(labeler, "check", lambda clip: None)
    for row, id in enumerate(ids):
        try:
            clip = folder.read(id)
            check(clip)
        except ValueError as error:
            if not skip_bad:
                raise
            log.warning("%s is left out: %s", id, error)
            made[f"{row}/{BAD}"] = np.array(str(error))
            continue
        clips[row] = clip
    if not clips:
        return made
    whole = list(clips.values())
    labels, read = labels_and_states(labeler, whole)
    for row, found, state in zip(clips, labels, pseudo_states(labeler.robot, whole, labels, read), strict=True):
        made |= {f"{row}/{name}": array for name, array in zip(PART, (found.value, found.spread, *state), strict=True)}
    return made


def _stored(parts: Parts, batches: Sequence[Sequence[str]]) -> tuple[list[np.ndarray], dict[str, str]]:
    """The spread of every label, and why the other clips were left out, by id."""
    spreads, bad = [], {}
    for number, ids in enumerate(batches):
        part = parts.read(number)
        for row, id in enumerate(ids):
            if f"{row}/{BAD}" in part:
                bad[id] = str(part[f"{row}/{BAD}"])
            else:
                spreads.append(part[f"{row}/spread"])
    return spreads, bad
