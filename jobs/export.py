"""Write a dataset in the format of another program: LeRobot v3.0, v2.1, or the GR00T flavour."""

from jobs.running import job

main = job("export")

if __name__ == "__main__":
    main()
