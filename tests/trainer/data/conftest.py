"""A tiny task for the tests of data."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_tasks import allow_warnings, shared_home, tiny, use_home

__all__ = ["shared_home", "tiny", "use_home"]  # fixtures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    allow_warnings(items, Path(__file__).parent)
