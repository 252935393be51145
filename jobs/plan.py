"""Say what fine-tuning and dreaming will cost, before anything is spent."""

import sys

from jobs.running import entry, run_stage


def run(cfg) -> None:  # noqa: ANN001
    """Plan, and show the table."""
    sys.stdout.write(run_stage(cfg)["text"] + "\n")


main = entry("plan", run)
if __name__ == "__main__":
    main()
