"""Tests marked `cluster` start real schedulers and daemons on this machine: only where that is asked for."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("SHOESTRING_CLUSTER_TESTS") == "1":
        return
    skip = pytest.mark.skip(reason="needs a real cluster on this machine: make test-cluster")
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(skip)
