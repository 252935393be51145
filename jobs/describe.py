"""Draft a robot's embodiment from a dataset of it: `> conf/embodiment/mine.yaml`, then read its comments."""

import sys

from jobs.running import entry, run_stage


def run(cfg) -> None:  # noqa: ANN001
    """Describe, and show the YAML."""
    sys.stdout.write(run_stage(cfg)["results"]["text"])


main = entry("describe", run)
if __name__ == "__main__":
    main()
