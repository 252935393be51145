"""How close are a policy's chunks to what was done, for robots that cannot be simulated?

The policy is asked every `every` rows of held-out episodes and its chunk is compared with the recorded actions that
follow; steps past the end of an episode do not count. This says little about success, since errors never meet their
consequences; a constant action (the mean of the held-out data) stands beside it as the control.
"""

from pathlib import Path

import numpy as np

from dreamgen.core.clip import Observation
from dreamgen.core.manifest import Stage
from dreamgen.core.protocols import Policy
from dreamgen.core.seeding import seed_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.data.states import known_states
from dreamgen.engine.precision import place
from dreamgen.engine.progress import progress
from dreamgen.stages.label_scores import errors, middle
from dreamgen.stages.served import served


def evaluate_open_loop(
    policy: Policy,
    dataset: Dataset,
    *,
    out: Path,
    every: int = 4,
    batch_size: int = 32,
    seed: int = 0,
    record: dict,
) -> dict:
    """Errors in the units of each part, of rotations the angle (rad where the entries are no angles). Results:
    open_loop {mae, mse, control_mae, control_mse, by_part {part: the same and by_horizon {mae: (H,), mse: (H,)}}}; the
    overall figures are means over all entries, of a rotation over its angle.

    Raises ValueError for a dataset of another robot.
    """
    path = getattr(policy, "path", None)
    parents = {"dataset": dataset.root, **({} if path is None else {"policy": path})}
    config = record | served({"policy": policy})
    with Stage(out, "evaluate_open_loop", config=config, parents=parents, seed=seed) as run:
        if run.complete:
            return run.manifest()
        policy.robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
        dataset.require_actions("stage.dataset")
        places = [(i, row) for i in range(len(dataset)) for row in range(0, dataset.length(i), every)]
        groups = [places[k : k + batch_size] for k in range(0, len(places), batch_size)]
        predicted, recorded = [], []
        place(policy)
        for group in progress(groups, len(groups), "evaluate_open_loop", run.out, unit="batch"):
            seeds = [seed_for(seed, "open_loop", i, row) for i, row in group]
            predicted.append(policy.act([_observation(dataset, i, row) for i, row in group], seeds))
            recorded += [_following(dataset.episode(i).action, row, policy.horizon) for i, row in group]
        actions = np.concatenate([dataset.episode(i).action for i in range(len(dataset))])
        said, done = np.concatenate(predicted), np.stack(recorded)
        error, control = {}, {}
        for part in policy.robot.action:
            own = actions[:, part.slice]
            error[part.name] = errors(part, said[..., part.slice], done[..., part.slice])
            control[part.name] = errors(part, middle(part, own), done[..., part.slice])
        parts = {name: _scores(error[name], control[name]) for name in error}
        whole = _figures(*(np.concatenate([*found.values()], -1) for found in (error, control)))
        return run.finish(open_loop={**whole, "by_part": parts}, chunks=len(places), episodes=len(dataset),
                          **noted(dataset))  # fmt: skip


def _observation(dataset: Dataset, episode: int, row: int) -> Observation:
    source = dataset.episode(episode)
    views = {name: frames[0] for name, frames in dataset.views(episode, [row]).items()}
    return Observation(views=views, state=known_states(source, row), instruction=source.instruction)


def _following(action: np.ndarray, row: int, horizon: int) -> np.ndarray:
    """(H a) from `row` on; NaN past the end."""
    chunk = np.full((horizon, action.shape[1]), np.nan, np.float32)
    found = action[row : row + horizon]
    chunk[: len(found)] = found
    return chunk


def _figures(error: np.ndarray, control: np.ndarray) -> dict[str, float]:
    return {f"{name}{key}": float(np.nanmean(values**power))
            for name, values in (("", error), ("control_", control))
            for key, power in (("mae", 1), ("mse", 2))}  # fmt: skip


def _scores(error: np.ndarray, control: np.ndarray) -> dict:
    """Figures of a part, and of each step of the chunk, None where all episodes are shorter."""
    steps = {name: [float(np.nanmean(step**power)) if np.isfinite(step).any() else None
                    for step in error.swapaxes(0, 1)] for name, power in (("mae", 1), ("mse", 2))}  # fmt: skip
    return {**_figures(error, control), "by_horizon": steps}
