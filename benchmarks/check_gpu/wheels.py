"""Packages that this Python lacks, from a folder of wheels: no network, and nothing that is installed is touched."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def missing(folder: Path) -> list[Path]:
    """The wheels of packages that are not installed."""
    return [wheel for wheel in sorted(folder.glob("*.whl")) if not _installed(wheel.name.partition("-")[0])]


def install(folder: Path, target: Path) -> Path | None:
    """Unpack the missing packages into `target`, for PYTHONPATH; None if none is missing."""
    wheels = missing(folder)
    if not wheels:
        return None
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--target", str(target), *map(str, wheels)], check=True)
    return target


def _installed(name: str) -> bool:
    try:
        metadata.version(re.sub(r"[-_.]+", "-", name))
    except metadata.PackageNotFoundError:
        return False
    return True
