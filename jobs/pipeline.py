"""Run a recipe's steps in order, skip what is complete, and print the results."""

from jobs.running import entry
from jobs.steps import run_pipeline

main = entry("pipeline", run_pipeline)

if __name__ == "__main__":
    main()
