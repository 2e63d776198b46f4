"""For every test: a home of its own for the ledger and caches, one thread, and `tests/support` to import from."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# the same examples every time, on machines that others use too
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
sys.path.insert(0, str(Path(__file__).parent / "support"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, here and in every process started from here


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """`SHOESTRING_HOME` in a temporary folder, for all processes that the tests start too."""
    before = os.environ.get("SHOESTRING_HOME")
    os.environ["SHOESTRING_HOME"] = str(tmp_path_factory.mktemp("home"))
    yield
    if before is None:
        del os.environ["SHOESTRING_HOME"]
    else:
        os.environ["SHOESTRING_HOME"] = before


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Where `finished` keeps its runs: trained once a session, to be read by all tests and changed by none."""
    return tmp_path_factory.mktemp("finished")


def pytest_collection_modifyitems(items):
    """`make test-gpu` on a machine without one says so instead of failing."""
    import torch

    if os.environ.get("SHOESTRING_TEST_DEVICE", "cpu") == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
