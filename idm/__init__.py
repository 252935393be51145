"""Inverse dynamics: which actions lie between the frames of a video."""
