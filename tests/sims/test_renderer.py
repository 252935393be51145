"""A drawing context is freed before the interpreter ends, also of a run that failed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAILED = """
import weakref
from dreamgen.sims.renderer import Renderer, mujoco
class Scene: pass
earlier = Scene()
weakref.finalize(earlier, int)
scene = Scene()
scene.renderer, scene.itself = Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8), scene
raise SystemExit(2)
"""


def test_a_run_that_fails_leaves_no_traceback_of_its_renderer() -> None:
    pytest.importorskip("mujoco")
    done = subprocess.run([sys.executable, "-c", FAILED], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "")
