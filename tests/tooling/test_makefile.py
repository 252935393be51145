"""`make setup` goes on from whatever a setup that failed has left; interpreters are stood in for by scripts."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# makes an environment whose python has no pip (fails: 1), or one that can do everything, and notes how it was asked
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
  echo "$@" >> {log}
  mkdir -p {venv}/bin && touch {venv}/pyvenv.cfg
  printf '#!/bin/sh\\nexit {fails}\\n' > {venv}/bin/python && chmod +x {venv}/bin/python
  exit {fails}
fi
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_setup_mends_an_environment_without_pip(tmp_path: Path) -> None:
    venv, log, python = tmp_path / "venv", tmp_path / "log", tmp_path / "python"

    def setup(fails: int) -> subprocess.CompletedProcess:
        python.write_text(PYTHON.format(log=log, venv=venv, fails=fails))
        python.chmod(0o755)
        return subprocess.run(["make", "setup", f"VENV={venv}", f"PYTHON={python}"], cwd=ROOT, capture_output=True,
                              text=True)  # fmt: skip

    broken = setup(fails=1)  # as without python3-venv: bin/python is there, pip is not
    assert broken.returncode == 2 and "apt-get install python3-venv" in broken.stderr
    assert (venv / "bin" / "python").exists() and not (venv / ".installed").exists()
    mended = setup(fails=0)
    assert mended.returncode == 0, mended.stderr
    assert (venv / ".installed").exists()
    assert log.read_text().splitlines() == [f"-m venv {venv}", f"-m venv --clear {venv}"]  # never clears what is none
    (venv / ".installed").unlink()
    assert setup(fails=0).returncode == 0 and len(log.read_text().splitlines()) == 2  # pip is there: nothing anew
