"""Score labels on held-out video: R2 per action part, and success when replayed in the simulator."""

from jobs.running import job

main = job("evaluate_labels")

if __name__ == "__main__":
    main()
