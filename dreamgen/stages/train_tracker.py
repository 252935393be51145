"""Train the tracker that measures dreams, on recordings whose simulator told where everything was."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dreamgen.core.manifest import Stage
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data import groups
from dreamgen.data.lerobot import Dataset
from dreamgen.data.normaliser import Normaliser
from dreamgen.data.recordings import noted
from dreamgen.engine.processes import require_alone
from dreamgen.engine.train import clear_state, train
from dreamgen.worlds.tracker import KeypointTracker

PREFIX = "object."


def truth_of(dataset: Dataset, i: int, names: Sequence[str]) -> np.ndarray:
    """Where everything was in episode i, (s n 3), m. ValueError where the recording does not say."""
    extra = dataset.episode(i).extra
    if missing := [name for name in names if f"{PREFIX}{name}" not in extra]:
        raise ValueError(f"{dataset.root} does not say where {', '.join(missing)} was; record it with stage.truth=true")
    return np.stack([extra[f"{PREFIX}{name}"] for name in names], 1).astype(np.float32)


def tracked(dataset: Dataset) -> list[str]:
    """The things whose positions a dataset holds. ValueError if it holds none."""
    names = [key.removeprefix(PREFIX) for key in dataset.episode(0).extra if key.startswith(PREFIX)]
    if not names:
        raise ValueError(f"{dataset.root} does not say where objects are; record it with stage.truth=true")
    return names


def train_tracker(
    locator: Callable[..., KeypointTracker],
    datasets: Sequence[Dataset],
    *,
    out: Path,
    held_out: int = 8,
    steps: int = 1500,
    batch_size: int = 64,
    lr: float = 2e-3,
    muon_lr: float | None = None,
    warmup: int = 50,
    ema: float | None = 0.99,
    precision: str = "auto",
    replicas: int = 1,
    seed: int = 0,
    record: dict,
) -> dict:
    """Train `locator(names=...)` on all frames but those of `held_out` episodes of each dataset, or of a few
    more: those that share a first state stay together.

    Results: error {name: median distance in m on the held-out frames}. Raises ValueError for datasets without truth.
    """
    require_alone("train_tracker")
    parents = {f"dataset_{k}": dataset.root for k, dataset in enumerate(datasets)}
    with Stage(out, "train_tracker", config=record, parents=parents, seed=seed) as run:
        if run.complete:
            clear_state(out)
            return run.manifest()
        names = tracked(datasets[0])
        torch.manual_seed(seed_for(seed, "init"))
        model = locator(names=names)
        held, places, truth = [], [], {}
        for d, dataset in enumerate(datasets):
            model.robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
            order = rng_for(seed, "held out", d).permutation(len(dataset)).tolist()
            apart = groups.held_out(groups.groups_of(dataset), min(held_out, len(dataset) // 5), order)
            for i in range(len(dataset)):
                truth[d, i] = truth_of(dataset, i, names)
                (held if i in apart else places).extend((d, i, row) for row in range(dataset.length(i)))
        flat = np.concatenate([truth[key].reshape(-1, 3 * len(names)) for key in truth])
        model.normaliser.load_state_dict(Normaliser.fit(flat, floor=1e-3).state_dict())

        def batch_of(chosen: Sequence[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
            frames = np.stack([datasets[d].canvas(i, [row])[0] for d, i, row in chosen])
            true = np.stack([truth[d, i][row].ravel() for d, i, row in chosen])
            return {"frames": torch.from_numpy(frames), "truth": torch.from_numpy(true)}

        def batch_at(step: int) -> dict[str, torch.Tensor]:
            rows = rng_for(seed, "locator", step).integers(0, len(places), batch_size)
            return batch_of([places[k] for k in rows])

        done = train(model, batch_at, out=out, steps=steps, lr=lr, muon_lr=muon_lr, warmup=warmup, ema=ema,
                     precision=precision, replicas=replicas, seed=seed, name="train_tracker")  # fmt: skip
        error = {}
        if held:
            batch = batch_of(held[:: max(1, len(held) // 500)])
            found = model.cpu().eval().track(batch["frames"].numpy())
            far = np.linalg.norm(found - batch["truth"].numpy().reshape(found.shape), axis=-1)
            error = {name: float(np.median(far[:, k])) for k, name in enumerate(names)}
        model.save(out)
        manifest = run.finish(frames=len(places), error=error, loss=done["loss"], **noted(*datasets))
        clear_state(out)
        return manifest
