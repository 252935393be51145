"""What every room shares: one robot, one clock, the values that cross borders, manifests, seeds."""
