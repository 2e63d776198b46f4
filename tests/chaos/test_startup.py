"""A few of the mishaps that the scripts beside this file make by the dozen."""

from __future__ import annotations

import random
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest


def script(name: str) -> ModuleType:
    spec = spec_from_file_location(f"chaos_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


startup = script("startup")


@pytest.mark.parametrize("seed", range(4))
def test_a_signal_in_the_first_seconds_ends_all_and_never_with_0(seed: int, tmp_path: Path) -> None:
    result = startup.one(tmp_path, random.Random(seed), seconds=12.0)
    assert not result["wrong"], result
