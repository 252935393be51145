"""A dataset -> the same episodes in the format that another program reads."""

from pathlib import Path

from dreamgen.core.manifest import Stage
from dreamgen.data.export import export_dataset
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.data.writer import require_free


def export(data: Dataset, *, out: Path, format: str = "v3.0", rate: str | int = "robot", horizon: int = 16,
           codec: str = "h264", workers: int = 1, record: dict) -> dict:  # fmt: skip
    """Write the episodes of `data` to `out` as LeRobot "v3.0", "v2.1" or "groot" (v2.1 with what GR00T adds).

    rate: "robot", rows as they are, or "video", one row per new picture of labelled dreams, with the actions of the gap
    to the next one put together, or so many rows a second ("10"), of recordings too. horizon: rows of an action chunk
    for which GR00T's relative statistics are computed. codec: "h264" or "av1", for videos that cannot be copied. The
    manifest says what was mended, skipped, left out and encoded again.

    Raises ValueError for an unknown format or rate, labels that have not one video rate, and if `out` holds data that
    is not of this run.
    """
    require_free(out)
    with Stage(out, "export", config=record, parents={"data": data.root}) as run:
        if run.complete:
            return run.manifest()
        found = export_dataset(data, out, format=format, rate=rate, horizon=horizon, codec=codec, workers=workers)
        return run.finish(**found, **noted(data))
