"""What `--help` says: a command's purpose, its settings as its YAML explains them, and the groups to choose from."""

import ast
from collections.abc import Sequence
from importlib.resources import files


def summary(job: str) -> str:
    """The first paragraph of a job's docstring."""
    text = ast.get_docstring(ast.parse(files("jobs").joinpath(f"{job}.py").read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def explained(target: str) -> str:
    """The docstring of a stage function, which says what its settings mean; its module is read, not imported."""
    package, module, name = target.rsplit(".", 2)
    tree = ast.parse(files(package).joinpath(f"{module}.py").read_text(encoding="utf-8"))
    return next((ast.get_docstring(node) or "" for node in tree.body
                 if isinstance(node, ast.FunctionDef) and node.name == name), "")  # fmt: skip


def listed(stage: str) -> list[str]:
    """The settings of a stage as its YAML explains them, behind those of the stages that it builds on."""
    file = files("conf").joinpath("stage", f"{stage}.yaml")
    found: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        if line.startswith("defaults:"):
            names = [name.strip() for name in line.partition("[")[2].rstrip("]").split(",")]
            found += [inner for name in names if name != "_self_" for inner in listed(name)]
        else:
            found.append(line)
    return found


def usage(job: str, overrides: Sequence[str]) -> str:
    """For the stage that `overrides` choose (`stage=labels`), or the job's own."""
    stage = next((word.partition("=")[2] for word in reversed(overrides) if word.startswith("stage=")), job)
    settings = listed(stage)
    target = next((line.split()[1] for line in settings if line.startswith("_target_: ")), "")
    kept = "".join(f"  {line}\n" for line in settings if not line.startswith("_target_"))
    groups = {
        group.name: ", ".join(sorted(o.name.removesuffix(".yaml") for o in group.iterdir() if o.name.endswith(".yaml")))
        for group in files("conf").iterdir() if group.is_dir()
    }  # fmt: skip
    told = "".join(f"  {name}: {options}\n" for name, options in sorted(groups.items()) if options)
    return (f"usage: dreamgen {job} [key=value ...]\n{explained(target) if target else summary(job)}\n\n"
            + (f"settings of stage={stage} (stage.key=value):\n{kept}\n" if kept else "")
            + f"options (group=option):\n{told}\n`--cfg job` prints every key with its value.\n")  # fmt: skip
