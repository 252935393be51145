"""How many dreams prompts ask for, as far as it is known before they are made: first frames x instructions x seeds."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf


def asked(prompts: DictConfig) -> int | None:
    """Of a configuration of the group `prompts`; None where pictures, a simulator or a dataset that is not there yet
    would have to be looked at."""
    frames = prompts.get("first_frames") or _recorded(prompts)
    texts = len({*(prompts.get("instructions") or ())}) if prompts.get("every_instruction") else 1
    return frames * texts * prompts.repeats if frames and texts else None


def _recorded(prompts: DictConfig) -> int | None:
    """First frames from the episodes of a LeRobot folder, by its list of them."""
    from dreamgen.data.layout import INFO, read_layout

    root = OmegaConf.select(prompts, "dataset.root")
    if root is None or not (Path(root) / INFO).is_file():
        return None
    known, data = {entry.index for entry in read_layout(Path(root)).entries}, prompts.dataset
    if data.get("episodes") is not None:
        known &= {*data.episodes}
    return len([*(known - {*(data.get("leave_out") or ())})][: prompts.episodes]) * len(prompts.keyframes)
