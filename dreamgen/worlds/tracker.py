"""Where are the objects and the gripper in a picture? A small network trained on the simulator's truth.

Convolutions end in K maps; each is read as the point where it is brightest on average (soft arg-max, arXiv:1504.00702)
and its strength, and a linear readout turns 3 K numbers into metres. It measures dreams, it never takes part in them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import read_json, replacing, write_json
from dreamgen.data.normaliser import Normaliser

SHARP = 8.0  # fresh maps are nearly flat: without it the point is the middle of the picture for a long time


class KeypointTracker(nn.Module):
    """names: of what is tracked, 3 coordinates (m) each. channels: of the convolutions; keypoints: K."""

    def __init__(self, *, robot: Embodiment, names: Sequence[str], channels: Sequence[int] = (32, 48, 64),
                 keypoints: int = 32, width: int = 128) -> None:  # fmt: skip
        super().__init__()
        self.robot, self.names = robot, tuple(names)
        self.config = {"channels": list(channels), "keypoints": keypoints, "width": width}
        layers, before = [], 5
        for k, count in enumerate(channels):
            layers += [nn.Conv2d(before, count, 3, 2 if k == 0 else 1, 1), nn.GroupNorm(1, count), nn.SiLU()]
            before = count
        self.trunk = nn.Sequential(*layers, nn.Conv2d(before, keypoints, 1))
        self.read = nn.Sequential(nn.Linear(3 * keypoints, width), nn.SiLU(), nn.Linear(width, 3 * len(self.names)))
        self.normaliser = Normaliser(3 * len(self.names))

    def forward(self, frames: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b n"]:
        """Normalised coordinates."""
        x = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
        b, _, h, w = x.shape
        ys = torch.linspace(-1, 1, h, device=x.device).view(1, 1, h, 1).expand(b, 1, h, w)
        xs = torch.linspace(-1, 1, w, device=x.device).view(1, 1, 1, w).expand(b, 1, h, w)
        maps = self.trunk(torch.cat([x, ys, xs], 1))
        h, w = maps.shape[2:]
        weight = (SHARP * maps.flatten(2)).softmax(-1)
        y = torch.linspace(-1, 1, h, device=x.device).repeat_interleave(w)
        z = torch.linspace(-1, 1, w, device=x.device).repeat(h)
        strength = (weight * maps.flatten(2)).sum(-1)
        return self.read(torch.cat([(weight * y).sum(-1), (weight * z).sum(-1), torch.tanh(strength / 10)], -1))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean square error of normalised coordinates; batch: frames (b h w 3), truth (b 3n) in m."""
        error = self(batch["frames"]) - self.normaliser.normalise(batch["truth"])
        return error.square().mean(), {}

    @torch.no_grad()
    def track(self, frames: UInt8[np.ndarray, "t h w 3"], batch_size: int = 256) -> Float[np.ndarray, "t n 3"]:
        """Positions (m) of everything in every frame. ValueError for frames of another size than the canvas."""
        if frames.shape[1:] != (*self.robot.canvas, 3):
            raise ValueError(f"frames are {frames.shape[1:]}; the tracker of '{self.robot.name}' reads "
                             f"{(*self.robot.canvas, 3)}")  # fmt: skip
        device = self.normaliser.offset.device
        parts = [self.normaliser.denormalise(self(torch.from_numpy(np.ascontiguousarray(part)).to(device))).cpu()
                 for part in np.array_split(frames, -(-len(frames) // batch_size))]  # fmt: skip
        return torch.cat(parts).numpy().reshape(len(frames), len(self.names), 3)

    def save(self, path: Path) -> None:
        """tracker.json and tracker.safetensors."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with replacing(path / "tracker.safetensors") as temporary:
            save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, temporary)
        write_json(path / "tracker.json", {"names": list(self.names), "contract": self.robot.contract(), **self.config})

    @classmethod
    def load(cls, path: Path | str, *, robot: Embodiment | None = None) -> "KeypointTracker":
        """What `save` wrote. ValueError for a tracker of another robot."""
        saved = read_json(Path(path) / "tracker.json")
        contract = saved.pop("contract")
        if robot is not None:
            robot.require(contract, f"the tracker {path}")
        self = cls(robot=robot or Embodiment.from_contract(contract), **saved)
        self.load_state_dict(load_file(Path(path) / "tracker.safetensors"))
        return self.eval().requires_grad_(False)
