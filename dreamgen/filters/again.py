"""Clips dreamt again: an action-conditioned model shows what their labels would do from their first frame on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8

from dreamgen.core.clip import Clip, Labels, Past, Prompt
from dreamgen.core.kinematics import clipped
from dreamgen.core.protocols import ActionWorldModel
from dreamgen.core.seeding import seed_for


def dreamt_again(model: ActionWorldModel, clips: Sequence[Clip], labels: Sequence[Labels], *, filter: str,
                 instruction: bool, number: int = 0,
                 ) -> Iterator[tuple[int, Clip, UInt8[np.ndarray, "t h w 3"]]]:  # fmt: skip
    """(k, what was given of clips[k], its dream under labels[k]), frame by frame the same moments; in any order.

    A clip is followed up to the last frame that the model can end on, beyond its window from the frames that it has
    dreamt; one without such a frame is left out. instruction: whether the model is told it. number: of the dream; each
    has its own noise. ValueError names `filter` for a clip of another rate than the model's.
    """
    asked: dict[tuple, list[tuple[int, Clip]]] = {}
    gaps = getattr(model, "gaps", 1)
    for k, (clip, label) in enumerate(zip(clips, labels, strict=True)):
        if clip.video_hz != model.clock.video_hz:
            raise ValueError(f"clip '{clip.id}' runs at {clip.video_hz} Hz, the action-conditioned model at "
                             f"{model.clock.video_hz}; filter '{filter}' needs one of that rate")  # fmt: skip
        frames = (len(clip.video) - 1) // gaps * gaps + 1
        if frames >= 2:
            action = clipped(model.robot, label.value[: model.clock.with_frames(frames).steps])
            followed = replace(clip, video=clip.video[:frames], action=action)
            asked.setdefault(followed.video.shape[:3], []).append((k, followed))
    for group in asked.values():
        pasts = [Past.begin(prompt_of(clip, instruction, number), model.robot.action_dim) for _, clip in group]
        dreams = model.imagine(pasts, [clip.action for _, clip in group])
        for (k, clip), rest in zip(group, dreams, strict=True):
            yield k, clip, np.concatenate([clip.video[:1], rest[: len(clip.video) - 1]])


def prompt_of(clip: Clip, instruction: bool, number: int) -> Prompt:
    """The first frame of a clip, to begin its dream of that number with."""
    seed = seed_for(clip.seed, "again", number) if number else clip.seed
    return Prompt(id=clip.id, image=clip.video[0], instruction=clip.instruction if instruction else "", seed=seed,
                  state=clip.state)  # fmt: skip
