"""Observations to action chunks: encoders, the diffusion transformer, the flow-matching policy, FLARE."""
