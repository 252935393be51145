"""Record episodes of an expert, of play or of a policy in the simulator, as a LeRobot dataset."""

from jobs.running import job

main = job("collect")

if __name__ == "__main__":
    main()
