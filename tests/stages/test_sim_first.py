"""A simulator that cannot be used is told of before hours of labelling or dreaming, and is closed whatever happens."""
# ruff: noqa: F401, F811 (fixtures come by import)

import numpy as np
import pytest

from dreamgen.data.lerobot import Dataset
from dreamgen.stages.evaluate_labels import evaluate_labels
from dreamgen.stages.evaluate_world import evaluate_world
from dreamgen.stages.label import label
from tests.stages.test_correlation import oracle
from tests.stages.test_counterfactuals import Column, Seen, recordings
from tests.stages.test_labels import ROBOT, Oracle, Plane, dataset, dreams_of


def none() -> None:
    raise ValueError("it needs 4 action entries")


def unasked(*asked: object) -> None:
    raise AssertionError("too late")


class Lazy(Oracle):
    """Knows what an oracle knows, and must not be asked."""

    label = unasked


class Closing(Plane):
    """Keeps how many of it are open, and may begin elsewhere."""

    open = 0

    def __init__(self, dataset: Dataset, off: float = 0.0) -> None:
        super().__init__(dataset)
        self.off = off
        Closing.open += 1

    def state(self) -> np.ndarray:
        return self.first + self.off

    def close(self) -> None:
        Closing.open -= 1


def test_labels_are_not_made_for_a_simulator_that_is_another(dataset, tmp_path) -> None:
    with pytest.raises(ValueError, match="it needs 4 action entries"):
        evaluate_labels(Lazy(dataset), dataset, none, out=tmp_path / "a", record={})
    with pytest.raises(ValueError, match="'move 0' with seed 40 begins at the state"):
        evaluate_labels(Lazy(dataset), dataset, lambda: Closing(dataset, 1.0), out=tmp_path / "b", record={})
    with pytest.raises(AssertionError, match="too late"):  # the labeler's own
        evaluate_labels(Lazy(dataset), dataset, lambda: Closing(dataset), out=tmp_path / "c", record={})
    assert Closing.open == 0


def test_dreams_of_another_simulator_are_refused_before_recordings_are_labelled(dataset, tmp_path) -> None:
    label(Oracle(dataset), dreams_of(dataset, tmp_path / "dreams"), out=tmp_path / "labels", robot=ROBOT, record={})

    class Moved(Plane):
        """Begins a dream's scene elsewhere."""

        resets = 0

        def state(self) -> np.ndarray:
            self.resets += 1
            return self.first + (self.resets > 1)

    with pytest.raises(ValueError, match="'move 0' with seed 40 begins at the state"):
        evaluate_labels(Lazy(dataset), dataset, lambda: Moved(dataset), out=tmp_path / "a",
                        dreams=tmp_path / "labels", record={})  # fmt: skip


def test_nothing_is_dreamt_for_a_simulator_that_is_another(recordings, tmp_path) -> None:
    closed, world = [], oracle()
    world.imagine = unasked

    class Elsewhere(Seen):
        def state(self) -> np.ndarray:
            return super().state() + 1

        def close(self) -> None:
            closed.append(self)
            super().close()

    options = dict(locator=Column(), episodes=4, films=0, record={})
    with pytest.raises(ValueError, match="it needs 4 action entries"):
        evaluate_world(world, recordings, out=tmp_path / "a", sim=none, **options)
    with pytest.raises(ValueError, match="'home' with seed .* begins at the state"):
        evaluate_world(world, recordings, out=tmp_path / "b", sim=Elsewhere, **options)
    assert len(closed) == 1
