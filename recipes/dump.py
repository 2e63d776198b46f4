"""A recipe back to YAML, every value spelled out; `load_recipe` of it gives an equal recipe."""

from __future__ import annotations

from typing import Any

import yaml

from .reader import scalar
from .recipe import Recipe


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML text: defaults filled in, `extends` and overrides resolved, amounts in base units."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Quoted where our reader would take the bare word for something else (PyYAML knows YAML 1.1 only: `1e-4`), and
    escaped where a line break would be folded."""
    try:
        bare = scalar(value) == value and value.isprintable()
    except ValueError:
        bare = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if bare else '"')


_Dumper.add_representer(str, _text)
