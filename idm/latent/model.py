"""Latent actions: an encoder of the frames up to k + 1 to z_k, a decoder of (frame k, z_k) to frame k + 1.

    L = |f(x_k+1) - f(x_k) - D(x_k, z_k)|^2 / Var(f(x_k+1) - f(x_k)) + bottleneck + head

with f the target (pixels, or frozen features): 1 is what copying frame k would score. No action is needed; a small
share of labelled episodes may train a head that reads robot actions from the latents of neighbouring gaps (LAOM,
arXiv:2502.00379).
"""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreamgen.core.clip import Clip, Labels
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.core.kinematics import command
from dreamgen.core.manifest import read_json
from dreamgen.core.seeding import rng_for
from dreamgen.data.normaliser import Normaliser
from dreamgen.engine.precision import autocast, best_device
from idm import checkpoint
from idm.batches import Recorded, in_all_phases
from idm.clips import alike, clock_of, frames_at_once, kind, pictures, require_readable, stacked
from idm.latent.batches import VideoBatches, starts_of
from idm.latent.bottleneck import Continuous, Passed, Quantised
from idm.latent.target import Features, Pixels
from idm.latent.transformer import Layer, Patches
from idm.merge import Windows, horizon, merge

log = logging.getLogger(__name__)


def latent_robot(robot: Embodiment, width: int) -> Embodiment:
    """The embodiment of latent actions seen through `robot`'s cameras: one action part, held over each frame gap."""
    return Embodiment(name=f"{robot.name}_latent", robot_hz=robot.robot_hz, views=robot.views, grid=robot.grid,
                      state=robot.state, action=(Part(name="latent", start=0, stop=width),),
                      state_key=robot.state_key, action_key=robot.action_key)  # fmt: skip


class LatentActions(nn.Module):
    """Latent action model, a Labeler of the embodiment `<robot>_latent`, or of `robot` with output="actions".

    robot, clock: whose videos it reads, and their rates. frames: of a training clip; more where the rates do not divide
    and a head is to see gaps in every phase of the clock, up to four times as many. reach: frames back that a layer
    attends to. latent: width of z; codebook: number of codes shared by `tokens` tokens, 0 for a continuous z under
    `beta`; renewed: training steps in which unused codes are replaced.
    width, layers, decoder_layers, heads: of the transformers. target: keyword arguments of `Features`; null for pixels.
    target_width: of the target, as a checkpoint knows it; null asks the target.
    labelled: share of the training episodes that bring actions, at least one, whose actions a head is trained on; 0 for
    no head, as where all is video without actions.
    output: "latent" labels with z, "actions" through the head.
    """

    window = 2  # frames of the shortest clip that it labels

    def __init__(self, *, robot: Embodiment, clock: Clock, frames: int = 5, reach: int = 2, latent: int = 16,
                 beta: float = 2e-4, codebook: int = 0, tokens: int = 4, renewed: int = 200, width: int = 96,
                 layers: int = 2, decoder_layers: int = 2, heads: int = 4, target: dict | None = None,
                 target_width: int | None = None, labelled: float = 0.025, head_weight: float = 0.5,
                 output: str = "latent", precision: str = "auto", seed: int = 0,
                 label_batch: int = 16) -> None:  # fmt: skip
        super().__init__()
        if output not in ("latent", "actions") or (output == "actions" and not labelled):
            raise ValueError(f"output is '{output}' with a labelled share of {labelled}; expected 'latent', or "
                             f"'actions' with a share above 0, which trains the head")  # fmt: skip
        if labelled and not robot.action:
            raise ValueError(f"embodiment '{robot.name}' has no action parts, and labelled is {labelled}, the share of "
                             f"episodes that bring actions; set labeler.labelled=0")  # fmt: skip
        if frames < 2 or reach < 1:
            raise ValueError(f"frames is {frames}, reach is {reach}; expected frames >= 2 and reach >= 1")
        self.source, self.clock, self.frames, self.path = robot, clock, frames, None
        self.latent, self.labelled, self.head_weight, self.output = latent, labelled, head_weight, output
        self.precision, self.seed, self.label_batch, self.spacings = precision, seed, label_batch, [str(clock.stride)]
        self.config = {
            "clock": clock.spec(), "frames": frames, "reach": reach, "latent": latent, "beta": beta,
            "codebook": codebook, "tokens": tokens, "renewed": renewed, "width": width, "layers": layers,
            "decoder_layers": decoder_layers, "heads": heads, "target": target, "labelled": labelled,
            "head_weight": head_weight, "output": output, "precision": precision, "seed": seed,
            "label_batch": label_batch,
        }  # fmt: skip
        self.robot = robot if output == "actions" else latent_robot(robot, latent)
        self._target: Pixels | Features | None = None if target else Pixels()
        generator = torch.random.get_rng_state()
        torch.manual_seed(seed)
        self.seen, self.begun = Patches(6, robot.canvas, width), Patches(3, robot.canvas, width)
        cells = self.seen.grid[0] * self.seen.grid[1]
        self.encoder = nn.ModuleList(Layer(width, heads, reach) for _ in range(layers))
        self.gather = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 16), nn.Flatten(-2),
                                    nn.Linear(16 * cells, 2 * width), nn.GELU())  # fmt: skip
        self.bottleneck = (Quantised(2 * width, latent, codebook, tokens, renewed) if codebook else
                           Continuous(2 * width, latent, beta))  # fmt: skip
        self.told = nn.ModuleList(nn.Linear(latent, 2 * width) for _ in range(decoder_layers))
        self.decoder = nn.ModuleList(Layer(width, heads, 0) for _ in range(decoder_layers))
        outputs = self.config["target_width"] = self.target.width if target_width is None else target_width
        self.proj_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))
        self.register_buffer("scale", torch.ones(outputs))
        self.slots = horizon(clock, 2)
        self.head = nn.Sequential(nn.Linear(3 * latent, 2 * width), nn.GELU(),
                                  nn.Linear(2 * width, self.slots * max(1, robot.action_dim)))  # fmt: skip
        self.action = Normaliser(robot.action_dim, robot.action)
        torch.random.set_rng_state(generator)

    @property
    def target(self) -> Pixels | Features:
        """What is foretold; frozen features are opened on first use, which labelling is not, and are not saved."""
        if self._target is None:
            self._target = Features(**self.config["target"])
        return self._target

    def place(self) -> "LatentActions":
        """Move to the accelerator, if there is one."""
        return self.to(best_device())

    def encode(self, video: Tensor) -> Passed:
        """video (b f h w 3) uint8, or (b f 3 h w) in [-1, 1] -> what passes the bottleneck for each of the f - 1
        gaps."""
        size, found = frames_at_once(video), []
        for begin in range(0, video.shape[1], size):
            before = min(begin, 1)  # the frame that the first differs from
            part = pictures(video[:, begin - before : begin + size])
            step = torch.cat([torch.zeros_like(part[:, :1]), part[:, 1:] - part[:, :-1]], 1)
            part = torch.cat([part, step], 2)[:, before:]
            found.append(self.seen(part.flatten(0, 1)).unflatten(0, part.shape[:2]))
        tokens = torch.cat(found, 1)
        for layer in self.encoder:
            tokens = layer(tokens)
        return self.bottleneck(self.gather(tokens[:, 1:].float()).float())

    def decode(self, frames: Tensor, z: Tensor) -> Tensor:
        """Change of the target after frames (n 3 h w) under z (n latent), in units of `scale`: (n d gh gw)."""
        tokens = self.begun(frames)
        for layer, told in zip(self.decoder, self.told, strict=True):
            gain, shift = told(z.float())[:, None].chunk(2, dim=-1)
            tokens = layer((tokens * (1 + gain) + shift)[:, None])[:, 0]
        return self.proj_out(tokens.float()).mT.unflatten(2, self.begun.grid)

    def changes(self, video: Tensor) -> Tensor:
        """Change of the target over each gap of video (b f 3 h w), in units of `scale`: (b*k d gh gw)."""
        features = self.target(video.flatten(0, 1)).unflatten(0, video.shape[:2])
        return ((features[:, 1:] - features[:, :-1]) / self.scale[:, None, None]).flatten(0, 1)

    def read(self, label: Tensor) -> Tensor:
        """Actions (b k h a) by the head, normalised, from latents (b k latent) of neighbouring gaps."""
        wide = torch.cat([label[:, :1], label, label[:, -1:]], 1)
        read = self.head(torch.cat([wide[:, :-2], label, wide[:, 2:]], -1))
        return read.unflatten(-1, (self.slots, -1))[..., : self.source.action_dim]

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Foretelling, bottleneck and head, on a batch of `VideoBatches`."""
        video = pictures(batch["video"])
        passed = self.encode(video)
        error = self.decode(video[:, :-1].flatten(0, 1), passed.z.flatten(0, 1)) - self.changes(video)
        metrics = {"change": error.square().mean(), "bottleneck": passed.loss}
        total = metrics["change"] + passed.loss
        if self.labelled:
            windows = Windows.of(self.clock.with_frames(video.shape[1]), 2)
            steps, mask = (torch.from_numpy(a).to(video.device) for a in (windows.steps, windows.mask))
            wrong = self.read(passed.label) - self.action.normalise(batch["action"])[:, steps]
            weight = (mask[None, ..., None] * batch["known"][:, None, None, None]).expand_as(wrong)
            metrics["head"] = (wrong.square() * weight).sum() / weight.sum().clamp(min=1)
            total = total + self.head_weight * metrics["head"]
        return total, metrics

    def fit(self, dataset: Recorded, episodes: Sequence[int]) -> None:
        """Choose the labelled episodes, and measure their actions and how far the target changes; before training."""
        where = f"the dataset {getattr(dataset, 'root', '')}"
        self.source.require(dataset.robot.contract(), where)
        rng, episodes, self.known = rng_for(self.seed, "labelled"), list(episodes), []
        if self.labelled:
            told = [i for i in episodes if dataset.episode(i).meta.get("action_known") is not False]
            if not told:
                raise ValueError(f"{where} is video without actions, as is what is trained on beside it, and a head is "
                                 f"to learn actions from a share of {self.labelled} of the episodes that bring them; "
                                 f"set labeler.labelled=0, or add recordings with actions (stage.more)")  # fmt: skip
            count = max(1, round(self.labelled * len(told)))
            long = [i for i in told if len(starts_of(dataset, i, self._clips))]
            self.known = sorted(int(i) for i in rng.permutation(long or told)[:count])
            self.action = Normaliser.fit(np.concatenate([dataset.episode(i).action for i in self.known]),
                                         self.source.action)  # fmt: skip
        sample = VideoBatches(dataset, episodes, [], self.clock.with_frames(2), batch_size=64, seed=self.seed)(0)
        self.scale.copy_(self.changes(pictures(sample["video"])).square().mean((0, 2, 3)).sqrt() + 1e-4)

    @property
    def _clips(self) -> Clock:
        """That of training clips; a head has an output for each robot step of the longest gap."""
        clock = self.clock.with_frames(self.frames)
        return in_all_phases(clock, 2, 4 * self.frames) if self.labelled else clock

    def batches(self, dataset: Recorded, episodes: Sequence[int], *, batch_size: int, seed: int,
                **unused: Any) -> VideoBatches:  # fmt: skip
        """Training batches by step. Settings that only inverse dynamics knows are not used."""
        clock = self._clips
        if clock.frames > self.frames:
            log.warning("training clips have %d frames in place of labeler.frames=%d: fewer would not show the gaps in "
                        "all phases of a video whose rate does not divide the robot's", clock.frames,
                        self.frames)  # fmt: skip
        if self.labelled and max(last - first for first, last in clock.gaps()) < self.slots:
            log.warning("training clips of %d frames at %s Hz show no gap of %d robot steps, and longer ones do: the "
                        "last step of these is labelled by weights that nothing has trained; raise labeler.frames, or "
                        "give video of a rate that divides the robot's %s Hz", clock.frames, clock.video_hz,
                        self.slots, clock.robot_hz)  # fmt: skip
        return VideoBatches(dataset, episodes, self.known, clock, batch_size=batch_size, seed=seed)

    def calibrate(self, dataset: Recorded, episodes: Sequence[int]) -> dict[str, float]:
        """Nothing to calibrate; says how many episodes were labelled."""
        return {"labelled_episodes": float(len(self.known))}

    @torch.no_grad()
    def gaps(self, clips: Sequence[Clip], *, foretold: bool = True) -> list[dict[str, np.ndarray]]:
        """Per clip of k + 1 frames: latent and spread (k latent), action (k h a) by the head, codes (k tokens) where
        quantised; with `foretold`, for which the target is opened, change: mean square of the target's change over the
        gap, left: of it what is not foretold (k,)."""
        self.eval()
        device = next(self.parameters()).device
        done: dict[int, dict[str, np.ndarray]] = {}
        for clip in clips:
            self.check(clip)
        for part in alike(map(kind, clips), self.label_batch):
            video = stacked([clips[i] for i in part], device)
            with autocast(self.precision, device):
                passed = self.encode(video)
                action = self.action.denormalise(self.read(passed.label).float())
            rows = {"latent": passed.label, "spread": passed.spread, "action": action}
            if foretold:
                rows |= self._foretold(video, passed.z)
            rows |= {} if passed.codes is None else {"codes": passed.codes}
            for n, i in enumerate(part):
                done[i] = {key: value[n].float().cpu().numpy() for key, value in rows.items()}
        return [done[i] for i in range(len(clips))]

    def _foretold(self, video: Tensor, z: Tensor) -> dict[str, Tensor]:
        """left and change (b k) of `gaps`, for video (b k+1 h w 3) uint8 and what passed, z (b k latent)."""
        size, found = frames_at_once(video), []
        for begin in range(0, z.shape[1], size):
            part, told = pictures(video[:, begin : begin + size + 1]), z[:, begin : begin + size]
            with autocast(self.precision, video.device):
                change = self.decode(part[:, :-1].flatten(0, 1), told.flatten(0, 1)).float()
            true = self.changes(part)
            found.append([x.square().mean((1, 2, 3)).unflatten(0, told.shape[:2]) for x in (change - true, true)])
        left, change = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return {"left": left, "change": change}

    def check(self, clip: Clip) -> None:
        """Raise ValueError if the clip's rate, length or size is not what the labeler was trained for."""
        require_readable(clip, self.source, self.spacings, self.window)

    def label(self, clips: Sequence[Clip]) -> list[Labels]:
        """One Labels per clip, in order: latents held over the robot steps of their gap, or actions by the head, within
        limits.

        spread: the posterior's deviation, or the distance to the code; zero for actions.
        """
        labels = []
        for clip, found in zip(clips, self.gaps(clips, foretold=False), strict=True):
            windows = Windows.of(clock_of(clip, self.source), 2)
            if self.output == "actions":
                read = merge(found["action"][None], windows, self.robot, "mean")
                labels.append(replace(read, value=command(self.robot, read.value)))
                continue
            value, spread = (np.repeat(found[key][None, :, None], self.slots, axis=2) for key in ("latent", "spread"))
            labels.append(Labels(value=merge(value, windows, self.robot, "mean").value,
                                 spread=merge(spread, windows, self.robot, "mean").value))  # fmt: skip
        return labels

    @torch.no_grad()
    def carry_over(self, frame: np.ndarray, latent: np.ndarray) -> np.ndarray | None:
        """Frames (k + 1 h w 3) that follow `frame` under another clip's latents (k latent), each from the last; None
        where the target is not pixels."""
        if self.config["target"]:
            return None
        self.eval()
        device = next(self.parameters()).device
        z = torch.from_numpy(latent).to(device)
        if isinstance(self.bottleneck, Quantised):
            z = self.bottleneck.codes(z.unflatten(-1, (self.bottleneck.tokens, -1)))[0].flatten(-2)
        seen = [pictures(torch.from_numpy(frame)[None, None].to(device))[0]]
        for k in range(len(z)):
            change = self.decode(seen[-1], z[k : k + 1]) * self.scale[:, None, None]
            seen.append((seen[-1] + self.target.picture(change)).clamp(-1, 1))
        return torch.cat(seen).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def measure(self, batches: Iterable[Sequence[Clip]]) -> dict[str, dict[str, float]]:
        """Share of the target's change that is not foretold on clips held out (1: no better than copying)."""
        found = [(gap["left"].sum(), gap["change"].sum()) for clips in batches for gap in self.gaps(clips)]
        left, change = zip(*found, strict=True)
        return {"change": {"left": float(sum(left) / sum(change))}}

    def save(self, path: Path) -> None:
        """config.json, contract.json (of the robot whose videos it reads), model.safetensors in the directory.

        A world model that is its target is also named by its place beside the directory, so that it is found when both
        have moved together.
        """
        target = dict(self.config["target"] or {})
        if "world" in target:
            target["beside"] = os.path.relpath(Path(target["world"]).resolve(), Path(path).resolve())
        checkpoint.save(self, {**self.config, "target": target or None}, [self.source], path)

    @classmethod
    def load(cls, path: Path | str, robot: Embodiment | None = None, **changes: object) -> "LatentActions":
        """From a directory written by `save`. changes: e.g. output="actions"; None leaves what was saved.

        Raises ValueError if `robot` is not the one whose videos it was trained on, or a file is missing.
        """
        target = read_json(Path(path) / "config.json").get("target") or {}
        if "beside" in target and "target" not in changes:
            world = Path(path) / target.pop("beside")
            changes["target"] = {**target, "world": str(world)} if world.exists() else target
        model = checkpoint.load(cls, path, robot, changes)
        model.path = Path(path)
        return model
