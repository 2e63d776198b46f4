"""Techniques by perspective: how the machine is used."""
