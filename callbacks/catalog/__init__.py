"""What techniques there are, in which order they act, and which may not act together."""
