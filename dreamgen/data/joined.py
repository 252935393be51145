"""Several recordings of one robot as one dataset, for what trains on all of them alike."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from dreamgen.core.clip import Episode
from dreamgen.data.lerobot import Dataset


class Joined:
    """The episodes of `datasets`, those of the first first. Raises ValueError for one of another robot."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.robot, self.root = datasets[0].robot, datasets[0].root
        for dataset in datasets[1:]:
            self.robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
        self.places = [(dataset, i) for dataset in datasets for i in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.places)

    def length(self, i: int) -> int:
        """Rows of episode i."""
        dataset, k = self.places[i]
        return dataset.length(k)

    def index(self, i: int) -> int:
        """The number of episode i: here, its own dataset's may be another."""
        return i

    def first_state(self, i: int) -> np.ndarray:
        """State at the first row of episode i, empty where it is unknown."""
        dataset, k = self.places[i]
        return dataset.first_state(k)

    def episode(self, i: int) -> Episode:
        """State, action and instruction of episode i."""
        dataset, k = self.places[i]
        return dataset.episode(k)

    def canvas(self, i: int, rows: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "t H W 3"]:
        """The tiled views of episode i at `rows`."""
        dataset, k = self.places[i]
        return dataset.canvas(k, rows)
