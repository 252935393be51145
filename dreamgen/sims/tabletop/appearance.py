"""How the tabletop looks, as data: "target robot", "other robots" and "new scenes" are configurations.

Colours are RGB in [0, 1]. Block colours stay recognisable as red, green and blue and vary in shade. No drawn robot
ever looks like a named one, so a model that was trained on drawn appearances has never seen the target robot.
"""

import colorsys
import math
from dataclasses import dataclass, replace

import mujoco
import numpy as np

from dreamgen.sims.renderer import free_camera

Colour = tuple[float, float, float]
APART = 0.45  # least RGB distance between the arm of a drawn and of a named robot
ARM = ("right_arm_base_link", "head", *(f"right_l{i}" for i in range(7)))
VIEWS = {  # cameras that stand still: lookat (m), distance (m), azimuth and elevation (degrees)
    "front": ((0.035, 0.63, 0.045), 1.3, 0.0, -48.0),
    "side": ((0.035, 0.63, 0.045), 1.3, -62.0, -38.0),
}
FOVY = 23.5


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """Colours, light and camera pose of one tabletop.

    light: brightness of the lamps and of the surroundings, 1 is normal. camera: what is added to the pose of the
    standing cameras: look-at point x y z (m), distance (m), azimuth, elevation (degrees).
    """

    name: str
    arm: Colour
    hand: Colour
    fingers: Colour
    table: Colour
    floor: Colour
    cabinet: Colour
    tray: Colour
    handle: Colour
    plate: Colour
    button: Colour
    button_base: Colour
    red: Colour = (0.86, 0.08, 0.08)
    green: Colour = (0.06, 0.66, 0.16)
    blue: Colour = (0.08, 0.22, 0.90)
    light: float = 1.0
    camera: tuple[float, ...] = (0.0,) * 6

    @classmethod
    def named(cls, name: str) -> "Appearance":
        """A fixed look. Raises ValueError with the known names."""
        for look in NAMED:
            if look.name == name:
                return look
        raise ValueError(f"no appearance is called '{name}'; expected one of {[look.name for look in NAMED]}, or "
                         f"'random' (drawn for each episode), or an integer (drawn once from it)")  # fmt: skip

    @classmethod
    def drawn(cls, seed: int) -> "Appearance":
        """A look drawn from a seed, whose robot is never close to a named one."""
        rng = np.random.default_rng(seed)
        while True:
            look = cls(name=f"drawn-{seed}", **_draw(rng))
            things = (look.table, look.cabinet, look.tray, look.arm, look.fingers, look.plate)
            blocks = (look.red, look.green, look.blue)
            seen = min(_apart(block, thing) for block in blocks for thing in things) > 0.42
            clear = min(_apart(look.table, c) for c in (look.fingers, look.plate, look.handle, look.arm)) > 0.32
            clear = clear and _apart(look.tray, look.table) > 0.2 and _apart(look.button, look.button_base) > 0.3
            if seen and clear and min(look.distance(other) for other in NAMED) > APART:
                return look

    def distance(self, other: "Appearance") -> float:
        """How different two robots look: the RGB distance of their arms."""
        return _apart(self.arm, other.arm)

    def apply(self, model: mujoco.MjModel) -> None:
        """Recolour a compiled tabletop in place; cheap, nothing is compiled again."""
        for name in ("red", "green", "blue", "table", "floor", "cabinet", "tray", "handle", "plate", "button",
                     "button_base"):  # fmt: skip
            model.mat(name).rgba[:3] = getattr(self, name)
        for geom in range(model.ngeom):
            body = model.body(model.geom_bodyid[geom]).name
            if model.geom_rgba[geom, 3] > 0:
                if body in ARM:
                    model.geom_rgba[geom, :3] = self.arm
                elif body == "right_hand" or model.geom(geom).name == "rail":
                    model.geom_rgba[geom, :3] = self.hand
                elif body in ("leftpad", "rightpad"):
                    model.geom_rgba[geom, :3] = self.fingers
        model.vis.headlight.ambient[:] = 0.35 * self.light
        model.vis.headlight.diffuse[:] = 0.3 * self.light
        for lamp, strength in (("key", 0.45), ("fill", 0.2)):
            model.light(lamp).diffuse[:] = strength * self.light
        model.vis.global_.fovy = FOVY

    def view(self, name: str) -> mujoco.MjvCamera | str:
        """The camera of that name: "front" and "side" stand still, "wrist" rides on the hand."""
        if name == "wrist":
            return name
        if name not in VIEWS:
            raise ValueError(f"the tabletop has no camera '{name}'; it has {[*VIEWS, 'wrist']}")
        lookat, distance, azimuth, elevation = VIEWS[name]
        x, y, z, away, left, up = self.camera
        return free_camera(lookat=(lookat[0] + x, lookat[1] + y, lookat[2] + z), distance=distance + away,
                           azimuth=azimuth + left, elevation=elevation + up)  # fmt: skip


def _apart(a: Colour, b: Colour) -> float:
    return math.dist(a, b)


# lowest and highest hue, saturation and value of what is drawn
SHADES = {
    "arm": ((0.0, 1.0), (0.0, 0.9), (0.1, 0.95)),
    "hand": ((0.0, 1.0), (0.0, 0.5), (0.05, 0.9)),
    "fingers": ((0.0, 1.0), (0.0, 0.9), (0.05, 1.0)),
    "table": ((0.0, 1.0), (0.0, 0.35), (0.25, 0.95)),
    "floor": ((0.0, 1.0), (0.0, 0.4), (0.1, 0.8)),
    "cabinet": ((0.0, 1.0), (0.0, 0.7), (0.15, 0.9)),
    "tray": ((0.0, 1.0), (0.0, 0.7), (0.15, 0.95)),
    "handle": ((0.0, 1.0), (0.0, 0.6), (0.05, 1.0)),
    "plate": ((0.0, 1.0), (0.0, 0.8), (0.2, 1.0)),
    "button": ((0.0, 1.0), (0.4, 1.0), (0.5, 1.0)),
    "button_base": ((0.0, 1.0), (0.0, 0.4), (0.05, 0.9)),
    "red": ((-0.02, 0.02), (0.85, 1.0), (0.65, 0.95)),
    "green": ((0.32, 0.40), (0.75, 1.0), (0.45, 0.8)),
    "blue": ((0.60, 0.66), (0.8, 1.0), (0.65, 1.0)),
}
POSE = (0.012, 0.012, 0.008, 0.03, 7.0, 4.0)  # largest change of the camera


def _draw(rng: np.random.Generator) -> dict:
    shares = iter(rng.random(len(POSE) + 3 * len(SHADES) + 1).tolist())
    camera = tuple(round((2 * next(shares) - 1) * most, 5) for most in POSE)
    colours = {}
    for name, ranges in SHADES.items():
        hue, saturation, value = (low + (high - low) * next(shares) for low, high in ranges)
        colours[name] = tuple(round(c, 4) for c in colorsys.hsv_to_rgb(hue % 1, saturation, value))
    return {**colours, "light": round(0.8 + 0.3 * next(shares), 4), "camera": camera}


TARGET = Appearance(
    name="target",
    arm=(0.46, 0.20, 0.58),
    hand=(0.20, 0.14, 0.24),
    fingers=(0.98, 0.62, 0.08),
    table=(0.78, 0.74, 0.66),
    floor=(0.35, 0.37, 0.40),
    cabinet=(0.45, 0.33, 0.24),
    tray=(0.66, 0.50, 0.36),
    handle=(0.12, 0.12, 0.13),
    plate=(0.97, 0.95, 0.55),
    button=(0.93, 0.30, 0.72),
    button_base=(0.22, 0.24, 0.27),
)
NAMED = (
    TARGET,
    replace(  # the same robot, camera and blocks in another room
        TARGET,
        name="elsewhere",
        table=(0.33, 0.36, 0.33),
        floor=(0.62, 0.52, 0.40),
        cabinet=(0.62, 0.66, 0.72),
        tray=(0.76, 0.73, 0.62),
        handle=(0.88, 0.88, 0.86),
        plate=(0.80, 0.90, 0.97),
        button=(0.99, 0.86, 0.20),
        button_base=(0.52, 0.50, 0.54),
        light=0.92,
    ),
)
