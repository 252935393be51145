"""Measure an action-conditioned world model: drift, attention to actions, calibration, invented motion."""

from jobs.running import job

main = job("evaluate_world")

if __name__ == "__main__":
    main()
