"""Train the labeler (inverse dynamics) on the target robot's dataset."""

from jobs.running import job

main = job("train_labeler")

if __name__ == "__main__":
    main()
