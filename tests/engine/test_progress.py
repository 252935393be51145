"""What a progress bar leaves behind in its log."""

import re
import time
from pathlib import Path

from dreamgen.engine.progress import progress


def test_every_tenth_is_logged_with_its_rate(tmp_path: Path) -> None:
    def items():
        for item in range(20):
            time.sleep(0.002)
            yield item

    assert list(progress(items(), 20, "look at", tmp_path, unit="clip")) == list(range(20))
    lines = re.findall(r"(\d+)/20 look at, ([\d.]+) clip/s", (tmp_path / "look_at.log").read_text())
    assert [int(count) for count, _ in lines] == list(range(2, 21, 2))
    assert all(0 < float(rate) < 500 for _, rate in lines)  # the bar itself was drawn once, before the first of them
