"""Measure a policy's closed-loop success in the simulator."""

from jobs.running import job

main = job("evaluate")

if __name__ == "__main__":
    main()
