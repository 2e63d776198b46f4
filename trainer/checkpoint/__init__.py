"""Checkpoints: their format on disk, the state in them, and when they are written and read."""
