"""Train and calibrate a judge of success on video of successes and failures."""

from jobs.running import job

main = job("train_judge")

if __name__ == "__main__":
    main()
