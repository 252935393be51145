"""Dream videos from first frames, instructions and seeds."""

from jobs.running import job

main = job("dream")

if __name__ == "__main__":
    main()
