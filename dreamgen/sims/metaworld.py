"""The 50 stock Meta-World tasks and their shipped experts behind the Sim protocol: a pool of other behaviours.

Control, state and action are those of the tabletop (20 Hz, one action held over four 80 Hz steps), so one embodiment
serves both. Only the environment of the current task is kept: ask for the episodes of a task in a row.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.sims.renderer import Renderer, free_camera
from dreamgen.sims.tabletop.appearance import ARM, Appearance
from dreamgen.sims.tabletop.scene import HIDDEN, UNSEEN
from dreamgen.sims.tabletop.sim import HOLD

INSTRUCTIONS = {
    "put the ring on the peg": "assembly-v3",
    "throw the ball into the basket": "basketball-v3",
    "move the puck into the other bin": "bin-picking-v3",
    "put the lid on the box": "box-close-v3",
    "press the button from above": "button-press-topdown-v3",
    "press the button from above over the wall": "button-press-topdown-wall-v3",
    "press the button from the front": "button-press-v3",
    "press the button behind the wall": "button-press-wall-v3",
    "press the button of the coffee machine": "coffee-button-v3",
    "pull the mug away from the coffee machine": "coffee-pull-v3",
    "push the mug under the coffee machine": "coffee-push-v3",
    "turn the dial": "dial-turn-v3",
    "take the ring off the peg": "disassemble-v3",
    "close the door": "door-close-v3",
    "lock the door": "door-lock-v3",
    "open the door": "door-open-v3",
    "unlock the door": "door-unlock-v3",
    "put the hand into the hole": "hand-insert-v3",
    "close the green drawer": "drawer-close-v3",
    "open the green drawer": "drawer-open-v3",
    "open the faucet": "faucet-open-v3",
    "close the faucet": "faucet-close-v3",
    "hit the nail with the hammer": "hammer-v3",
    "press the handle down from the side": "handle-press-side-v3",
    "press the handle down": "handle-press-v3",
    "pull the handle up from the side": "handle-pull-side-v3",
    "pull the handle up": "handle-pull-v3",
    "pull the lever up": "lever-pull-v3",
    "insert the peg into the hole from the side": "peg-insert-side-v3",
    "lift the puck over the wall": "pick-place-wall-v3",
    "pick the puck out of the hole": "pick-out-of-hole-v3",
    "move the hand to the goal": "reach-v3",
    "push the puck back": "push-back-v3",
    "push the puck to the goal": "push-v3",
    "carry the puck to the goal": "pick-place-v3",
    "slide the plate into the net": "plate-slide-v3",
    "slide the plate sideways into the net": "plate-slide-side-v3",
    "slide the plate back out of the net": "plate-slide-back-v3",
    "slide the plate sideways out of the net": "plate-slide-back-side-v3",
    "unplug the peg from the side": "peg-unplug-side-v3",
    "kick the ball into the goal": "soccer-v3",
    "push the thermos with the stick": "stick-push-v3",
    "pull the thermos with the stick": "stick-pull-v3",
    "push the puck around the wall": "push-wall-v3",
    "move the hand over the wall": "reach-wall-v3",
    "put the block on the shelf": "shelf-place-v3",
    "sweep the block into the hole": "sweep-into-v3",
    "sweep the block off the table": "sweep-v3",
    "open the window": "window-open-v3",
    "close the window": "window-close-v3",
}
# the shipped experts warn at every step that their actions are clipped, gymnasium about float precision
warnings.filterwarnings("ignore", module=r"(metaworld|gymnasium)\.")
LOOKAT, DISTANCE, AZIMUTH, ELEVATION, FOVY = (0.03, 0.68, 0.08), 1.4, 0.0, -42.0, 31.0


class MetaWorld:
    """Stock Meta-World tasks.

    robot: an embodiment of the tabletop's width and rate; cameras "front" and "side" (its wrist camera is Meta-World's
    "gripperPOV"). appearance: "random" (drawn for each episode), an integer (drawn once), or "stock".
    instructions: a subset of INSTRUCTIONS, by default all.
    """

    name = "metaworld"

    def __init__(self, *, robot: Embodiment, appearance: str | int = "random",
                 instructions: list[str] | None = None) -> None:  # fmt: skip
        if (robot.action_dim, robot.state_dim, robot.rate) != (4, 4, 20):
            raise ValueError(f"Meta-World needs 4 action and 4 state entries at 20 Hz; embodiment '{robot.name}' has "
                             f"{robot.action_dim} and {robot.state_dim} at {robot.robot_hz} Hz. Use "
                             f"embodiment=tabletop or tabletop_two_views.")  # fmt: skip
        unknown = sorted(set(instructions or ()) - set(INSTRUCTIONS))
        if unknown:
            raise ValueError(f"Meta-World does not know {unknown}; it knows: " + "; ".join(INSTRUCTIONS))
        if not isinstance(appearance, int) and appearance not in ("random", "stock"):
            raise ValueError(f"Meta-World's appearance is 'random', 'stock' or an integer, got {appearance!r}")
        self.robot, self.how = robot, appearance
        self.instructions = tuple(instructions or INSTRUCTIONS)
        self.look: Appearance | None = None
        self._env: Any = None
        self._renderers: dict[tuple[int, int], Renderer] = {}
        self.instruction, self.done = "", False

    def _make(self, instruction: str) -> Any:
        """The environment of one task, without its random task set, fully observable, never truncated."""
        try:
            from metaworld.env_dict import ENV_CLS_MAP
        except ImportError as error:
            raise ValueError("Meta-World is not installed: pip install -e '.[sim]' in dreamgen's folder") from error
        env = ENV_CLS_MAP[INSTRUCTIONS[instruction]]()
        env.seeded_rand_vec, env._freeze_rand_vec = True, False
        env._set_task_called, env._partially_observable = True, False
        env.__dict__.pop("sawyer_observation_space", None)
        env.max_path_length = 10**9
        model = env.model
        for name in UNSEEN:
            model.geom_group[model.geom_bodyid == model.body(name).id] = HIDDEN
        self._colours = model.geom_rgba.copy(), model.mat_rgba.copy()
        return env

    def reset(self, instruction: str, seed: int) -> None:
        """Begin an episode; the same (instruction, seed) gives the same first state, to the bit."""
        if instruction not in INSTRUCTIONS:
            raise ValueError(f"Meta-World does not know the instruction {instruction!r}; it knows: "
                             + "; ".join(INSTRUCTIONS))  # fmt: skip
        if instruction != self.instruction:
            self.close()
            self._env, self.instruction = self._make(instruction), instruction
        self._env.seed(seed_for(seed, "metaworld") % 2**31)
        self._observation, _ = self._env.reset()
        self.done = False
        self._recolour(seed)

    def _recolour(self, seed: int) -> None:
        if self.how == "stock":
            self.look = None
            return
        self.look = Appearance.drawn(seed_for(seed, "appearance") if self.how == "random" else int(self.how))
        model, look = self._env.model, self.look
        model.geom_rgba[:], model.mat_rgba[:] = self._colours
        for geom in np.flatnonzero(model.geom_rgba[:, 3] > 0):
            body = model.body(model.geom_bodyid[geom]).name
            if body in ARM:
                model.geom_rgba[geom, :3] = look.arm
            elif body == "right_hand" or model.geom(geom).name == "rail":
                model.geom_rgba[geom, :3] = look.hand
            elif body in ("leftpad", "rightpad", "leftclaw", "rightclaw"):
                model.geom_rgba[geom, :3] = look.fingers
        for name, colour in (("table_wood", look.table), ("basic_floor", look.floor)):
            model.mat(name).rgba[:3] = np.minimum(1.0, 1.3 * np.asarray(colour))  # multiplies a texture
        rng = rng_for(seed if self.how == "random" else int(self.how), "objects")
        for material in range(model.nmat):  # what is not arm, table or floor keeps its hue and varies in shade
            if model.mat(material).name not in ("table_wood", "basic_floor"):
                model.mat_rgba[material, :3] = np.clip(model.mat_rgba[material, :3] * rng.uniform(0.6, 1.25, 3), 0, 1)
        model.vis.headlight.ambient[:] = 0.4 * look.light

    def step(self, action: np.ndarray) -> bool:
        """Execute one action (4,) in [-1, 1] (clipped); True once the task has been fulfilled."""
        action = np.clip(np.asarray(action, np.float32), -1, 1)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"a Meta-World action has 4 finite entries, got {action}")
        for _ in range(HOLD):
            self._observation, _, _, _, info = self._env.step(action)
            self.done = self.done or info["success"] > 0.5
        return self.done

    def state(self) -> np.ndarray:
        """Hand position (m) and gripper opening in [0, 1], (4,) float32."""
        return np.asarray(self._observation[:4], np.float32)

    def observe(self) -> Observation:
        """All views of the embodiment, the state and the instruction."""
        views = {}
        for view in self.robot.views:
            size = (view.height, view.width)
            if size not in self._renderers:
                self._renderers[size] = Renderer(self._env.model, *size)
            views[view.name] = self._renderers[size].draw(self._env.data, self._camera(view.name))
        return Observation(views=views, state=self.state(), instruction=self.instruction)

    def _camera(self, name: str) -> mujoco.MjvCamera | str:
        if name == "wrist":
            return "gripperPOV"
        if name not in ("front", "side"):
            raise ValueError(f"Meta-World has no camera '{name}'; it has front, side and wrist")
        self._env.model.vis.global_.fovy = FOVY
        x, y, z, away, left, up = self.look.camera if self.look else (0.0,) * 6
        azimuth = AZIMUTH + (60 if name == "side" else 0) + 2 * left
        return free_camera(lookat=(LOOKAT[0] + x, LOOKAT[1] + y, LOOKAT[2] + z), distance=DISTANCE + away,
                           azimuth=azimuth, elevation=ELEVATION + up)  # fmt: skip

    def expert(self) -> Iterator[np.ndarray]:
        """Actions (4,) of the shipped expert, one per step, without end; it holds still after success."""
        from metaworld.policies import ENV_POLICY_MAP

        policy = ENV_POLICY_MAP[INSTRUCTIONS[self.instruction]]()
        grip = -1.0
        while not self.done:
            action = np.clip(policy.get_action(self._observation), -1, 1).astype(np.float32)
            grip = float(action[3])
            yield action
        while True:
            yield np.array([0, 0, 0, grip], np.float32)

    def close(self) -> None:
        """Free the drawing contexts and the environment."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        if self._env is not None:
            self._env.close()
            self._env, self.instruction = None, ""
