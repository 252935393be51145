"""Cosmos 3 (diffusers' Cosmos3OmniPipeline) by both protocols: forward dynamics imagines, inverse dynamics labels.

Its actions are those of a trained domain (for one arm: 3 entries of translation, 6 of rotation, 1 of the gripper), one
for each gap between frames. So the robot's rate is the video's, and its action vector has the domain's width. One
sample a call: the pipeline takes no batch.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from PIL import Image

from dreamgen.core import rotations
from dreamgen.core.clip import Clip, Labels, Past, Prompt
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.kinematics import command, commands, within
from dreamgen.core.seeding import seed_for
from dreamgen.worlds.env import clip_of
from dreamgen.worlds.rollout import extend, rollout

GAPS = 4  # frames of a latent frame


class Cosmos3:
    """path: a folder or hub id; pipeline: one that is open. domain: of the actions; tier: resolution (256, 480, ...).

    frames: of one call, the first among them: 1 + a multiple of 4. video_hz: None for the robot's, which it has to be.
    view: "ego_view", "third_person_view", "wrist_view", "concat_view". safety: the checker that the published licence
    asks for (needs the package cosmos_guardrail).

    Raises ValueError: an unknown domain, a robot of another action width, or one whose rate is not the video's.
    """

    mode = "forward_dynamics"

    def __init__(self, *, robot: Embodiment, path: str = "", domain: str = "droid_lerobot",
                 video_hz: str | int | None = None, frames: int = 17, tier: int = 480, steps: int = 35,
                 guidance: float = 1.0, view: str = "third_person_view", safety: bool = True,
                 pipeline: Any = None) -> None:  # fmt: skip
        from diffusers import Cosmos3OmniPipeline
        from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import _EMBODIMENT_TO_RAW_ACTION_DIM as WIDTHS

        if domain not in WIDTHS:
            raise ValueError(f"domain is '{domain}'; Cosmos 3 has the domains {', '.join(sorted(WIDTHS))}")
        if robot.action_dim != WIDTHS[domain]:
            raise ValueError(f"embodiment '{robot.name}' has {robot.action_dim} action entries, Cosmos 3's domain "
                             f"'{domain}' {WIDTHS[domain]}; give an embodiment in that representation")  # fmt: skip
        if frames <= GAPS or (frames - 1) % GAPS:
            raise ValueError(f"frames is {frames}; expected 1 + a multiple of {GAPS}")
        if video_hz is not None and Fraction(video_hz) != robot.rate:
            raise ValueError(f"video_hz is {video_hz}, embodiment '{robot.name}' moves at {robot.robot_hz} Hz; Cosmos "
                             "3 has an action for each gap between frames, so they must be equal")  # fmt: skip
        self.robot, self.domain, self.tier, self.chunk = robot, domain, tier, frames - 1
        self.steps, self.guidance, self.view, self.safety = steps, guidance, view, safety
        self.clock = Clock(robot_hz=robot.robot_hz, video_hz=robot.robot_hz, frames=frames)
        if pipeline is None:
            pipeline = Cosmos3OmniPipeline.from_pretrained(path, torch_dtype=torch.bfloat16,
                                                           enable_safety_checker=safety)  # fmt: skip
        self.pipe = pipeline
        self.pipe.set_progress_bar_config(disable=True)

    def place(self) -> "Cosmos3":
        """Move the pipeline to the accelerator, if there is one."""
        from dreamgen.engine.precision import best_device

        self.pipe.to(best_device())
        return self

    def call(self, instruction: str, seed: int, **condition: Any) -> Any:
        """One call of the pipeline under a `CosmosActionCondition` of these fields."""
        from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition

        action = CosmosActionCondition(mode=self.mode, domain_name=self.domain, resolution_tier=self.tier,
                                       view_point=self.view, **condition)  # fmt: skip
        return self.pipe(instruction, action=action, fps=float(self.robot.rate), num_inference_steps=self.steps,
                         guidance_scale=self.guidance, generator=torch.Generator().manual_seed(seed),
                         output_type="np", enable_safety_check=self.safety)  # fmt: skip


class Cosmos3World(Cosmos3):
    """An `ActionWorldModel`: future frames from the last frame and the actions."""

    gaps = GAPS

    def imagine(self, pasts: Sequence[Past], actions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `ActionWorldModel.imagine`."""
        return rollout(self._chunk, self.robot, self.clock, pasts, actions, multiple=GAPS)

    def _chunk(self, pasts: Sequence[Past], actions: Sequence[np.ndarray]) -> list[np.ndarray]:
        made = []
        for past, action in zip(pasts, actions, strict=True):
            taken = torch.from_numpy(within(self.robot, action, f"actions of '{past.prompt.id}'"))
            seed = seed_for(past.prompt.seed, "chunk", len(past.video))
            video = self.call(past.prompt.instruction, seed, chunk_size=len(taken), raw_actions=taken,
                              image=Image.fromarray(past.video[-1])).video  # fmt: skip
            frames = (np.asarray(video)[1 : len(taken) + 1] * 255).round().clip(0, 255).astype(np.uint8)
            if frames.shape[1:] != past.video.shape[1:]:
                raise ValueError(f"Cosmos 3 returned frames of {frames.shape[1:3]} for a canvas of "
                                 f"{past.video.shape[1:3]}; choose a larger `tier`, or views of multiples of its "
                                 "VAE's scale")  # fmt: skip
            made.append(frames)
        return made

    def dream(self, prompts: Sequence[Prompt]) -> list[Clip]:
        """One clip per prompt, under its actions."""
        if bare := [prompt.id for prompt in prompts if not prompt.action.size]:
            raise ValueError(f"the prompts {', '.join(bare[:3])} have no actions; forward dynamics needs them")
        pasts = [extend(self, [Past.begin(p, self.robot.action_dim)], [p.action])[0] for p in prompts]
        return [clip_of(past, self.clock.video_hz) for past in pasts]


class Cosmos3Labeler(Cosmos3):
    """A `Labeler`: actions from video. samples: draws, whose mean is the label and whose deviation its spread;
    commands are voted on, of rotations the mean is one, and the spread that about an axis."""

    mode = "inverse_dynamics"

    def __init__(self, *, samples: int = 2, **settings: Any) -> None:
        super().__init__(**settings)
        self.samples = samples

    def label(self, clips: Sequence[Clip]) -> list[Labels]:
        """See `Labeler.label`. ValueError for a clip of another rate."""
        made = []
        for clip in clips:
            if clip.video_hz != self.clock.video_hz:
                raise ValueError(f"clip '{clip.id}' has {clip.video_hz} frames a second; Cosmos 3 labels videos at the "
                                 f"robot's {self.clock.video_hz}")  # fmt: skip
            drawn = np.stack([self._one(clip, k) for k in range(self.samples)])
            made.append(_merged(self.robot, drawn))
        return made

    def _one(self, clip: Clip, sample: int) -> np.ndarray:
        steps, found = len(clip.video) - 1, []
        for start in range(0, steps, self.chunk):
            count = min(self.chunk, steps - start)
            part = [Image.fromarray(frame) for frame in clip.video[start : start + count + 1]]
            out = self.call(clip.instruction, seed_for(clip.seed, "label", sample, start), video=part,
                            chunk_size=-(-count // GAPS) * GAPS).action[0]  # fmt: skip
            found.append(out[:count].float().numpy())
        return np.concatenate(found)


def _merged(robot: Embodiment, drawn: np.ndarray) -> Labels:
    """One label of all draws (n s a)."""
    value, spread = drawn.mean(0), drawn.std(0)
    for part in robot.action:
        each = drawn[..., part.slice]
        if part.kind == "binary":
            low, high = commands(part)
            votes = np.where(each > (low + high) / 2, high, low)
            value[:, part.slice], spread[:, part.slice] = votes.mean(0), votes.std(0)
        elif part.rotation:
            q = rotations.read(part, each)
            middle = rotations.principal(np.einsum("nsi,nsj->sij", q, q))
            off = rotations.angle(middle[None], q)[..., None] / part.radians
            value[:, part.slice], spread[:, part.slice] = rotations.tell(part, middle), np.sqrt((off**2).mean(0) / 3)
    return Labels(value=command(robot, value.astype(np.float32)), spread=spread.astype(np.float32))
