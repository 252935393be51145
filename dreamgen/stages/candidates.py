"""What curation chooses from: labelled dreams (a dataset, with the clips that it labels or not), or clips."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dreamgen.core.clip import Clip, Episode, Labels
from dreamgen.core.clock import Clock
from dreamgen.core.manifest import require_complete
from dreamgen.core.protocols import Labeler
from dreamgen.core.seeding import rng_for
from dreamgen.data.clips import ClipFolder, dreamt_by
from dreamgen.data.lerobot import Dataset
from dreamgen.stages.recorded_video import batches_of, long_enough
from dreamgen.video.tiling import untile


class Candidates:
    """Clips with their labels, by number.

    dataset: labelled dreams, as `jobs.label` writes them, or any episodes. dreams: the finished stage that dreamed
    them, for the clips as they were dreamed; without it they are read from the dataset, which lacks a dream's last
    frame. Without a dataset the clips have no labels. video_hz: of clips read from episodes that do not say theirs.

    ValueError: neither is given, dreams unfinished or of other labels, a dream that is not there.
    """

    def __init__(self, dataset: Dataset | None, dreams: Path | None, video_hz: str = "10") -> None:
        if dataset is None and dreams is None:
            raise ValueError("curation got neither a dataset of labelled dreams nor dreams; give it one of them")
        self.dataset, self.video_hz, self.folder = dataset, video_hz, None
        if dreams is not None:
            made = require_complete(dreams, "dreams")
            self.folder = ClipFolder(Path(dreams) / "clips")
        if dataset is None:
            self.ids, self.world_model = self.folder.ids(), dreamt_by(made)
            return
        dataset.require_actions("stage.dataset")
        metas = [dataset.episode(i).meta for i in range(len(dataset))]
        self.ids = [meta.get("prompt") or f"episode_{dataset.index(i):06d}" for i, meta in enumerate(metas)]
        if self.folder is not None:
            other = sorted({meta.get("dreams", "") for meta in metas} - {made["id"]})
            if other:
                raise ValueError(f"{dataset.root} labels the dreams {', '.join(other) or 'of no stage'}, {dreams} "
                                 f"holds {made['id']}; give the dreams that it labels, or clips=null")  # fmt: skip

    def __len__(self) -> int:
        return len(self.ids)

    def parents(self, dreams: Path | None) -> dict[str, Path]:
        """What a manifest names as inputs."""
        return ({} if self.dataset is None else {"dataset": self.dataset.root}) | ({"dreams": dreams} if dreams else {})

    def describe(self, i: int) -> dict:
        """What is known of a clip without its pictures: id, number in the dataset, instruction, pair, origin."""
        if self.dataset is None:
            info = self.folder.info(self.ids[i])
            number, meta, text = i, info, info["instruction"]
        else:
            episode = self.dataset.episode(i)
            number, meta, text = self.dataset.index(i), episode.meta, episode.instruction
        return {"id": self.ids[i], "episode": number, "instruction": text, "pair": meta.get("pair") or self.ids[i],
                "origin": meta.get("origin") or {}}  # fmt: skip

    def clip(self, i: int) -> Clip:
        if self.folder is not None:
            return self.folder.read(self.ids[i])
        episode, meta = self.dataset.episode(i), self.dataset.episode(i).meta
        hz = str(meta.get("video_hz", self.video_hz))
        rows = meta.get("frame_rows")
        if rows is None:
            clock = Clock(robot_hz=self.dataset.robot.robot_hz, video_hz=hz, frames=2)
            rows = clock.with_frames(max(2, clock.frames_in(self.dataset.length(i)))).rows
            rows = rows[rows < self.dataset.length(i)]
        scores = {name: score for name, score in (meta.get("scores") or {}).items() if score is not None}
        return Clip(id=self.ids[i], video=self.dataset.canvas(i, rows), video_hz=hz, instruction=episode.instruction,
                    seed=int(meta.get("seed") or 0), pair=meta.get("pair", ""), state=self.dataset.first_state(i),
                    origin=meta.get("origin") or {}, scores=scores)  # fmt: skip

    def labels(self, i: int) -> Labels | None:
        """Labels of all rows; a spread that the dataset does not have is nan."""
        if self.dataset is None:
            return None
        episode = self.dataset.episode(i)
        spread = episode.extra.get("label_spread", np.full_like(episode.action, np.nan))
        return Labels(value=episode.action, spread=spread.reshape(episode.action.shape))

    def episode(self, i: int, scores: dict[str, float | None]) -> Episode:
        """The episode with its pictures and with its scores in meta.

        Where the dreams are there, its pictures are theirs: they are encoded once, not once more.
        """
        episode, views = self.dataset.episode(i), None
        if self.folder is not None and "frame_rows" in episode.meta:
            clip = self.clip(i)
            shown = np.searchsorted(episode.meta["frame_rows"], np.arange(len(episode.action)), side="right") - 1
            views = {name: frames[shown] for name, frames in untile(self.dataset.robot, clip.video).items()}
        views = self.dataset.views(i) if views is None else views
        meta = {**episode.meta, "scores": {**(episode.meta.get("scores") or {}), **scores}}
        return Episode(instruction=episode.instruction, state=episode.state, action=episode.action, video=views,
                       extra=self.dataset.extra(i), meta=meta)  # fmt: skip


def recorded(dataset: Dataset, video_hz: str, count: int, seed: int, labeler: Labeler | None,
             size: int) -> Iterator[tuple[list[Clip], list[np.ndarray]]]:  # fmt: skip
    """`count` recorded episodes, drawn from the seed among those that are long enough for `labeler`, as clips at the
    dreams' rate, and their actions; `size` at a time, decoded when asked for."""
    clock = Clock(robot_hz=dataset.robot.robot_hz, video_hz=video_hz, frames=2)
    usable, _ = long_enough(dataset, range(len(dataset)), [] if labeler is None else [labeler], clock=clock)
    chosen = sorted(rng_for(seed, "reference").permutation(usable)[:count].tolist())
    return batches_of(dataset, chosen, clock, size)
