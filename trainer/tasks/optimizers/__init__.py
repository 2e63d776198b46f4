"""Optimizers beside those of torch, and parameter groups. They know of no recipe but its `optimizer` section."""
