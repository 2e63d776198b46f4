"""Which samples a run sees, in which order, from which seeds."""
