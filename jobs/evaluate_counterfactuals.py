"""Execute dreamt streams of actions in the simulator and compare the outcomes."""

from jobs.running import job

main = job("evaluate_counterfactuals")

if __name__ == "__main__":
    main()
