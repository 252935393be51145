"""Numbers of unit size for networks, and back: z = (x - offset) / scale, x = z * scale + offset, per entry.

    standard   offset = mean, scale = standard deviation
    quantile   offset = (q99 + q01) / 2, scale = (q99 - q01) / 2: most values land in [-1, 1], nothing is cut off

The two commands of a binary part with limits become -1 and 1, one without limits stays as it is, whatever the values.
An entry that does not vary has the scale 0: z = x - offset, and back comes the offset, whatever a network says of it.
The two vectors are buffers, so they lie inside the checkpoint.

A rotation has many tellings (angles wrap, quaternions have two signs). Networks see the one whose entries are nearest
to the offset, which does not jump where most rotations lie; back come angles within half a turn and unit quaternions,
of the sign of the data.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from dreamgen.core import rotations
from dreamgen.core.embodiment import Part
from dreamgen.data.turn_checks import OFTEN, at_pole

log = logging.getLogger(__name__)
Values = TypeVar("Values", np.ndarray, torch.Tensor)


class Normaliser(nn.Module):
    """The identity on vectors of `width` entries until fitted or loaded. All arrays are (... width). parts: of the
    vector, as far as they are rotations."""

    offset: Float[torch.Tensor, " d"]
    scale: Float[torch.Tensor, " d"]

    def __init__(self, width: int, parts: Sequence[Part] = ()) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.know(parts)

    def know(self, parts: Sequence[Part]) -> None:
        """What the entries are."""
        self.rotations = tuple(part for part in parts if part.rotation)

    @classmethod
    def fit(
        cls,
        values: Float[np.ndarray, "n d"],
        parts: Sequence[Part] = (),
        *,
        rule: Literal["standard", "quantile"] = "standard",
        floor: float = 1e-5,
    ) -> "Normaliser":
        """The normaliser of `values`; an entry whose scale is below `floor` counts as constant.

        Raises ValueError for an unknown rule, for no values, for values that are not finite, and for a width that
        is not that of the parts.
        """
        if rule not in ("standard", "quantile"):
            raise ValueError(f"rule is '{rule}'; expected 'standard' or 'quantile'")
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
            raise ValueError(f"cannot normalise by values of shape {values.shape}; expected (n d), n > 0, all finite")
        if parts and parts[-1].stop != values.shape[1]:
            raise ValueError(f"values are {values.shape[1]} wide, the parts of the embodiment {parts[-1].stop}")
        for part in parts:
            if (share := at_pole(part, values[:, part.slice])) > OFTEN:
                log.warning("'%s' is told by euler angles whose second is near a quarter turn in %.0f%% of its rows; "
                            "there the others jump, and networks read them badly: tell it as rot6d or a quaternion",
                            part.name, 100 * share)  # fmt: skip
        (values,) = rotations.straightened(parts, [values])
        if rule == "standard":
            offset, scale = values.mean(0), values.std(0)
        else:
            low, high = np.quantile(values, (0.01, 0.99), axis=0)
            offset, scale = (high + low) / 2, (high - low) / 2
            # mostly at rest: the quantiles coincide though the entry moves
            scale = np.where(scale < floor, values.std(0), scale)
        for part in parts:
            if part.kind == "binary":
                low, high = part.limits or (-1.0, 1.0)
                offset[part.slice], scale[part.slice] = (low + high) / 2, (high - low) / 2
        scale = np.where(scale < floor, 0.0, scale)
        self = cls(values.shape[1], parts)
        self.offset.copy_(torch.from_numpy(offset))
        self.scale.copy_(torch.from_numpy(scale))
        return self

    def normalise(self, values: Values) -> Values:
        """Units of the embodiment to unit size; numpy to numpy, torch to torch."""
        offset, scale = self._like(values)
        values = self._each(values, lambda part, told: rotations.nearest(part, told, offset[part.slice]))
        return (values - offset) / (scale + (scale == 0))

    def denormalise(self, values: Values) -> Values:
        """Unit size to units of the embodiment; numpy to numpy, torch to torch."""
        offset, scale = self._like(values)
        values = values * scale + offset
        return self._each(values, _whole)

    def _each(self, values: Values, change: Callable[[Part, Values], Values]) -> Values:
        """Values whose rotations are told otherwise."""
        if not self.rotations:
            return values
        made = values.clone() if isinstance(values, torch.Tensor) else values.copy()
        for part in self.rotations:
            made[..., part.slice] = change(part, values[..., part.slice])
        return made

    def _like(self, values: np.ndarray | torch.Tensor) -> tuple[Any, Any]:
        width = self.offset.shape[0]
        if values.shape[-1] != width:
            raise ValueError(f"values are {values.shape[-1]} wide; this normaliser is for {width}")
        if isinstance(values, np.ndarray):
            return self.offset.cpu().numpy(), self.scale.cpu().numpy()
        return self.offset.to(values), self.scale.to(values)


def _whole(part: Part, values: Values) -> Values:
    """Entries as a rotation has them, of numbers that need not be those of one."""
    told = rotations.tell(part, rotations.read(part, values))
    return rotations.nearest(part, told, values) if part.width == 4 else told
