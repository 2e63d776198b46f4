"""Cluster files: how they are read, their sections, and the catalogue of hardware."""
