"""The console command: `dreamgen finetune a=b` is `python -m jobs.finetune a=b`."""

import importlib
import pkgutil
import sys

import jobs
from jobs.help import summary

# modules that are no commands
APART = {"cli", "cluster", "dreams", "errors", "help", "kinds", "recipe", "running", "steps"}


def commands() -> list[str]:
    """The names of all jobs."""
    return sorted(module.name for module in pkgutil.iter_modules(jobs.__path__) if module.name not in APART)


def main() -> None:
    """Hand over to the job that the first word names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in commands():
        wanted = name in ("-h", "--help")
        rows = "".join(f"  {job:<17}{summary(job)}\n" for job in commands())
        text = f"usage: dreamgen COMMAND [key=value ...]\ncommands (dreamgen COMMAND --help says more):\n{rows}"
        (sys.stdout if wanted else sys.stderr).write(text if wanted else f"error: no command '{name}'\n{text}")
        raise SystemExit(0 if wanted else 2)
    sys.argv = [f"dreamgen {name}", *sys.argv[2:]]
    importlib.import_module(f"jobs.{name}").main()
