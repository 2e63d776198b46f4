"""A few of the mishaps that the scripts in tests/support make by the dozen."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import startup


@pytest.mark.parametrize("seed", range(4))
def test_a_signal_in_the_first_seconds_ends_all_and_never_with_0(seed: int, tmp_path: Path) -> None:
    result = startup.one(tmp_path, random.Random(seed), seconds=12.0)
    assert not result["wrong"], result
