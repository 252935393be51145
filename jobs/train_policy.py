"""Train a policy on real and dreamed trajectories."""

from jobs.running import job

main = job("train_policy")

if __name__ == "__main__":
    main()
