"""Tests that need an engine on this machine run where somebody has said so."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("SHOESTRING_CLUSTER_TESTS") == "1":
        return
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.skip(reason="needs a real cluster on this machine: make test-cluster"))
