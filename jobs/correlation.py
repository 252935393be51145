"""Compare success in the dream with success in the simulator over many policies, beside blind evaluators."""

from jobs.running import job

main = job("correlation")

if __name__ == "__main__":
    main()
