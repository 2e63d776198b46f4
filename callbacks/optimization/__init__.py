"""Techniques by perspective: how it learns."""
