"""The tabletop behind the Sim protocol: 20 Hz control, one action held over four simulator steps of 12.5 ms.

A reset restores one settled state of the arm and then places the objects, so an episode depends on (instruction,
seed) alone, to the bit, and never on what was simulated before.
"""

from collections.abc import Iterator

import mujoco
import numpy as np

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.sims.renderer import Renderer
from dreamgen.sims.tabletop import scene, tasks
from dreamgen.sims.tabletop.appearance import Appearance
from dreamgen.sims.tabletop.experts import Expert

HOLD, SUBSTEPS = 4, 5  # simulator steps in a control step; MuJoCo steps of 2.5 ms in a simulator step
DOWN = (1.0, 0.0, 1.0, 0.0)  # the hand's orientation: fingers down, opening along y
STATE = mujoco.mjtState.mjSTATE_INTEGRATION


class Tabletop:
    """The simulated tabletop.

    robot: the embodiment; its views name cameras ("front", "side", "wrist"), their sizes are the picture sizes.
    appearance: a name ("target"), an integer (drawn once from it), or "random" (drawn from each episode's seed).
    instructions: a subset of the 14, by default all.

    Raises ValueError for an unknown appearance, instruction or camera, or an embodiment of another width or rate.
    """

    name = "tabletop"

    def __init__(self, *, robot: Embodiment, appearance: str | int = "target",
                 instructions: list[str] | None = None) -> None:  # fmt: skip
        if (robot.action_dim, robot.state_dim, robot.rate) != (4, 4, 20):
            raise ValueError(f"the tabletop needs 4 action and 4 state entries at 20 Hz; embodiment '{robot.name}' has "
                             f"{robot.action_dim} and {robot.state_dim} at {robot.robot_hz} Hz. Use "
                             f"embodiment=tabletop or tabletop_two_views; a robot of your own has sim=none, and first "
                             f"frames by prompts=dataset or prompts=pictures.")  # fmt: skip
        self.robot = robot
        self.instructions = tuple(tasks.named(text).text for text in (instructions or tasks.TASKS))
        self.random = appearance == "random"
        self.appearance = Appearance.drawn(0) if self.random else (
            Appearance.drawn(appearance) if isinstance(appearance, int) else Appearance.named(appearance))  # fmt: skip
        for view in robot.views:
            self.appearance.view(view.name)
        self.model = scene.build()
        self.data = mujoco.MjData(self.model)
        self.appearance.apply(self.model)
        self._renderers: dict[tuple[int, int], Renderer] = {}
        self._settled = self._settle()
        self.task = tasks.named(self.instructions[0])
        self.done = False

    def _settle(self) -> np.ndarray:
        """The arm at rest at the start pose, as MuJoCo's full integration state."""
        mujoco.mj_resetData(self.model, self.data)
        for k, colour in enumerate(scene.COLOURS):
            self.data.joint(f"{colour}_free").qpos[:3] = [-0.1, 0.45 + 0.12 * k, scene.BLOCK]
        self.data.mocap_pos[0], self.data.mocap_quat[0] = scene.HAND_START, DOWN
        self.data.ctrl[:] = -1, 1
        for _ in range(100 * SUBSTEPS):
            mujoco.mj_step(self.model, self.data)
        settled = np.empty(mujoco.mj_stateSize(self.model, STATE))
        mujoco.mj_getState(self.model, self.data, settled, STATE)
        return settled

    def reset(self, instruction: str, seed: int, *, scene_of: str | None = None) -> None:
        """Begin an episode. scene_of: lay the scene out as for that instruction (counterfactuals: one first state)."""
        self.task = tasks.named(instruction)
        if self.random:
            self.appearance = Appearance.drawn(seed_for(seed, "appearance"))
            self.appearance.apply(self.model)
        blocks, plate, drawer, hand = tasks.layout(tasks.named(scene_of or instruction), rng_for(seed, "tabletop"))
        model, data = self.model, self.data
        mujoco.mj_resetData(model, data)
        model.geom("plate").pos[:2] = plate
        mujoco.mj_setState(model, data, self._settled, STATE)
        for colour, spot in blocks.items():
            joint = data.joint(f"{colour}_free")
            joint.qpos[:], joint.qvel[:] = [*spot, scene.BLOCK, 1, 0, 0, 0], 0
        data.joint("tray").qpos[:] = drawer
        for share in np.linspace(0, 1, 10):
            data.mocap_pos[0] = scene.HAND_START + share * (hand - scene.HAND_START)
            self._simulate()
        for _ in range(10):
            self._simulate()
        self.plate, self.done = plate, False
        self.start = {colour: self.block(colour) for colour in scene.COLOURS}
        self._highest = {colour: 0.0 for colour in scene.COLOURS}
        self._held = {colour: 0 for colour in scene.COLOURS}
        self._drawer_at_start = float(data.joint("tray").qpos[0])

    def _simulate(self) -> None:
        for _ in range(SUBSTEPS):
            mujoco.mj_step(self.model, self.data)

    def step(self, action: np.ndarray) -> bool:
        """Execute one action (4,) in [-1, 1] (clipped); True once the instruction has been fulfilled."""
        action = np.clip(np.asarray(action, np.float64), -1, 1)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"a tabletop action has 4 finite entries, got {action}")
        self.data.ctrl[:] = action[3], -action[3]
        for _ in range(HOLD):
            target = self.data.mocap_pos[0] + action[:3] * (scene.STEP / HOLD)
            self.data.mocap_pos[0] = np.clip(target, scene.HAND_LOW, scene.HAND_HIGH)
            self._simulate()
        mujoco.mj_kinematics(self.model, self.data)
        facts = self._facts()
        self.done = self.done or bool(self.task.fulfilled(facts))
        return self.done

    def _facts(self) -> tasks.Facts:
        blocks, opening = {colour: self.block(colour) for colour in scene.COLOURS}, self.opening
        for colour, p in blocks.items():
            self._highest[colour] = max(self._highest[colour], float(p[2]))
            above = p[2] > tasks.HIGH and np.linalg.norm((p - self.start[colour])[:2]) < 0.06
            self._held[colour] = self._held[colour] + 1 if above and opening < tasks.OPEN else 0
        return tasks.Facts(blocks=blocks, start=self.start, highest=self._highest, held=self._held, plate=self.plate,
                           tray=self.tray, drawer=float(self.data.joint("tray").qpos[0]),
                           drawer_at_start=self._drawer_at_start, button=float(self.data.joint("button").qpos[0]),
                           opening=opening)  # fmt: skip

    def block(self, colour: str) -> np.ndarray:
        """Middle of a block (3,), m."""
        return self.data.body(colour).xpos.copy()

    @property
    def commanded(self) -> np.ndarray:
        """The pose that the hand follows (3,), m."""
        return self.data.mocap_pos[0].copy()

    @property
    def tray(self) -> np.ndarray:
        """Middle of the drawer's tray (x, y), m."""
        return self.data.body("tray").xpos[:2].copy()

    @property
    def handle(self) -> np.ndarray:
        """Middle of the drawer's bar (3,), m."""
        return self.data.geom("handle").xpos.copy()

    @property
    def opening(self) -> float:
        """How far the gripper is open, 0 (closed) to 1."""
        apart = np.linalg.norm(self.data.body("leftclaw").xpos - self.data.body("rightclaw").xpos)
        shut = 2 * (scene.FINGER - scene.FINGER_TRAVEL)
        return float(np.clip((apart - shut) / (2 * scene.FINGER_TRAVEL), 0, 1))

    def state(self) -> np.ndarray:
        """Hand position (m) and gripper opening, (4,) float32."""
        return np.array([*self.data.body("hand").xpos, self.opening], np.float32)

    def objects(self) -> dict[str, np.ndarray]:
        """Where things are (3,), m: the blocks, the drawer's tray, the button's top (it moves along z) and the hand."""
        found = {colour: self.block(colour) for colour in scene.COLOURS}
        button = self.data.body("button").xpos + [0, 0, scene.BUTTON_TOP]
        hand = self.data.body("hand").xpos.copy()
        return found | {"tray": np.array([*self.tray, 0.0]), "button": button, "hand": hand}

    def observe(self) -> Observation:
        """All views of the embodiment, the state and the instruction."""
        views = {}
        for view in self.robot.views:
            size = (view.height, view.width)
            if size not in self._renderers:
                self._renderers[size] = Renderer(self.model, *size)
            views[view.name] = self._renderers[size].draw(self.data, self.appearance.view(view.name))
        return Observation(views=views, state=self.state(), instruction=self.task.text)

    def expert(self, instruction: str | None = None) -> Iterator[np.ndarray]:
        """Actions (4,) of the scripted expert of the current (or another) instruction, one per step, without end."""
        return Expert(self, tasks.named(instruction) if instruction else self.task).actions()

    def close(self) -> None:
        """Free the drawing contexts."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
