"""Print the table of a policy experiment's cells: success with n, intervals and paired differences."""

from jobs.running import job

main = job("policy_table")

if __name__ == "__main__":
    main()
