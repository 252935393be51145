"""Train the tracker that reads positions off pictures, to measure dreams by."""

from jobs.running import job

main = job("train_tracker")

if __name__ == "__main__":
    main()
