"""What a labeler can read: the rate, length and size of a clip against those that it was trained for."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from dreamgen.core.clip import Clip
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment


def clock_of(clip: Clip, robot: Embodiment) -> Clock:
    """The clock of a clip on the rate of `robot`."""
    return Clock(robot_hz=robot.robot_hz, video_hz=clip.video_hz, frames=len(clip.video))


def spacings_of(given: Sequence[str | int | float], clock: Clock) -> list[str]:
    """Robot steps a frame gap, each once and as clocks write them ("3/2" for 1.5); the clock's own where none is given.

    Raises ValueError for what is no number, and where the clock's own is not among them.
    """
    try:
        found = list(dict.fromkeys(str(Fraction(str(steps))) for steps in given)) or [str(clock.stride)]
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"spacings are {list(given)}; expected robot steps a frame, as 2 or '3/2'") from error
    if str(clock.stride) not in found:
        raise ValueError(f"spacings are {', '.join(found)} robot steps a frame, but the labeler's clock has "
                         f"{clock.stride} ({clock.video_hz} of {clock.robot_hz} Hz); add '{clock.stride}' to "
                         f"labeler.spacings, or change labeler.clock.video_hz")  # fmt: skip
    return found


def require_readable(clip: Clip, robot: Embodiment, spacings: Sequence[str], frames: int) -> None:
    """Raise ValueError if the clip's rate, length or size is not what a labeler was trained for.

    spacings: robot steps a frame gap that it knows; frames: of its window.
    """
    clock = clock_of(clip, robot)
    if str(clock.stride) not in spacings:
        raise ValueError(
            f"clip '{clip.id}' has {clock.stride} robot steps a frame ({clip.video_hz} of "
            f"{robot.robot_hz} Hz); this labeler was trained for {', '.join(spacings)}. "
            f"Give clips of its rate, or train one with labeler.clock.video_hz={clip.video_hz} (inverse dynamics also "
            f"learns several rates by labeler.spacings)."
        )
    if len(clip.video) < frames:
        raise ValueError(f"clip '{clip.id}' has {len(clip.video)} frames; a window of this labeler has {frames}. "
                         f"Give longer clips, or train a labeler with fewer `frames`")  # fmt: skip
    if clip.video.shape[1:] != (*robot.canvas, 3):
        raise ValueError(f"clip '{clip.id}' has frames of {clip.video.shape[1:]}; the "
                         f"canvas of robot '{robot.name}' is {robot.canvas} with 3 channels")  # fmt: skip


def kind(clip: Clip) -> tuple:
    """What clips that are labelled at once have in common: shape and rate."""
    return clip.video.shape, clip.video_hz


def alike(kinds: Iterable[Hashable], size: int) -> Iterator[list[int]]:
    """Numbers of at most `size` items of one kind at a time."""
    groups: dict[Hashable, list[int]] = {}
    for index, one in enumerate(kinds):
        groups.setdefault(one, []).append(index)
    for members in groups.values():
        yield from (members[begin : begin + size] for begin in range(0, len(members), size))


PIXELS = 1 << 23  # that are encoded at once; what a long or large clip takes beyond its bytes is bounded


def pictures(video: Tensor) -> Tensor:
    """(b f h w 3) uint8 -> (b f 3 h w) in [-1, 1]; what is so already stays."""
    return video if video.is_floating_point() else video.float().div(127.5).sub(1).permute(0, 1, 4, 2, 3)


def frames_at_once(video: Tensor) -> int:
    """How many frames of each clip (b f ...) are encoded at once; at least 1."""
    return max(1, PIXELS // (video[:, 0].numel() // 3))


def stacked(clips: Sequence[Clip], device: torch.device) -> Tensor:
    """Clips of one shape -> (b f h w 3) uint8; `pictures` makes floats of a part of their frames at a time."""
    return torch.stack([torch.from_numpy(clip.video) for clip in clips]).to(device)
