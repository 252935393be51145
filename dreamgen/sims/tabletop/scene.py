"""The tabletop: a Sawyer arm, a drawer, a button, a plate and three blocks, compiled into one MuJoCo model.

The arm's XML and meshes are read from the installed `metaworld` package; everything else is made of primitives here.
x points away from the camera, y away from the robot's base, z up; metres. The table's top is z = 0.
"""

import copy
import functools
import os
import tempfile
from pathlib import Path

import mujoco
import numpy as np

COLOURS = ("red", "green", "blue")
BLOCK = 0.0275  # half an edge
FINGER = 0.065  # open fingers stand this far from the hand's middle, along y
FINGER_TRAVEL = 0.052
TIP = 0.045  # the fingertips are this far below the hand
PLATE_RADIUS = 0.06
STEP = 0.04  # an action of 1 moves the hand this far in one control step (m)
HAND_LOW, HAND_HIGH = np.array([-0.26, 0.36, 0.05]), np.array([0.24, 0.86, 0.26])
HAND_START = np.array([-0.08, 0.6, 0.17])
DRAWER = np.array([0.13, 0.81])  # middle of the closed tray
DRAWER_TRAVEL = 0.13
TRAY = np.array([0.08, 0.07])  # half its width and depth
HANDLE = 0.137  # the bar is this far in front of the tray's middle
HANDLE_HEIGHT = 0.045
UNSEEN = ("controller_box", "pedestal_feet", "torso", "pedestal", "right_arm_base_link", "right_l0", "head", "right_l1")
HIDDEN = 3  # a geom group that is not drawn
BUTTON = np.array([0.14, 0.42])
BUTTON_TOP, BUTTON_TRAVEL = 0.085, 0.025

_BLOCK = """<body name="{c}" pos="{x} .5 .0275"><freejoint name="{c}_free"/>
  <inertial pos="0 0 0" mass=".2" diaginertia="1.01e-4 1.01e-4 1.01e-4"/>
  <geom name="{c}" type="box" size=".0275 .0275 .0275" friction="1 .1 .002" condim="4"
   solimp=".99 .99 .01" solref=".01 1" material="{c}"/></body>"""

_XML = f"""<mujoco model="tabletop">
<include file="../objects/assets/xyz_base_dependencies.xml"/>
<option timestep=".0025" iterations="50" tolerance="1e-10" solver="Newton" jacobian="dense" cone="elliptic"/>
<visual><map znear=".02" zfar="10"/><headlight ambient=".35 .35 .35" diffuse=".3 .3 .3" specular="0 0 0"/></visual>
<asset>
  <texture type="skybox" builtin="flat" rgb1=".5 .5 .5" rgb2=".5 .5 .5" width="8" height="48"/>
  {
    "".join(
        f'<material name="{m}" specular=".1" shininess=".1"/>'
        for m in (*COLOURS, "table", "floor", "cabinet", "tray", "handle", "plate", "button", "button_base")
    )
}
</asset>
<default>
  <default class="furniture"><geom type="box" solimp=".99 .99 .01" solref=".01 1" condim="3"/></default>
</default>
<worldbody>
  <light name="key" directional="true" castshadow="false" pos="-1 0 2" dir=".5 .3 -1" diffuse=".45 .45 .45"
   specular="0 0 0"/>
  <light name="fill" directional="true" castshadow="false" pos="0 2 2" dir=".2 -.8 -1" diffuse=".2 .2 .2"
   specular="0 0 0"/>
  <geom name="floor" type="plane" size="5 5 .1" pos="0 0 -.9" material="floor" contype="0" conaffinity="0"/>
  <geom name="table" type="box" size=".5 .42 .03" pos="0 .62 -.03" material="table" friction="1 .1 .002" condim="4"/>
  <include file="../objects/assets/xyz_base.xml"/>
  <geom name="plate" type="cylinder" size="{PLATE_RADIUS} .003" pos="0 .6 .003" material="plate"
   contype="0" conaffinity="0"/>
  {"".join(_BLOCK.format(c=c, x=0.1 * i) for i, c in enumerate(COLOURS))}
  <body name="cabinet" pos="{DRAWER[0]} {DRAWER[1]} 0" childclass="furniture">
    <geom material="cabinet" size=".005 .07 .03" pos="-.088 0 .03"/>
    <geom material="cabinet" size=".005 .07 .03" pos=".088 0 .03"/>
    <geom material="cabinet" size=".083 .003 .03" pos="0 .073 .03"/>
    <geom material="cabinet" size=".093 .073 .004" pos="0 .003 .064"/>
  </body>
  <body name="tray" pos="{DRAWER[0]} {DRAWER[1]} 0" childclass="furniture">
    <inertial pos="0 0 .04" mass=".6" diaginertia=".002 .002 .002"/>
    <joint name="tray" type="slide" axis="0 1 0" range="-{DRAWER_TRAVEL} 0" limited="true" damping="3"
     frictionloss=".6"/>
    <geom name="tray_floor" material="tray" size=".08 .07 .004" pos="0 0 .006"/>
    <geom material="tray" size=".004 .07 .022" pos="-.076 0 .028"/>
    <geom material="tray" size=".004 .07 .022" pos=".076 0 .028"/>
    <geom material="tray" size=".076 .004 .022" pos="0 .066 .028"/>
    <geom name="tray_front" material="tray" size=".086 .004 .03" pos="0 -.07 .032"/>
    <geom material="handle" size=".006 .028 .008" pos="-.048 -.102 {HANDLE_HEIGHT}"/>
    <geom material="handle" size=".006 .028 .008" pos=".048 -.102 {HANDLE_HEIGHT}"/>
    <geom name="handle" material="handle" size=".056 .007 .012" pos="0 -{HANDLE} {HANDLE_HEIGHT}"/>
  </body>
  <body name="button_base" pos="{BUTTON[0]} {BUTTON[1]} .03" childclass="furniture">
    <geom material="button_base" size=".038 .038 .03"/></body>
  <body name="button" pos="{BUTTON[0]} {BUTTON[1]} 0">
    <inertial pos="0 0 .06" mass=".05" diaginertia="1e-4 1e-4 1e-4"/>
    <joint name="button" type="slide" axis="0 0 1" range="-{BUTTON_TRAVEL} 0" limited="true" stiffness="60"
     springref=".02" damping="2"/>
    <geom name="button" type="cylinder" size=".03 .02" pos="0 0 {BUTTON_TOP - 0.02}" material="button"
     solimp=".99 .99 .01" solref=".01 1"/></body>
</worldbody>
<contact><exclude body1="cabinet" body2="tray"/><exclude body1="button_base" body2="button"/></contact>
<actuator>
  <position name="right" ctrllimited="true" ctrlrange="-1 1" joint="r_close" kp="400"/>
  <position name="left" ctrllimited="true" ctrlrange="-1 1" joint="l_close" kp="400"/>
</actuator>
<equality><weld body1="mocap" body2="hand" solref=".02 1"/></equality>
</mujoco>"""


def build() -> mujoco.MjModel:
    """The compiled model; each call gives its own, which an appearance may recolour."""
    return copy.copy(_compiled())


@functools.cache
def _compiled() -> mujoco.MjModel:
    """Compiling takes a second, once per process.

    The shipped XML parts use ../ paths, so they are read through a folder of links.
    """
    try:
        import metaworld
    except ImportError as error:
        raise ValueError("the tabletop needs metaworld: pip install -e '.[sim]' in dreamgen's folder") from error
    assets = Path(metaworld.__file__).parent / "assets"
    with tempfile.TemporaryDirectory(prefix="tabletop_") as folder:
        for name in ("objects", "scene", "textures"):
            os.symlink(assets / name, Path(folder) / name)
        (Path(folder) / "sawyer").mkdir()
        path = Path(folder) / "sawyer" / "tabletop.xml"
        path.write_text(_XML)
        spec = mujoco.MjSpec.from_file(str(path))
        _widen_gripper(spec)
        _add_wrist_camera(spec)
        _simplify_arm(spec)
        model = spec.compile()  # reads the meshes while the links exist
    weld = int(np.flatnonzero(model.eq_type == mujoco.mjtEq.mjEQ_WELD)[0])
    model.eq_data[weld] = [0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5]  # as Meta-World resets its mocap weld
    return model


def _widen_gripper(spec: mujoco.MjSpec) -> None:
    """Fingers further apart and pads wider than Meta-World's: a grasp forgives 26 mm along y and more along x."""
    for side, sign in (("right", -1), ("left", 1)):
        claw = spec.body(f"{side}claw")
        claw.pos = [0, sign * FINGER, 0]
        joint = spec.joint(f"{side[0]}_close")
        joint.range = [0, FINGER_TRAVEL] if sign < 0 else [-FINGER_TRAVEL, 0]
        for geom in (*claw.geoms, *spec.body(f"{side}pad").geoms):
            geom.size = [0.045, 0.008 if "pad" in geom.name else 0.003, 0.024]
            geom.rgba = [1, 1, 1, 1]


def _simplify_arm(spec: mujoco.MjSpec) -> None:
    """Draw three times faster: the base, which no camera sees, is hidden, and the gripper's housing is a box."""
    for name in UNSEEN:
        for geom in spec.body(name).geoms:
            geom.group = HIDDEN
    for geom in spec.body("right_hand").geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_MESH:
            geom.type, geom.size, geom.pos = mujoco.mjtGeom.mjGEOM_BOX, [0.033, 0.053, 0.027], [0.009, 0, 0.054]
            geom.meshname = ""


def _add_wrist_camera(spec: mujoco.MjSpec) -> None:
    """A camera beside the hand that looks at the fingertips. The hand's x is the world's -z, its z the world's x."""
    to_world = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], float)
    position, target = np.array([-0.11, 0, 0.06]), np.array([0.01, 0, -0.05])
    back = (position - target) / np.linalg.norm(position - target)
    right = np.array([0.0, -1.0, 0.0])
    axes = np.stack([right, np.cross(back, right), back], 1)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, (to_world.T @ axes).flatten())
    spec.body("hand").add_camera(name="wrist", pos=to_world.T @ position, quat=quaternion, fovy=75)
