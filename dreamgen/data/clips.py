"""A folder of clips: `<id>.mp4` and `<id>.json`, the json last. A clip without its json is not there."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dreamgen.core.clip import Clip
from dreamgen.core.manifest import FILE, read_json, write_json
from dreamgen.video.mp4 import read_mp4, write_mp4


def require_name(id: str, hint: str = "") -> None:
    """ValueError if a clip's id is not fit for a file name; `hint` is added to it."""
    if not re.fullmatch(r"\w[\w.=+-]*", id):
        raise ValueError(f"clip id '{id}' is not fit for a file name; use letters, digits, '_', '-', '.'{hint}")


def dreamt_by(manifest: Mapping) -> str:
    """The fingerprint of the world model whose clips a finished stage holds, "" where it is not known. One that chose
    among dreams says so of those that it chose from."""
    return manifest.get("parents", {}).get("world_model") or manifest.get("results", {}).get("world_model", "")


class ClipFolder:
    """Clips by id. The video is near-lossless; frame 0 is stored as all others.

    codec, crf: see `dreamgen.video.mp4.encode`.
    """

    def __init__(self, root: Path, *, codec: str = "h264", crf: int | None = None) -> None:
        self.root, self.codec, self.crf = Path(root), codec, crf

    def __len__(self) -> int:
        return len(self.ids())

    def ids(self) -> list[str]:
        """Ids of all finished clips, sorted."""
        return sorted(path.stem for path in self.root.glob("*.json") if not path.name.startswith("."))

    def has(self, id: str) -> bool:
        return (self.root / f"{id}.json").is_file()

    def video(self, id: str) -> Path:
        """The mp4 file of a clip."""
        return self.root / f"{id}.mp4"

    def write(self, clip: Clip) -> None:
        """Store a clip; one of the same id is replaced. ValueError if its id is not fit for a file name."""
        require_name(clip.id)
        (self.root / f"{clip.id}.json").unlink(missing_ok=True)
        write_mp4(self.video(clip.id), clip.video, clip.video_hz, codec=self.codec, crf=self.crf)
        write_json(self.root / f"{clip.id}.json", {
            "id": clip.id, "instruction": clip.instruction, "seed": clip.seed, "pair": clip.pair,
            "origin": clip.origin, "state": np.asarray(clip.state).tolist(), "video_hz": clip.video_hz,
            "scores": clip.scores, "frames": len(clip.video),
        })  # fmt: skip

    def info(self, id: str) -> dict:
        """What is known of a clip without its pictures: the json. ValueError if the clip is not there."""
        if not self.has(id):
            raise ValueError(f"clip '{id}' is not in {self.root} (no finished {id}.json); it has {len(self)} clips")
        return read_json(self.root / f"{id}.json")

    def read(self, id: str) -> Clip:
        """A clip with its frames. ValueError if it is not there, or its video is missing, truncated or too short."""
        info = self.info(id)
        try:
            video = read_mp4(self.video(id))
            if len(video) != info["frames"]:
                raise ValueError(f"video {self.video(id)} has {len(video)} frames, its json says {info['frames']}")
        except ValueError as error:
            raise ValueError(f"{error}; delete {id}.json beside it and {self.root.parent / FILE}, then give the "
                             "command that made them again (it makes what is missing), or label with skip_bad=true"
                             ) from error  # fmt: skip
        return Clip(
            id=info["id"], video=video, video_hz=info["video_hz"], instruction=info["instruction"], seed=info["seed"],
            pair=info["pair"], state=np.asarray(info["state"], np.float32), origin=info["origin"],
            scores=info["scores"],
        )  # fmt: skip
