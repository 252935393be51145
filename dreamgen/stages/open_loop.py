"""One number for how far a policy's chunks lie from recorded ones."""

import numpy as np

from dreamgen.core.clip import Observation
from dreamgen.core.protocols import Policy
from dreamgen.core.seeding import seed_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.states import known_states
from dreamgen.stages.label_scores import errors, middle

STILL = 1e-5  # what varies by less


def open_loop_error(policy: Policy, dataset: Dataset, *, every: int = 4, batch_size: int = 32, seed: int = 0) -> float:
    """Mean square difference from the recorded actions that follow every `every`-th row, in units of each entry's
    standard deviation, of rotations the angle in units of that from their mean, of what stands still in its own units;
    steps past an episode's end do not count. ValueError for a dataset of another robot."""
    policy.robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
    actions = dataset.actions()
    scale = actions.std(0, dtype=np.float64)
    scale = np.where(scale < STILL, 1, scale)
    turns = [part for part in policy.robot.action if part.rotation]
    plain = np.array([not part.rotation for part in policy.robot.action for _ in range(part.width)])
    spread = {part.name: np.sqrt((errors(part, middle(part, own), own) ** 2).mean())
              for part in turns for own in [actions[:, part.slice]]}  # fmt: skip
    size = {name: 1 if value < STILL else value for name, value in spread.items()}
    places = [(i, row) for i in range(len(dataset)) for row in range(0, dataset.length(i), every)]
    total, count = 0.0, 0
    for start in range(0, len(places), batch_size):
        group = places[start : start + batch_size]
        seen = []
        for i, row in group:
            source, views = dataset.episode(i), dataset.views(i, [row])
            seen.append(Observation(views={name: frames[0] for name, frames in views.items()},
                                    state=known_states(source, row), instruction=source.instruction))  # fmt: skip
        chunks = policy.act(seen, [seed_for(seed, "open_loop", i, row) for i, row in group])
        for (i, row), chunk in zip(group, chunks, strict=True):
            true = dataset.episode(i).action[row : row + policy.horizon]
            gap = ((chunk[: len(true)] - true) / scale)[:, plain]
            gap = np.concatenate([gap, *(errors(part, chunk[: len(true), part.slice], true[:, part.slice])
                                         / size[part.name] for part in turns)], 1)  # fmt: skip
            total, count = total + float((gap**2).sum()), count + gap.size
    return total / max(1, count)
