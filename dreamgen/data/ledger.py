"""What a dataset that is being written holds so far: rows, tasks, and the numbers that every format's tables repeat."""

import json
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from dreamgen.data import statistics
from dreamgen.data.columns import Column


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A video feature as it is stored: pixels of a frame, codec and pixel format as ffmpeg names them."""

    height: int
    width: int
    codec: str
    pix_fmt: str

    def feature(self, fps: int | float, said: dict) -> dict:
        """The feature of `info.json`. said: what another dataset, of which the packets are, told beyond what they tell
        themselves."""
        kept = {key: value for key, value in said.items() if not key.startswith("audio.")}  # sound is not copied
        info = {"video.channels": 3, "video.is_depth_map": False, **kept, "video.height": self.height,
                "video.width": self.width, "video.codec": self.codec, "video.pix_fmt": self.pix_fmt, "video.fps": fps,
                "has_audio": False}  # fmt: skip
        return {"dtype": "video", "shape": [self.height, self.width, info["video.channels"]],
                "names": ["height", "width", "channels"], "info": info}  # fmt: skip

    @classmethod
    def of(cls, data: bytes) -> "Camera":
        """What an mp4 file says of itself."""
        import io

        import av

        with av.open(io.BytesIO(data)) as container:
            context = container.streams.video[0].codec_context
            return cls(height=context.height, width=context.width, codec=context.codec.canonical_name,
                       pix_fmt=str(context.pix_fmt))  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """An episode on its way to disk.

    columns: all but the bookkeeping, (n k) each. texts: columns that say a text by its task index, in this order;
    "task_index" is one of them. videos: one mp4 file of n frames per camera, histograms: of its pixels (3 256).
    stated: statistics of cameras whose packets are no colours, as another dataset tells them.
    """

    rows: int
    columns: dict[str, np.ndarray]
    texts: dict[str, list[str]]
    videos: dict[str, bytes]
    histograms: dict[str, np.ndarray]
    stated: dict[str, dict] = field(default_factory=dict)
    meta: dict = field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class Ledger:
    """Counts and tasks of the episodes that were entered, one after another.

    columns: of the tables, in order, the bookkeeping first. said: of cameras whose packets are copied, what their
    dataset tells of them.
    """

    rate: Fraction
    columns: dict[str, Column] = field(default_factory=dict)
    said: dict[str, dict] = field(default_factory=dict)
    cameras: dict[str, Camera] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    episodes: int = 0
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    stated: dict[str, dict] = field(default_factory=dict)

    @property
    def fps(self) -> int | float:
        return int(self.rate) if self.rate.denominator == 1 else float(self.rate)

    def enter(self, item: Item) -> tuple[dict[str, np.ndarray], list[str], dict[str, dict]]:
        """All columns of an episode (n k), its tasks, and its statistics per feature."""
        rows, count = item.rows, np.arange(item.rows)
        values = {
            "timestamp": (count / float(self.rate)).astype(np.float32),
            "frame_index": count,
            "episode_index": np.full(rows, self.episodes),
            "index": self.rows + count,
        }
        for name, texts in item.texts.items():
            values[name] = np.array([self.tasks.setdefault(text, len(self.tasks)) for text in texts], np.int64)
        values |= item.columns
        values = {name: np.asarray(values[name]).reshape(rows, -1) for name in self.columns}
        found = {key: statistics.of_pictures(counts, rows) for key, counts in item.histograms.items()}
        for name, column in self.columns.items():
            if column.dtype != "string":
                found[name] = statistics.of_numbers(values[name])
        for key, counts in item.histograms.items():
            self.histograms[key] = self.histograms.get(key, 0) + counts
        for key, stated in item.stated.items():
            found[key] = stated
            self.stated[key] = statistics.joined([*([self.stated[key]] if key in self.stated else []), stated])
        for key, video in item.videos.items():
            if key not in self.cameras:
                self.cameras[key] = Camera.of(video)
        self.rows, self.episodes = self.rows + rows, self.episodes + 1
        return values, list(dict.fromkeys(item.texts["task_index"])), found

    def picture_stats(self) -> dict[str, dict]:
        """Statistics of all pictures, per camera."""
        return {key: statistics.of_pictures(counts, self.rows) for key, counts in self.histograms.items()} | self.stated

    def features(self) -> dict[str, dict]:
        """The features of `info.json`: cameras, then columns."""
        cameras = {key: camera.feature(self.fps, self.said.get(key, {})) for key, camera in self.cameras.items()}
        return cameras | {name: column.feature() for name, column in self.columns.items()}


def provenance(meta: dict) -> dict[str, str]:
    """The columns under which an episode list keeps what is known of an episode's making."""
    return {"source": str(meta.get("source", "")), "provenance": json.dumps(meta, sort_keys=True)}
