"""Fine-tune an action-conditioned world model on demonstrations, play, failures and disturbed actions."""

from jobs.running import job

main = job("finetune_actions")

if __name__ == "__main__":
    main()
