"""Compare filters' scores with the truth: the labels of each dream replayed in the simulator."""

from jobs.running import job

main = job("evaluate_filters")

if __name__ == "__main__":
    main()
