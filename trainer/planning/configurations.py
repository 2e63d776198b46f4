"""A model's `config.json` without a network: of a folder, a package that carries the model, or the hub's cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..data.carried import resolve_name


def configuration_of(name: str | None) -> Mapping[str, Any] | None:
    """What `name` says about its shape; None where nothing on this machine tells."""
    if name is None:
        return None
    for folder in _folders(name):
        with suppress(OSError, ValueError):
            config = json.loads((folder / "config.json").read_text())
            if isinstance(config, dict):
                return config.get("text_config") or config
    return None


def _folders(name: str) -> Iterator[Path]:
    yield Path(resolve_name(name) if name == "minilm" else name).expanduser()
    snapshots = _hub_cache() / f"models--{name.replace('/', '--')}"
    with suppress(OSError):
        yield snapshots / "snapshots" / (snapshots / "refs" / "main").read_text().strip()
        yield from sorted((snapshots / "snapshots").iterdir())


def _hub_cache() -> Path:
    """Where huggingface_hub keeps what it has downloaded; read by its rules, for to import it takes long."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(given or Path(os.environ.get("HF_HOME") or cache) / "hub").expanduser()
