"""Score latent actions on held-out video: probes beside controls, few labels, donor swaps, codes."""

from jobs.running import job

main = job("evaluate_latents")

if __name__ == "__main__":
    main()
