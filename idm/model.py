"""Flow-matching inverse dynamics: the actions between the frames of a window.

Frames are encoded once each; a DiT denoises the window's action chunk from their tokens. Training minimises
`|v(x_t, t) - (x - noise)|^2` with `x_t = (1 - t) * noise + t * x` on windows of recorded episodes, plus the error of
the state read from each frame. Labels merge all windows of a clip (`idm.merge`), and the deltas are corrected by the
positions read from the frames (`idm.smooth`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreamgen.core.clip import Clip, Labels
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.seeding import torch_rng_for
from dreamgen.engine.precision import autocast, best_device
from idm.augment import Augment
from idm.batches import Recorded
from idm.clips import alike, clock_of, frames_at_once, kind, pictures, require_readable, spacings_of, stacked
from idm.flow import Denoiser
from idm.heads import Heads, between_frames
from idm.merge import RULES, Windows, horizon, merge
from idm.robots import Robots, Seen
from idm.tower import PretrainedVision
from idm.vision import ConvVision, with_motion


class FlowIDM(Robots):
    """Inverse dynamics model, a Labeler.

    robot, clock: whose actions it predicts, and the rates of the videos it labels. Others may be added (`add`): they
        share all but what `Heads` holds, and one is chosen to be labelled (`choose`), the first by default.
    frames: frames of a window. spacings: robot steps per frame gap that it is trained for and accepts ("2", "3/2"), the
        clock's own among them; that alone by default.
    train_frames: frames of a training clip, all of whose windows share one encoding; more where the rates do not divide
        and it takes them to show a window in every phase of the clock (5 + 3 of windows of 5 at 5/4 robot steps a gap).
    vision: keyword arguments of ConvVision, or of PretrainedVision if they name a `path`.
    width, layers, heads: of the denoiser. draws: noise draws per window and training step.
    time_shape: noise level 1 - t ~ Beta(*time_shape) * 0.999, as published: most draws are noisy.
    state_weight: of the state error in the loss; at 0 no states are read, and deltas are not corrected by them.
    augment: keyword arguments of `Augment`.
    flow_steps: Euler steps. samples: per window. rule: merge rule. correct: strength of the drift correction, the
        ratio of the precisions given to positions and deltas over the calibrated one; 0 switches it off.
    """

    def __init__(
        self,
        *,
        robot: Embodiment,
        clock: Clock,
        frames: int = 5,
        spacings: Sequence[str | int | float] = (),
        train_frames: int = 6,
        vision: dict | None = None,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        draws: int = 4,
        time_shape: Sequence[float] = (1.5, 1.0),
        state_weight: float = 1.0,
        augment: dict | None = None,
        flow_steps: int = 4,
        samples: int = 2,
        rule: str = "centre",
        correct: float = 1.0,
        precision: str = "auto",
        seed: int = 0,
        label_batch: int = 16,
    ) -> None:
        super().__init__(Seen(robot, clock, spacings_of(spacings, clock)))
        if not 2 <= frames <= train_frames:
            raise ValueError(f"a window of {frames} frames in training clips of {train_frames}; expected "
                             f"2 <= frames <= train_frames")  # fmt: skip
        if rule not in RULES:
            raise ValueError(f"merge rule is '{rule}'; expected one of {', '.join(RULES)}")
        self.path, self.frames, self.train_frames = None, frames, train_frames
        self.draws, self.time_shape, self.state_weight = draws, tuple(time_shape), state_weight
        self.flow_steps, self.samples, self.rule, self.correct = flow_steps, samples, rule, correct
        self.precision, self.seed, self.label_batch = precision, seed, label_batch
        self.config = {
            "clock": clock.spec(), "frames": frames, "spacings": self.spacings, "train_frames": train_frames,
            "vision": dict(vision or {}), "width": width, "layers": layers, "heads": heads, "draws": draws,
            "time_shape": list(time_shape), "state_weight": state_weight, "augment": dict(augment or {}),
            "flow_steps": flow_steps, "samples": samples, "rule": rule, "correct": correct, "precision": precision,
            "seed": seed, "label_batch": label_batch,
        }  # fmt: skip
        self.augment = Augment(**(augment or {}))
        generator = torch.random.get_rng_state()
        torch.manual_seed(seed)
        tower = PretrainedVision if "path" in (vision or {}) else ConvVision
        self.vision = tower(size=robot.canvas, width=width, **(vision or {}))
        if isinstance(self.vision, PretrainedVision):
            self.config["vision"] |= self.vision.spec()
        longest = max(horizon(train, frames) for train in self.clocks)
        self.denoiser = Denoiser(width=width, layers=layers, heads=heads, frames=frames, steps=longest)
        self.heads = nn.ModuleDict({robot.name: Heads(robot, width)})
        torch.random.set_rng_state(generator)

    def place(self) -> "FlowIDM":
        """Move to the accelerator, if there is one."""
        return self.to(best_device())

    @property
    def window(self) -> int:
        """Frames of the shortest clip that it labels."""
        return self.frames

    def encode(self, video: Tensor) -> Tensor:
        """video (b c h w 3) uint8, or (b c 3 h w) in [-1, 1] -> tokens (b c l width), each frame once."""
        size, found = frames_at_once(video), []
        for begin in range(0, video.shape[1], size):
            before = min(begin, 1)  # a neighbour on either side, for the differences
            part = pictures(video[:, begin - before : begin + size + 1])
            part = with_motion(part)[:, before : before + size]
            found.append(self.vision(part.flatten(0, 1)).unflatten(0, part.shape[:2]).float())
        return torch.cat(found, 1)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Velocity error plus state error, on a batch of `idm.batches`, whose `robot` it is of if it names one; then
        the metrics have its name in front."""
        if "robot" not in batch:
            return self._errors(batch)
        with self.reading(batch["robot"]):
            total, metrics = self._errors(batch)
            return total, {f"{self.robot.name}_{key}": value for key, value in metrics.items()}

    def _errors(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        video = pictures(batch["video"])
        b, c = video.shape[:2]
        windows, device = self._windows(float(batch["spacing"]), c), video.device
        tokens = self.encode(self.augment(video))
        metrics = {}
        total = torch.zeros((), device=device)
        if self.reads_state:
            read = self.head.read_state(tokens[:, :, 0])
            metrics["state"] = (read - self.head.state.normalise(batch["state"])).square().mean()
            total = total + self.state_weight * metrics["state"]
        mask = torch.from_numpy(windows.mask).to(device).repeat(b, 1)
        x = self.head.action.normalise(batch["action"])[:, torch.from_numpy(windows.steps).to(device)].flatten(0, 1)
        x = x[:, None].expand(-1, self.draws, -1, -1)
        noise = torch.randn_like(x)
        level = torch.distributions.Beta(*(torch.tensor(float(s), device=device) for s in self.time_shape))
        t = 1 - 0.999 * level.sample(x.shape[:2])
        x_t = torch.lerp(noise, x, t[..., None, None])
        v = self._velocity(x_t, t, self._conditions(tokens, windows, float(batch["spacing"])), mask)
        error = (v - (x - noise)).square().mean(-1) * mask[:, None]
        metrics["flow"] = error.sum() / (mask.sum() * self.draws)
        return total + metrics["flow"], metrics

    def _windows(self, spacing: float, frames: int) -> Windows:
        clock = min(self.clocks, key=lambda clock: abs(float(clock.stride) - spacing))
        return Windows.of(clock.with_frames(frames), self.frames)

    def _conditions(self, tokens: Tensor, windows: Windows, spacing: float) -> tuple[tuple, Tensor]:
        """What all denoising steps share: keys and values of the frames, and the spacing."""
        at = torch.from_numpy(windows.at).to(tokens.device)
        count = len(tokens) * len(at)
        return self.denoiser.memories(tokens, at), torch.full((count,), spacing, device=tokens.device)

    def _velocity(self, x_t: Tensor, t: Tensor, conditions: tuple[tuple, Tensor], mask: Tensor) -> Tensor:
        """x_t (n m h a), t (n m) -> velocity of the same shape as x_t.

        The network adds to the best linear guess for data of unit size, `(2t - 1) / (t^2 + (1 - t)^2) * x_t`, and its
        own output has unit size at every t: at t = 0 it predicts the action itself.
        """
        memories, spacing = conditions
        hidden = self.denoiser(self.head.embed(x_t), t, spacing, memories, mask)
        t = t[..., None, None]
        size = t**2 + (1 - t) ** 2
        return (2 * t - 1) / size * x_t + self.head.decode(hidden) / size.sqrt()

    @torch.no_grad()
    def predict(self, video: Tensor, noise: Tensor, spacing: float) -> tuple[Tensor, Tensor]:
        """Chunks (b k m h a) of all windows of video, as `encode` takes it, from noise (b k m h a), and the states
        (b c d) read from the frames; in the units of the robot."""
        windows, tokens = self._windows(spacing, video.shape[1]), self.encode(video)
        size = self.denoiser.windows_at_once(tokens, self.frames)
        x = torch.cat([self._denoised(tokens[:, k : k + size + self.frames - 1], noise[:, k : k + size],
                                      windows.some(k, k + size), spacing)
                       for k in range(0, noise.shape[1], size)], 1)  # fmt: skip
        states = self.head.state.denormalise(self.head.read_state(tokens[:, :, 0]))
        return self.head.action.denormalise(x), states

    def _denoised(self, tokens: Tensor, noise: Tensor, windows: Windows, spacing: float) -> Tensor:
        """Normalised chunks (b k m h a) of these windows, from the tokens of the frames that they see."""
        conditions = self._conditions(tokens, windows, spacing)
        mask = torch.from_numpy(windows.mask).to(noise.device).repeat(len(noise), 1)
        x = noise.flatten(0, 1)
        for step in range(self.flow_steps):
            t = torch.full(x.shape[:2], step / self.flow_steps, device=x.device)
            x = x + self._velocity(x, t, conditions, mask) / self.flow_steps
        return x.view_as(noise)

    def chunks(self, clips: Sequence[Clip]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per clip: samples of all windows' chunks (m k h a) and the states (c d) read from its frames."""
        device = next(self.parameters()).device
        done: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for clip in clips:
            self.check(clip)
        for part in alike(map(kind, clips), self.label_batch):
            clock = self.clock_of(clips[part[0]])
            k, h = Windows.of(clock, self.frames).mask.shape
            shape = (k, self.samples, h, self.robot.action_dim)
            noise = torch.stack([torch.randn(shape, generator=torch_rng_for(self.seed, "label", clips[i].id))
                                 for i in part]).to(device)  # fmt: skip
            with autocast(self.precision, device):
                found, states = self.predict(stacked([clips[i] for i in part], device), noise, float(clock.stride))
            found, states = found.float().cpu().numpy(), states.float().cpu().numpy()
            for i, chunk, state in zip(part, found, states, strict=True):
                done[i] = chunk.swapaxes(0, 1), state
        return [done[i] for i in range(len(clips))]

    def label(self, clips: Sequence[Clip]) -> list[Labels]:
        """One Labels (s a) per clip, in order; the noise of a clip is drawn from its id."""
        return self.labels_and_states(clips)[0]

    def labels_and_states(self, clips: Sequence[Clip]) -> tuple[list[Labels], list[np.ndarray] | None]:
        """Labels, and the states (s + 1, d) that were read from the same frames, interpolated to the robot steps
        between them; None where it reads none."""
        self.eval()
        labels, states = [], []
        for clip, (chunk, seen) in zip(clips, self.chunks(clips), strict=True):
            clock = self.clock_of(clip)
            found = merge(chunk, Windows.of(clock, self.frames), self.robot, self.rule)
            strength = self.correct if self.reads_state else 0.0
            labels.append(self.head.corrected(found, seen, clock, strength))
            if self.reads_state:
                states.append(between_frames(self.robot.state, clock, seen))
        return labels, states if self.reads_state else None

    def calibrate(self, dataset: Recorded, episodes: Sequence[int]) -> dict[str, float]:
        """Measure the errors of deltas and of positions read from frames on episodes held out; after training.

        Raises ValueError if none of them shows a window.
        """
        frames = {i: self.clock.frames_in(dataset.length(i)) for i in episodes}
        seen = [i for i in episodes if frames[i] >= self.frames]
        clocks = {i: self.clock.with_frames(frames[i]) for i in seen}
        if not seen:
            raise ValueError(f"none of {len(frames)} episodes shows the {self.frames} frames at {self.clock.video_hz} "
                             f"Hz of a window; hold out longer ones, or train with fewer `frames`")  # fmt: skip
        self.eval()
        labels, read = {}, {}
        for part in alike([frames[i] for i in seen], self.label_batch):
            numbers = [seen[k] for k in part]
            clips = [Clip(id=f"calibrate_{i}", video=dataset.canvas(i, clocks[i].rows), video_hz=clocks[i].video_hz,
                          instruction=dataset.episode(i).instruction) for i in numbers]  # fmt: skip
            for i, (chunk, states) in zip(numbers, self.chunks(clips), strict=True):
                labels[i] = merge(chunk, Windows.of(clocks[i], self.frames), self.robot, self.rule).value
                read[i] = states
        recorded = [(dataset.episode(i), clocks[i]) for i in seen]
        return self.head.calibrate([labels[i] for i in seen], [e.action[: clock.steps] for e, clock in recorded],
                                   [read[i] for i in seen] if self.reads_state else [],
                                   [e.state[clock.rows] for e, clock in recorded])  # fmt: skip

    def clock_of(self, clip: Clip) -> Clock:
        return clock_of(clip, self.robot)

    def check(self, clip: Clip) -> None:
        """Raise ValueError if the clip's rate, length or size is not what the labeler was trained for."""
        require_readable(clip, self.robot, self.spacings, self.frames)
