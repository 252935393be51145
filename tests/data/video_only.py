"""A written dataset made one that knows nothing but video: no actions, no states."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq


def strip(source: Path, root: Path, *columns: str) -> Path:
    """A copy of the dataset `source` at `root` without `columns` (default: actions and states)."""
    columns = columns or ("action", "observation.state")
    shutil.copytree(source, root)
    for path in (root / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns([*columns]), path)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"] = {key: feature for key, feature in info["features"].items() if key not in columns}
    (root / "meta/info.json").write_text(json.dumps(info))
    return root
