"""Simulated robots behind one protocol, and closed-loop evaluation in them.

Importing this room chooses MuJoCo's drawing back end, which must happen before MuJoCo itself is imported.
"""

import ctypes.util
import os
import sys

if sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
    # without a screen: EGL (also Mesa's software renderer), else OSMesa, else physics without pictures
    found = [name for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if ctypes.util.find_library(library)]
    os.environ["MUJOCO_GL"] = (found or ["off"])[0]
