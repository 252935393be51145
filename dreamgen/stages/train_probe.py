"""Video of successes and failures -> a judge of tracked positions (`filters.positions`), saved in `out` itself.

Episodes are split as for a judge of pictures: to fit, to choose the threshold by, to measure on.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dreamgen.core.manifest import Stage, write_json
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.engine.precision import place
from dreamgen.engine.processes import require_alone
from dreamgen.engine.progress import progress
from dreamgen.filters.positions import PositionJudge
from dreamgen.filters.rates import threshold_for
from dreamgen.stages.judge_clips import Recorded
from dreamgen.stages.sharing import Parts, grouped
from dreamgen.stages.train_judge import measured, outcomes, three_ways

READ = "read"  # the folder of what was read, while its stage runs


def train_probe(
    judge: Callable[..., PositionJudge],
    datasets: Sequence[Dataset],
    *,
    out: Path,
    labels: Path | None = None,
    video_hz: str = "10",
    held_out_share: float = 0.3,
    least_precision: float | None = None,
    seed: int = 0,
    record: dict,
) -> dict:
    """Fit `judge()` to what its tracker reads off the episodes of `datasets`; the settings are those of `train_judge`.

    Results: held_out {auroc, low, high, n, positives, abstained, brier, ece, tpr, tnr, precision}, threshold, abstains:
    the instructions of which the fitting part does not hold both outcomes. Raises ValueError for episodes without
    success, too few of one outcome, bad labels, frames that the tracker does not read.
    """
    require_alone("train_probe")
    parents = {f"dataset_{k}": dataset.root for k, dataset in enumerate(datasets)}
    parents |= {"labels": labels} if labels else {}
    with Stage(out, "train_probe", config=record, parents=parents, seed=seed) as run:
        if run.complete:
            return run.manifest()
        clips = Recorded(datasets, outcomes(datasets, labels), video_hz)
        training, fitting, apart = three_ways(clips.success, held_out_share, seed, clips.groups)
        model, texts = judge(), [clips.instruction(k) for k in range(len(clips))]
        place(model)
        features = positions(model, clips, run.out)
        model.fit(features[training], clips.success[training], [texts[k] for k in training])
        told = model.probability(features, texts)
        model.threshold, reached = threshold_for(least_precision, told[fitting], clips.success[fitting])
        scores = {"held_out": measured(model, "real", told[apart], clips.success[apart],
                                       [clips.groups[k] for k in apart], seed)}  # fmt: skip
        model.save(out)
        write_json(Path(out) / "scores.json", scores)
        manifest = run.finish(episodes=[len(training), len(fitting), len(apart)], successes=int(clips.success.sum()),
                              threshold=model.threshold, threshold_precision=reached,
                              abstains=sorted(set(texts) - set(model.instructions)),
                              **noted(*datasets), **scores)  # fmt: skip
        shutil.rmtree(run.out / READ, ignore_errors=True)
        return manifest


def positions(model: PositionJudge, clips: Recorded, out: Path) -> np.ndarray:
    """The features (n m) of all clips. A stage that was killed goes on with the batch that it was at."""
    batches, parts = grouped(range(len(clips)), 32), Parts(out / READ)
    left = [number for number in range(len(batches)) if number not in parts.stored()]
    for number in progress(left, len(left), "read positions", out, unit="batch"):
        parts.write(number, {"features": np.stack([model.features(clips[k]) for k in batches[number]])})
    return np.concatenate([parts.read(number)["features"] for number in range(len(batches))])
