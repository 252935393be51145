"""What `--help` says: a command's purpose, its settings as its YAML explains them, and the groups to choose from."""

import ast
from collections.abc import Sequence
from importlib.resources import files


def summary(job: str) -> str:
    """The first paragraph of a job's docstring."""
    text = ast.get_docstring(ast.parse(files("jobs").joinpath(f"{job}.py").read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def usage(job: str, overrides: Sequence[str]) -> str:
    """For the stage that `overrides` choose (`stage=labels`), or the job's own."""
    conf = files("conf")
    stage = next((word.partition("=")[2] for word in reversed(overrides) if word.startswith("stage=")), job)
    file = conf.joinpath("stage", f"{stage}.yaml")
    settings = file.read_text(encoding="utf-8") if file.is_file() else ""
    kept = "".join(f"  {line}\n" for line in settings.splitlines() if not line.startswith("_target_"))
    groups = {
        group.name: ", ".join(sorted(o.name.removesuffix(".yaml") for o in group.iterdir() if o.name.endswith(".yaml")))
        for group in conf.iterdir() if group.is_dir()
    }  # fmt: skip
    told = "".join(f"  {name}: {options}\n" for name, options in sorted(groups.items()) if options)
    return (f"usage: dreamgen {job} [key=value ...]\n{summary(job)}\n\n"
            + (f"settings of stage={stage} (stage.key=value):\n{kept}\n" if kept else "")
            + f"options (group=option):\n{told}\n`--cfg job` prints every key with its value.\n")  # fmt: skip
