"""Recorded and dreamed trajectories: LeRobot datasets in and out, clips, windows, normalisation, mixtures."""
