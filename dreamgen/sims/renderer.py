"""Drawing a MuJoCo scene fast on a CPU: no shadows, reflections or multisampling, 2x supersampling instead.

The default picture path (4096-pixel shadow maps, mirrors, 4x multisampling) costs 15 times as much in software.
"""

import atexit
import os
import weakref

import mujoco
import numpy as np

SUPERSAMPLING = 2
MISSING = ("MuJoCo cannot draw: neither EGL nor OSMesa could be used (MUJOCO_GL={gl!r}{why}). Install the system "
           "package libegl1 (then MUJOCO_GL=egl) or libosmesa6 (then MUJOCO_GL=osmesa).")  # fmt: skip


class Renderer:
    """Pictures (height width 3) uint8 of one model. Cameras are free cameras or names of cameras in the model.

    `close()` frees the drawing context; it is called when nobody holds the renderer any more, and at exit.
    Raises ValueError that names the system package to install when no drawing back end works.
    """

    def __init__(self, model: mujoco.MjModel, height: int, width: int) -> None:
        self.height, self.width = height, width
        big_height, big_width = SUPERSAMPLING * height, SUPERSAMPLING * width
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        model.vis.global_.offheight = max(big_height, model.vis.global_.offheight)
        model.vis.global_.offwidth = max(big_width, model.vis.global_.offwidth)
        gl = os.environ.get("MUJOCO_GL", "")
        if gl == "off":
            raise ValueError(MISSING.format(gl=gl, why=""))
        try:
            renderer = self._renderer = mujoco.Renderer(model, big_height, big_width)
        except (RuntimeError, ImportError, AttributeError) as error:
            raise ValueError(MISSING.format(gl=gl, why=f": {error}")) from error
        # also before the interpreter ends: EGL is gone by the time that it clears its modules. What is registered last
        # runs first, so before mujoco's own end of EGL, as `finalize` would only where nothing else has used it before
        self.close = weakref.finalize(self, renderer.close)
        self.close.atexit = False
        atexit.register(self.close)

    def draw(self, data: mujoco.MjData, camera: mujoco.MjvCamera | str) -> np.ndarray:
        """One picture (height width 3) uint8."""
        renderer = self._renderer
        renderer.update_scene(data, camera=camera)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = 0  # update_scene sets them again
        big = renderer.render()
        blocks = big.reshape(self.height, SUPERSAMPLING, self.width, SUPERSAMPLING, 3)
        return (blocks.sum((1, 3), dtype=np.uint16) // SUPERSAMPLING**2).astype(np.uint8)


def free_camera(*, lookat: tuple, distance: float, azimuth: float, elevation: float) -> mujoco.MjvCamera:
    """A camera at `distance` m from `lookat` (m), angles in degrees."""
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    camera.lookat[:] = lookat
    camera.distance, camera.azimuth, camera.elevation = distance, azimuth, elevation
    return camera


def project(points: np.ndarray, camera: mujoco.MjvCamera, fovy: float, aspect: float = 1.0) -> np.ndarray:
    """Where points (n 3), in m, fall in the picture of a free camera: (n 2), x right and y down, [0, 1] is inside."""
    azimuth, elevation = np.deg2rad(camera.azimuth), np.deg2rad(camera.elevation)
    forward = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    right = np.array([np.sin(azimuth), -np.cos(azimuth), 0.0])
    up = np.cross(right, forward)
    rays = np.asarray(points) - (np.asarray(camera.lookat) - camera.distance * forward)
    half = np.tan(np.deg2rad(fovy) / 2) * (rays @ forward)
    return np.stack([0.5 + rays @ right / (2 * half * aspect), 0.5 - rays @ up / (2 * half)], -1)
