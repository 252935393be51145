"""Build the environment in which lerobot runs: `python environment.py FOLDER`; status 1 and the reason if it cannot be.

The newest Python that lerobot takes is looked for (3.12 first, also among pyenv's), else the one that runs this; pip
then takes the newest lerobot that installs on it. An environment that has lerobot already is left alone.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("python3.12", "python3.13")
PACKAGE = "lerobot[dataset]"  # 0.4 and older have no such extra; pip says so and installs what they need all the same


def pythons() -> list[str]:
    """Interpreters to try, best first."""
    homes = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [path for name in NAMES for path in (shutil.which(name), *map(str, sorted(homes.glob(f"*/bin/{name}"))))]
    return [path for path in [*found, sys.executable] if path and works(path)]


def works(python: str) -> bool:
    """pyenv's shims are there for versions that are not."""
    return subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0


def has_lerobot(python: Path) -> bool:
    return python.is_file() and subprocess.run([str(python), "-c", "import lerobot.datasets.lerobot_dataset"],
                                               capture_output=True).returncode == 0  # fmt: skip


def main() -> int:
    folder = Path(sys.argv[1])
    python = folder / "bin" / "python"
    if has_lerobot(python):
        return 0
    reasons = []
    for interpreter in pythons():
        subprocess.run([interpreter, "-m", "venv", "--clear", str(folder)], check=True)
        done = subprocess.run([str(python), "-m", "pip", "install", "-q", PACKAGE], capture_output=True, text=True)
        if done.returncode == 0 and has_lerobot(python):
            return 0
        reasons.append(f"{interpreter}: {(done.stderr.strip().splitlines() or ['lerobot does not import'])[-1]}")
    shutil.rmtree(folder, ignore_errors=True)
    sys.stderr.write("test-lerobot is skipped, lerobot does not install here\n  " + "\n  ".join(reasons) + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
