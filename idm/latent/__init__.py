"""Latent actions: what changes between the frames of any video, with or without a robot."""
