"""A file of JSON lines that grows while a dataset is written, so that no list of its episodes is held in memory."""

import json
from pathlib import Path
from typing import TextIO


class Lines:
    """One JSON object a line, in the order in which they are added; the file begins with the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def add(self, row: dict) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w")
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """All lines are on disk; nothing can be added any more."""
        if self._file is not None:
            self._file.close()
