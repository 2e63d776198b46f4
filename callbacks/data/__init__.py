"""Techniques by perspective: what the model sees and when."""
