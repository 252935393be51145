"""Give dreamed videos pseudo-actions and write them as a LeRobot dataset."""

from jobs.running import job

main = job("label")

if __name__ == "__main__":
    main()
