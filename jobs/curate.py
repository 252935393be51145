"""Score labelled dreams by filters and keep the good ones as a dataset."""

from jobs.running import job

main = job("curate")

if __name__ == "__main__":
    main()
