"""Techniques by perspective: how the model computes."""
