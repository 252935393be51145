"""A judge of where things are: positions that a tracker reads off a video to a probability of success, no picture seen.

An episode's n tracked things become m = n (n - 1) + 12 n numbers, in m: of each coordinate the last value, its change
since the first frame, the highest and the lowest; of every two things how far apart they end and how near they came.
For each instruction, over its episodes of known outcome,

    P(success) = sigmoid(w . z + b), z = (x - mean) / std    (w, b) = argmin log loss + ridge / 2 |w|^2

An instruction of which it did not see both outcomes gets nan. Beside a judge of pictures it tells whether a dream goes
wrong in what happens or in how it looks; what the tracker misreads it misjudges.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dreamgen.core.clip import Clip
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import read_json, replacing, write_json
from dreamgen.core.protocols import Tracker
from dreamgen.engine.precision import place
from dreamgen.filters.rates import Rates

FLOOR = 1e-3  # m: what varies less than a millimetre is not blown up


class PositionJudge:
    """Judges clips by what `locator` reads off them.

    instructions: those that it has learned, in the order of its rows; `fit` sets them. ridge: weight of the penalty,
    which counts like so many episodes. threshold: from there on its answer is yes. rates: its tpr and tnr.
    """

    name = "positions"

    def __init__(self, *, locator: Tracker, instructions: Sequence[str] = (), ridge: float = 1.0,
                 threshold: float = 0.5, rates: dict | None = None) -> None:  # fmt: skip
        n = len(locator.names)
        m = n * (n - 1) + 12 * n
        self.locator, self.instructions, self.ridge, self.threshold = locator, tuple(instructions), ridge, threshold
        self.rates = {name: Rates(**found) for name, found in (rates or {}).items()}
        self.mean, self.std = np.zeros(m), np.ones(m)
        self.weights = np.zeros((len(self.instructions), m + 1))  # the last one is b

    @property
    def robot(self) -> Embodiment | None:
        """That of the tracker, where it names one."""
        return getattr(self.locator, "robot", None)

    def place(self) -> "PositionJudge":
        """Its tracker to the best device."""
        place(self.locator)
        return self

    def features(self, clip: Clip) -> Float[np.ndarray, " m"]:
        """The numbers of a clip, m. ValueError for frames that the tracker does not read."""
        return summary(np.asarray(self.locator.track(clip.video), np.float64))

    def fit(self, features: Float[np.ndarray, "b m"], success: Bool[np.ndarray, " b"], texts: Sequence[str]) -> None:
        """Learn from episodes of known outcome; texts: their instructions, of which those with both outcomes count.

        ValueError if there is none.
        """
        asked = np.asarray(texts)
        known = [
            text for text in sorted(set(texts)) if success[asked == text].any() and not success[asked == text].all()
        ]
        if not known:
            raise ValueError(f"of none of the instructions {sorted(set(texts))} are there both successes and failures "
                             f"among {len(success)} episodes; give it recordings that hold both")  # fmt: skip
        self.instructions, self.mean = tuple(known), features.mean(0)
        self.std = features.std(0).clip(min=FLOOR)
        z = (features - self.mean) / self.std
        self.weights = np.stack([logistic(z[asked == text], success[asked == text], self.ridge) for text in known])

    def probability(self, features: Float[np.ndarray, "b m"], texts: Sequence[str]) -> Float[np.ndarray, " b"]:
        """(b,) probability of success under these instructions; nan for one that it has not learned."""
        rows = np.array([self.instructions.index(text) if text in self.instructions else -1 for text in texts], int)
        found, known = np.full(len(rows), np.nan), rows >= 0
        weights = self.weights[rows[known]]
        logit = (weights[:, :-1] * (features[known] - self.mean) / self.std).sum(1) + weights[:, -1]
        found[known] = 1 / (1 + np.exp(-np.clip(logit, -50, 50)))
        return found

    def judge(self, clips: Sequence[Clip]) -> Float[np.ndarray, " b"]:
        """(b,) probability of success; nan for an instruction that it has not learned, whose clip is not read."""
        features = np.zeros((len(clips), len(self.mean)))
        for k, clip in enumerate(clips):
            if clip.instruction in self.instructions:
                features[k] = self.features(clip)
        return self.probability(features, [clip.instruction for clip in clips])

    def save(self, path: Path) -> None:
        """positions.json and positions.safetensors; the tracker stays where it is."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with replacing(path / "positions.safetensors") as temporary:
            save_file({"mean": self.mean, "std": self.std, "weights": self.weights}, temporary)
        write_json(path / "positions.json", {
            "names": list(self.locator.names), "instructions": list(self.instructions), "ridge": self.ridge,
            "threshold": self.threshold, "rates": {name: vars(rates) for name, rates in self.rates.items()},
        })  # fmt: skip

    @classmethod
    def load(cls, path: Path | str, *, locator: Tracker) -> "PositionJudge":
        """What `save` wrote, with the tracker that it was fitted with. ValueError: missing, broken, another tracker."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"judge {path} does not exist; run train_judge stage=train_probe first, or mend the path")
        config = read_json(path / "positions.json")
        if (names := config.pop("names")) != list(locator.names):
            raise ValueError(f"judge {path} was fitted to positions of {', '.join(names)}, the tracker reads those of "
                             f"{', '.join(locator.names)}; give it the tracker that it was fitted with")  # fmt: skip
        self = cls(locator=locator, **config)
        try:
            found = load_file(path / "positions.safetensors")
        except (FileNotFoundError, SafetensorError) as error:
            raise ValueError(f"the weights of judge {path} do not load: {error}. Make it again.") from error
        for name in ("mean", "std", "weights"):
            wanted = getattr(self, name).shape
            if name not in found or found[name].shape != wanted:
                held = found[name].shape if name in found else "none"
                raise ValueError(f"judge {path} holds {name} {held}, its positions.json says {wanted}; make it again")
            setattr(self, name, found[name])
        return self


def summary(places: Float[np.ndarray, "t n 3"]) -> Float[np.ndarray, " m"]:
    """What is kept of positions over time: see above."""
    a, b = np.triu_indices(places.shape[1], 1)
    apart = np.linalg.norm(places[:, a] - places[:, b], axis=-1)
    of_each = np.stack([places[-1], places[-1] - places[0], places.max(0), places.min(0)])
    return np.concatenate([of_each.ravel(), apart[-1], apart.min(0)])


def logistic(z: Float[np.ndarray, "b m"], success: Bool[np.ndarray, " b"], ridge: float) -> Float[np.ndarray, " m1"]:
    """The most likely (w, b) under the penalty, which spares b; convex, so there is one."""
    from scipy.optimize import minimize
    from scipy.special import expit

    x, y = np.pad(z, ((0, 0), (0, 1)), constant_values=1.0), success.astype(np.float64)
    penalty = np.append(np.full(z.shape[1], ridge), 0.0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        logit = x @ w
        value = np.logaddexp(0, logit).sum() - y @ logit + penalty @ w**2 / 2
        return float(value), x.T @ (expit(logit) - y) + penalty * w

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
