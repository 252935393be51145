"""The recipes: one defaults list, groups of options, experiments. YAML only; this file lets Hydra find them."""
