"""Tests on real clusters, which take minutes and change the machine's network: only where they are asked for."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("SHOESTRING_CLUSTER_TESTS") == "1":
        return
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.skip(reason="needs a real cluster on this machine: make test-cluster"))
