"""Score a policy's actions against those recorded on held-out episodes, where there is no simulator."""

from jobs.running import job

main = job("evaluate_open_loop")

if __name__ == "__main__":
    main()
