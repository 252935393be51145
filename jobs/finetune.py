"""Fine-tune the world model on the target robot's dataset."""

from jobs.running import job

main = job("finetune")

if __name__ == "__main__":
    main()
