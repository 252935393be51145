"""Nothing that a run started outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POOL = """
import multiprocessing, os, sys, time
from dreamgen.core.orphans import die_with_parent
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1, die_with_parent, (os.getpid(),)) as pool:
        print(pool.apply(os.getpid), flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_workers_of_a_killed_process_end_with_it(tmp_path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    process = subprocess.Popen([sys.executable, str(tmp_path / "pool.py")], env=os.environ | {"PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    child = int(process.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 30
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.05)
