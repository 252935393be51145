"""How much of the true actions do features of a frame gap hold? Probes, and what beats them without learning.

Features and targets are per gap: (k d) and (k a) for each clip. A probe sees a gap and its two neighbours, since a
command shows in the frames after it; controls get the same. Episodes are split, never gaps. No score depends on the
unit or the zero of a target: a linear probe has a penalty for each entry, a perceptron sees them at mean 0 and size 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.stages.label_scores import r2

PENALTIES = 10.0 ** np.arange(-3, 5)


class Split(NamedTuple):
    """Rows of all gaps (n d), in three sets of episodes."""

    train: np.ndarray
    choose: np.ndarray
    test: np.ndarray


def by_gap(action: np.ndarray, clock: Clock) -> np.ndarray:
    """Mean action (k a) of the robot steps of each frame gap, from (s a)."""
    return np.stack([action[a:b].mean(0) for a, b in clock.gaps()])


def in_context(features: np.ndarray) -> np.ndarray:
    """(k d) with those of the gap before and after (k 3d); the ends repeat."""
    wide = np.concatenate([features[:1], features, features[-1:]])
    return np.concatenate([wide[:-2], features, wide[2:]], axis=1)


def split(rows: Sequence[np.ndarray], seed: int) -> Split:
    """Rows of clips in sets of 60, 15 and 25% of the clips; the same clips for every feature of one seed."""
    order = rng_for(seed, "latent split").permutation(len(rows))
    if len(rows) < 4:
        raise ValueError(f"{len(rows)} episodes; probes need at least 4, to train on, to choose by and to test on")
    a = min(round(0.6 * len(rows)), len(rows) - 2)
    b = max(a + 1, min(round(0.75 * len(rows)), len(rows) - 1))
    return Split(*(np.concatenate([rows[i] for i in part]) for part in (order[:a], order[a:b], order[b:])))


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (d a) and offset (a) that minimise |y - xw - o|^2 + penalty |w|^2; in the dual where that is smaller."""
    mx, my = x.mean(0), y.mean(0)
    xc, yc = x - mx, y - my
    if len(x) < x.shape[1]:
        w = xc.T @ np.linalg.solve(xc @ xc.T + penalty * np.eye(len(x)), yc)
    else:
        w = np.linalg.solve(xc.T @ xc + penalty * np.eye(x.shape[1]), xc.T @ yc)
    return w, my - mx @ w


def units(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and size of each entry (d) of rows (n d); the size is 1 where it does not change."""
    size = rows.std(0)
    return rows.mean(0), np.where(size > 1e-6, size, 1.0)


def standard(x: Split) -> Split:
    """Rows whose entries have mean 0 and size 1 on the training rows."""
    mean, size = units(x.train)
    return Split(*((rows - mean) / size for rows in x))


def linear_probe(x: Split, y: Split) -> np.ndarray:
    """Predictions for the test rows by ridge regression, the penalty of each entry chosen on `choose`."""
    x = standard(x)
    fits = [ridge(x.train, y.train, penalty) for penalty in PENALTIES]
    errors = [((x.choose @ w + o - y.choose) ** 2).sum(0) for w, o in fits]
    predicted = np.stack([x.test @ w + o for w, o in fits])
    return np.take_along_axis(predicted, np.argmin(errors, axis=0)[None, None], axis=0)[0]


def few_probe(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Predictions (m a) for `test` (m d) by ridge regression on x (n d), y (n a) alone: the penalty of each entry is
    the one under which each row is best foretold by the others, in closed form.
    """
    x, _, test = standard(Split(x, x, test))
    u, size, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    yc = y - y.mean(0)
    along, errors = u.T @ yc, []
    for penalty in PENALTIES:
        kept = size**2 / (size**2 + penalty)
        apart = 1 - 1 / len(x) - (u**2) @ kept  # how little a row tells of itself
        errors.append((((yc - (u * kept) @ along) / apart[:, None]) ** 2).sum(0))
    penalty = PENALTIES[np.argmin(errors, axis=0)]
    w = v.T @ (size[:, None] / (size[:, None] ** 2 + penalty) * along)
    return (test - x.mean(0)) @ w + y.mean(0)


def mlp_probe(x: Split, y: Split, seed: int, *, width: int = 128, steps: int = 300) -> np.ndarray:
    """Predictions for the test rows by a perceptron of one hidden layer, stopped where `choose` is best."""
    mean, size = units(y.train)
    x, y = standard(x), standard(y)
    xs, ys = ([torch.from_numpy(rows).float() for rows in side] for side in (x, y))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "mlp probe"))
        net = torch.nn.Sequential(torch.nn.Linear(xs[0].shape[1], width), torch.nn.GELU(), torch.nn.Dropout(0.1),
                                  torch.nn.Linear(width, ys[0].shape[1]))  # fmt: skip
        optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
        best, kept = np.inf, None
        for step in range(steps):
            rows = torch.randint(len(xs[0]), (min(256, len(xs[0])),))
            net.train()
            ((net(xs[0][rows]) - ys[0][rows]) ** 2).mean().backward()
            optimiser.step()
            optimiser.zero_grad()
            if step % 10 == 9:
                net.eval()
                with torch.no_grad():
                    error = float(((net(xs[1]) - ys[1]) ** 2).mean())
                    if error < best:
                        best, kept = error, net(xs[2])
    return mean + size * kept.numpy().astype(np.float64)


def r2_by_part(predicted: np.ndarray, true: np.ndarray, robot: Embodiment) -> dict[str, float | None]:
    """R2 of (n a) per action part; None where the truth never changes."""
    found = {part.name: r2(predicted[:, part.slice], true[:, part.slice], part) for part in robot.action}
    return {name: None if value != value else value for name, value in found.items()}


def probe(features: Sequence[np.ndarray], actions: Sequence[np.ndarray], robot: Embodiment, seed: int, *,
          context: bool = True) -> dict:  # fmt: skip
    """R2 by part of a linear and of an MLP probe on per-gap features (k d) of each clip; context: with neighbours."""
    rows = [(in_context(f) if context else f).astype(np.float64) for f in features]
    x, y = split(rows, seed), split(actions, seed)
    return {"linear": r2_by_part(linear_probe(x, y), y.test, robot),
            "mlp": r2_by_part(mlp_probe(x, y, seed), y.test, robot), "width": int(features[0].shape[1])}  # fmt: skip


def shuffled(features: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """The same features given to other gaps, of any clip."""
    rows = rng_for(seed, "shuffled").permutation(np.concatenate(features))
    return np.split(rows, np.cumsum([len(f) for f in features])[:-1])


def reachable(pairs: Sequence[int], there: int) -> tuple[list[int], list[int]]:
    """The counts that `there` gaps give, and those that they do not."""
    return [count for count in pairs if count <= there], [count for count in pairs if count > there]


def label_efficiency(features: Sequence[np.ndarray], actions: Sequence[np.ndarray], robot: Embodiment, seed: int, *,
                     pairs: Sequence[int] = (10, 50, 200, 1000), draws: int = 5) -> dict[str, dict]:  # fmt: skip
    """R2 by part of a linear probe that sees few labelled gaps and no others (`few_probe`): {pairs: {part: {mean,
    std}}}; without counts that are not `reachable`."""
    x, y = split([in_context(f).astype(np.float64) for f in features], seed), split(actions, seed)
    found: dict[str, dict] = {}
    for count in reachable(pairs, len(y.train))[0]:
        rows = [rng_for(seed, "pairs", count, n).permutation(len(y.train))[:count] for n in range(draws)]
        scores = [r2_by_part(few_probe(x.train[r], y.train[r], x.test), y.test, robot) for r in rows]
        known = [part.name for part in robot.action if scores[0][part.name] is not None]
        found[str(count)] = {name: {"mean": float(np.mean([s[name] for s in scores])),
                                    "std": float(np.std([s[name] for s in scores]))} for name in known}  # fmt: skip
    return found


def codebook_usage(codes: Sequence[np.ndarray], size: int) -> dict:
    """codes (k tokens) per clip: share of each code per token, perplexity per token, distinct combinations seen."""
    rows = np.concatenate(codes).astype(int)
    shares = np.stack([np.bincount(column, minlength=size) / len(rows) for column in rows.T])
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(1)
    return {"shares": shares.tolist(), "perplexity": np.exp(entropy).tolist(),
            "used": float((shares.sum(0) > 0).mean()), "combinations": len(np.unique(rows, axis=0))}  # fmt: skip
