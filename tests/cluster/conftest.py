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


def pytest_sessionfinish(session, exitstatus):
    """Where they were asked for, a test that was skipped has not shown anything."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("SHOESTRING_CLUSTER_TESTS") == "1" and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
