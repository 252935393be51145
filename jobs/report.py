"""Write the report and results.json of a run."""

from jobs.running import job

main = job("report")

if __name__ == "__main__":
    main()
