"""The commands. Hydra lives here and nowhere else: a job composes a recipe and calls one stage function."""
