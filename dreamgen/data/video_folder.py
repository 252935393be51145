"""A folder of video files seen through one robot's cameras: video without actions that is no LeRobot dataset.

Row k of a video is what is on the screen k / robot_hz seconds after its first frame, so time keeps its speed whatever
the rates are: a file of 24 frames a second, read at 10, gives its frames 0, 2, 4, 7, 9, 12.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dreamgen.core.clip import Episode
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import FILE, RUN, written
from dreamgen.data.layout import INFO, Entry
from dreamgen.data.lerobot import Dataset
from dreamgen.video.mp4 import frame_times, open_mp4
from dreamgen.video.opened import require_turned
from dreamgen.video.tiling import fit, untile

ENDINGS = ("mp4", "mkv", "webm", "mov")
LATE = 7e-4  # seconds: mkv and webm round the times of frames to milliseconds
AT_ONCE = 64  # frames held in the size of the file


class VideoFolder(Dataset):
    """Every video file below the folder `root` (mp4, mkv, webm, mov) as an episode, numbered in order of their paths.

    A picture is turned upright where the file says how, shows the whole canvas and is brought to its size as the first
    view says (`View.fit`). Actions and states are NaN. The text file of a video's name beside it (a.mp4, a.txt) is its
    instruction, else `instruction` is; where neither is, only what needs one says so.
    video_hz: at which frames will be taken, as far as it is known: a video with fewer than two of them, or that was
    recorded at a lower rate, is bad. skip_bad, episodes, cache_mb: see `Dataset`.

    Raises ValueError: no video; a LeRobot dataset or a stage's output; and, without `skip_bad`, the first bad video:
    truncated, no video, too short, without the times of its frames, an instruction that is empty or no text,
    frames that are to be shown mirrored or askew.
    """

    def __init__(
        self,
        root: str | Path,
        robot: Embodiment,
        *,
        skip_bad: bool = False,
        episodes: Sequence[int] | None = None,
        instruction: str | None = None,
        video_hz: str | int | None = None,
        cache_mb: int = 512,
    ) -> None:
        self.root, self.robot, self.has_actions = Path(root), robot, False
        self.mended, self.skipped = list[str](), dict[int, str]()
        self._default, self._rated = instruction or "", video_hz is not None
        self._pair = Clock(robot_hz=robot.robot_hz, video_hz=video_hz or robot.robot_hz, frames=2)
        self._shown: dict[int, np.ndarray] = {}  # number of a video: the frame of each row
        if not is_video_folder(self.root):
            raise ValueError(f"{root} {_instead(self.root)}")
        entries = [Entry(index=k, length=0, tasks=[], data=path, first=None, videos={})
                   for k, path in enumerate(sorted(_files(self.root)))]  # fmt: skip
        self._take(entries, self._open, skip_bad=skip_bad, episodes=episodes, cache_mb=cache_mb)

    def instruction(self, i: int) -> str:
        """ValueError for a video that brings none."""
        path = self._entries[i].data
        if not self._episodes[i].instruction:
            raise ValueError(f"video {path} has no instruction, which is needed here; write one into "
                             f"{path.with_suffix('.txt').name} beside it, or set `instruction` of the dataset for all "
                             f"that have none (data.instruction='...')")  # fmt: skip
        return self._episodes[i].instruction

    def video(self, i: int) -> tuple[Path, np.ndarray]:
        """The file of episode i, and the number there of each row's frame."""
        return self._entries[i].data, self._shown[self.index(i)]

    def _open(self, entry: Entry) -> Episode:
        """Check one video and find the frame of each row."""
        path, rate, pair = entry.data, float(self.robot.rate), self._pair
        times = frame_times(open_mp4(path), path)
        require_turned(path)
        rows = np.arange(int((times[-1] + LATE) * rate) + 1)
        if len(rows) <= pair.steps:
            raise ValueError(f"video {path} has {len(times)} frames in {times[-1]:.2f} s, too few for a clip: two "
                             f"frames at {pair.video_hz} Hz need {pair.steps / rate:.2f} s")  # fmt: skip
        seen = (len(times) - 1) / times[-1]
        if self._rated and seen < 0.9 * rate / float(pair.stride):
            raise ValueError(f"video {path} has {seen:.1f} frames a second, and {pair.video_hz} are to be seen: some "
                             f"would be shown twice; lower video_hz (world_model.video_hz)")  # fmt: skip
        self._shown[entry.index] = np.searchsorted(times, rows / rate + LATE, side="right") - 1
        state, action = (np.full((len(rows), width), np.nan, np.float32)
                         for width in (self.robot.state_dim, self.robot.action_dim))  # fmt: skip
        return Episode(instruction=self._text(path), state=state, action=action, extra={},
                       meta={"action_known": False, "video": path.relative_to(self.root).as_posix()})  # fmt: skip

    def _text(self, path: Path) -> str:
        """The instruction of a video, "" where there is none."""
        note = path.with_suffix(".txt")
        try:
            text = " ".join((note.read_text(encoding="utf-8") if note.is_file() else self._default).split())
        except UnicodeDecodeError as error:
            raise ValueError(f"{note} is no UTF-8 text ({error.reason}); write the instruction of {path.name} into "
                             f"it") from None  # fmt: skip
        if note.is_file() and not text:
            raise ValueError(f"{note} is empty; write the instruction of {path.name} into it, or delete it")
        return text

    def _decode(self, i: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        path, frames = self._entries[i].data, self._shown[self.index(i)][rows]
        parts = np.array_split(frames, max(1, -(-len(frames) // AT_ONCE)))
        try:
            video = [fit(self._videos.read(path, part), *self.robot.canvas, self.robot.views[0].fit)
                     for part in parts]  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{error}; copy it again, or take it out of {self.root} (skip_bad=true does not "
                             f"decode, so it cannot know)") from error  # fmt: skip
        return untile(self.robot, np.concatenate(video))


def is_video_folder(root: Path) -> bool:
    """Whether `root` holds video files, and is neither a LeRobot dataset nor what a stage wrote."""
    return not (root / INFO).exists() and not _made(root) and any(True for _ in _files(root))


def _made(root: Path) -> bool:
    """Whether a stage wrote the folder."""
    return any(written(root / name) for name in (FILE, RUN))


def _files(root: Path) -> Iterator[Path]:
    """All video files below `root` but for hidden ones."""
    for path in root.rglob("*"):
        hidden = any(name.startswith(".") for name in path.relative_to(root).parts)
        if path.suffix[1:].lower() in ENDINGS and path.is_file() and not hidden:
            yield path


def _instead(root: Path) -> str:
    """What is found where a folder of videos was expected, and what to do."""
    if not root.is_dir():
        return "is no folder; mend the path"
    if (root / INFO).exists():
        return "is a LeRobot dataset, no folder of video files; open it with data=video"
    if _made(root):
        return f"is what a stage wrote ({FILE} or {RUN} lies there), no folder of video files; mend the path"
    return f"holds no video file ({', '.join(ENDINGS)}), nor does any folder in it; put videos there, or mend the path"
