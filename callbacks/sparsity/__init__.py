"""Techniques by perspective: fewer weights."""
