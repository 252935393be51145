"""A dream stage that takes its time; `python -m tests.jobs.shared_dream ADDRESS OUT` spreads it over a Ray cluster."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dreamgen.stages.dream import dream
from tests.stages.drawn_world import DrawnWorld, prompts

CLIPS = 12


def listed() -> list:
    return prompts(CLIPS)


def build(out: str, delay: float) -> Callable[..., dict]:
    """The stage; who has built it leaves its process id in `out`, once for each time."""
    note = Path(out) / "built" / str(os.getpid())
    note.parent.mkdir(parents=True, exist_ok=True)
    with note.open("a") as file:
        file.write("built\n")
    return partial(dream, DrawnWorld(delay), listed, out=Path(out) / "dreams", batch_size=1, overlap=False, record={})


if __name__ == "__main__":
    from jobs.cluster import Ray
    from tests.jobs import shared_dream  # by its name, as workers know it

    found = Ray(address=sys.argv[1], workers=3).run(partial(shared_dream.build, sys.argv[2], 0.7), 6)
    sys.stdout.write(found["id"])
