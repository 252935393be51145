"""Train the tiny base world model on video without actions."""

from jobs.running import job

main = job("pretrain")

if __name__ == "__main__":
    main()
