"""A judge of success: (video, instruction) to a probability, a small classifier over any vision-language encoder.

A few frames spread over the clip, the first and the last among them, are encoded under the instruction; each token is
shown beside its change since the first frame, and a query attends to all. With `proprioception` it is also told parts
of the robot's state at these frames, as the embodiment's rule makes them of the commands: in a dream and on a recording
the same way, never measured, so that a judge knows of closed fingers that are too small to be dreamt. Tell it no more
than that: where the hand was sent says what was attempted, and a judge that has learned from dreams, whose pictures
err, goes by it. The logit is calibrated on held-out episodes (Platt: probability = sigmoid(slope * logit + offset)). An
instruction it was not trained on gets nan.
"""

import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dreamgen.core.clip import Clip
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.kinematics import follow
from dreamgen.core.manifest import read_json, replacing, write_json
from dreamgen.core.part import Part
from dreamgen.data.normaliser import Normaliser
from dreamgen.filters.rates import Rates
from dreamgen.video.sheet import evenly
from dreamgen.video.tiling import untile

ALLOWED = "dreamgen.policies."  # classes of encoders that a checkpoint may name: a name in a checkpoint is code


class VideoJudge(nn.Module):
    """Judges clips of `robot` of any length.

    encoder: as of a policy (`words`, tokens of `width`, `config`). instructions: those it is trained on. frames: that
    it looks at. proprioception: names of the parts of the state that it is told, as they follow from the commands;
    where a clip has none it judges by the video. threshold, slope, offset: from calibration. rates: its tpr and tnr,
    {"real": ..., "imagined": ...}.
    """

    name = "judge"

    def __init__(self, *, robot: Embodiment, encoder: nn.Module, instructions: Sequence[str] = (), frames: int = 6,
                 layers: int = 2, heads: int = 4, dropout: float = 0.1, proprioception: Sequence[str] = (),
                 threshold: float = 0.5, slope: float = 1.0, offset: float = 0.0,
                 rates: dict | None = None) -> None:  # fmt: skip
        super().__init__()
        if frames < 2:
            raise ValueError(f"a judge compares at least 2 frames, got frames={frames}")
        self.robot, self.encoder, self.instructions = robot, encoder, tuple(instructions)
        if hasattr(encoder, "look_at"):
            encoder.look_at(len(robot.views))
        self.told = told_of(robot, proprioception)
        self.config = dict(frames=frames, layers=layers, heads=heads, dropout=dropout,
                           proprioception=list(proprioception))  # fmt: skip
        self.frames, self.threshold, self.slope, self.offset = frames, threshold, slope, offset
        self.rates = {name: Rates(**found) for name, found in (rates or {}).items()}
        width = encoder.width
        self.token = nn.Linear(2 * width, width)
        self.time = nn.Parameter(0.02 * torch.randn(frames, width))
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        layer = nn.TransformerDecoderLayer(width, heads, 2 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.attend = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        self.out = nn.Linear(width, 1)
        self.state = None
        if self.told:
            self.normaliser = Normaliser(len(self.told), self._parts())
            self.state = nn.Sequential(nn.Linear(2 * len(self.told), width), nn.GELU(), nn.Linear(width, width))
            self.unknown = nn.Parameter(0.02 * torch.randn(width))

    def fit(self, states: Float32[np.ndarray, "n d"]) -> None:
        """Statistics of the states that it is told, from some of them, in units; rows that are not all known (nan) do
        not count. ValueError if none is known."""
        known = states[np.isfinite(states).all(1)]
        if not len(known):
            raise ValueError(
                f"none of {len(states)} frames of the training clips has a known state to tell the judge; "
                f"record states and actions, or leave out proprioception={self.config['proprioception']}"
            )
        self.normaliser.load_state_dict(Normaliser.fit(known, self._parts(), floor=1e-3).state_dict())

    def _parts(self) -> list[Part]:
        """What it is told, part by part."""
        parts = [part for part in self.robot.state if part.start in self.told]
        return [replace(part, start=self.told.index(part.start), stop=self.told.index(part.stop - 1) + 1)
                for part in parts]  # fmt: skip

    def forward(self, pictures: UInt8[Tensor, "b t v h w 3"], words: Int64[Tensor, "b l"],
                states: Float[Tensor, "b t d"] | None = None) -> Float[Tensor, " b"]:  # fmt: skip
        """The logit of success, not calibrated. states: nan where they are not known."""
        b, t = pictures.shape[:2]
        seen, said = self.encoder(pictures.flatten(0, 1), words.repeat_interleave(t, 0))
        seen, said = seen.unflatten(0, (b, t)), said.unflatten(0, (b, t))[:, 0]
        y = self.token(torch.cat([seen, seen - seen[:, :1]], -1)) + self.time[:t, None]
        query = self.query + said.mean(1, keepdim=True)
        known = [y.flatten(1, 2), said]
        if self.state is not None and states is not None:
            told = states.isfinite().all(-1, keepdim=True)
            z = torch.where(told, self.normaliser.normalise(states), torch.zeros_like(states))
            z = self.state(torch.cat([z, z - z[:, :1]], -1))
            known.append(torch.where(told, z, self.unknown.to(z.dtype)) + self.time[:t])
        return self.out(self.attend(query, torch.cat(known, 1)))[:, 0, 0].float()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of (pictures, words, success), with proprioception also states."""
        logit = self(batch["pictures"], batch["words"], batch.get("states"))
        right = ((logit > 0) == (batch["success"] > 0.5)).float().mean()
        return F.binary_cross_entropy_with_logits(logit, batch["success"]), {"accuracy": right}

    def pictures(self, video: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """What it looks at of a canvas video (t H W 3): (frames v h w 3); short clips hold their last frame."""
        views = untile(self.robot, video[self._chosen(len(video), chosen)])
        return np.stack([views[view.name] for view in self.robot.views], axis=1)

    def states(self, clip: Clip, chosen: np.ndarray | None = None) -> Float32[np.ndarray, "t d"]:
        """What it is told at these frames (in order), (frames d) in units; nan where the clip does not say what was
        done. Of a clip without pictures `chosen` names the frames."""
        chosen = self._chosen(len(clip.video), chosen)
        if not len(clip.action) or clip.state.shape != (self.robot.state_dim,):
            return np.full((len(chosen), len(self.told)), np.nan, np.float32)
        if clip.action.shape[1] != self.robot.action_dim:
            raise ValueError(f"clip '{clip.id}' comes with actions {clip.action.shape[1]} wide, the judge's robot "
                             f"'{self.robot.name}' has {self.robot.action_dim}")  # fmt: skip
        clock = Clock(robot_hz=self.robot.robot_hz, video_hz=clip.video_hz, frames=max(2, int(chosen[-1]) + 1))
        states = follow(self.robot, clip.state, clip.action)[0]
        return states[clock.rows[chosen].clip(max=len(states) - 1)][:, self.told]

    def _chosen(self, count: int, chosen: np.ndarray | None) -> np.ndarray:
        chosen = evenly(count, self.frames) if chosen is None else chosen
        return np.pad(chosen, (0, self.frames - len(chosen)), mode="edge")

    @torch.no_grad()
    def logits(self, clips: Iterable[Clip], batch_size: int = 16) -> np.ndarray:
        """(b,) not calibrated, of any instruction; of a clip it keeps the frames that it looks at until the batch is
        full. ValueError names a clip that is not of the robot's canvas."""
        device, training, found, rest = self.out.weight.device, self.training, [], iter(clips)
        self.eval()
        while part := [self._seen(clip) for clip in islice(rest, batch_size)]:
            pictures, texts, told = zip(*part, strict=True)
            states = None if self.state is None else torch.from_numpy(np.stack(told)).to(device)
            shown = torch.from_numpy(np.stack(pictures)).to(device)
            found.append(self(shown, self.encoder.words(list(texts)).to(device), states).double().cpu().numpy())
        self.train(training)
        return np.concatenate(found) if found else np.zeros(0)

    def _seen(self, clip: Clip) -> tuple[np.ndarray, str, np.ndarray | None]:
        """Pictures, instruction, and what it is told."""
        if clip.video.shape[1:] != (*self.robot.canvas, 3):
            raise ValueError(
                f"clip '{clip.id}' has frames of {clip.video.shape[1:3]}, the judge looks at "
                f"{self.robot.canvas} of robot '{self.robot.name}'; give it clips of that robot"
            )
        return self.pictures(clip.video), clip.instruction, None if self.state is None else self.states(clip)

    def calibrated(self, logits: np.ndarray) -> np.ndarray:
        """Logits to probabilities."""
        return 1 / (1 + np.exp(-np.clip(self.slope * logits + self.offset, -50, 50)))

    def judge(self, clips: Iterable[Clip]) -> np.ndarray:
        """(b,) probability of success; nan for an instruction that it was not trained on. Clips are taken one by one,
        so those of a generator need not fit into memory together."""
        known: list[bool] = []

        def asked() -> Iterator[Clip]:
            for clip in clips:
                known.append(clip.instruction in self.instructions)
                if known[-1]:
                    yield clip

        told = self.calibrated(self.logits(asked()))
        found = np.full(len(known), np.nan)
        found[np.array(known, bool)] = told
        return found

    def save(self, path: Path) -> None:
        """config.json, contract.json, model.safetensors."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        target = f"{type(self.encoder).__module__}.{type(self.encoder).__qualname__}"
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with replacing(path / "model.safetensors") as temporary:
            save_file(weights, temporary)
        write_json(path / "contract.json", self.robot.contract())
        write_json(path / "config.json", {
            **self.config, "instructions": list(self.instructions), "threshold": self.threshold, "slope": self.slope,
            "offset": self.offset, "rates": {name: vars(rates) for name, rates in self.rates.items()},
            "encoder": {"_target_": target, **self.encoder.config},
        })  # fmt: skip

    @classmethod
    def load(cls, path: Path | str, *, robot: Embodiment | None = None) -> "VideoJudge":
        """The judge saved at `path`; ValueError: missing, broken, or trained on another robot than `robot`."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"judge {path} does not exist; run train_judge first, or mend the path")
        config, contract = read_json(path / "config.json"), read_json(path / "contract.json")
        if robot is not None:
            robot.require(contract, f"judge {path}", learned=bool(config.get("proprioception")))
        encoder = _encoder(config.pop("encoder"), path)
        self = cls(robot=robot or Embodiment.from_contract(contract), encoder=encoder, **config)
        try:
            self.load_state_dict(load_file(path / "model.safetensors"), strict=True)
        except (FileNotFoundError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"the weights of judge {path} do not load: {error}. Run train_judge again.") from error
        self.path = path
        return self.eval()


def told_of(robot: Embodiment, names: Any) -> list[int]:
    """The entries of the state that belong to the parts `names`. ValueError for a part that no command moves."""
    moved = {part.moves for part in robot.action if part.moves and (part.kind != "binary" or part.sets)}
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"proprioception is {names!r}; expected a list of parts of the state, of {sorted(moved)}")
    if unknown := [name for name in names if name not in moved]:
        raise ValueError(f"proprioception names {', '.join(unknown)}; it follows from what commands do, and those of "
                         f"embodiment '{robot.name}' move {', '.join(sorted(moved)) or 'nothing that it says'}: mend "
                         f"the names, or the embodiment's `moves` and `sets`")  # fmt: skip
    return [entry for part in robot.state if part.name in names for entry in range(part.start, part.stop)]


def _encoder(config: dict[str, Any], path: Path) -> nn.Module:
    arguments = dict(config)
    module, _, name = arguments.pop("_target_").rpartition(".")
    if not f"{module}.".startswith(ALLOWED):
        raise ValueError(f"{path}/config.json names the encoder {module}.{name}; only classes of {ALLOWED[:-1]} are "
                         f"loaded: a name in a checkpoint is code")  # fmt: skip
    return getattr(importlib.import_module(module), name)(**arguments)
