"""Check a dataset and say what to mend; ends with status 1 if it has errors."""

from jobs.running import entry, run_check

main = entry("validate", run_check)

if __name__ == "__main__":
    main()
