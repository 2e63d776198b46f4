"""Values as YAML text that every reader takes for the same: ours, and the YAML 1.1 readers of Kubernetes and SkyPilot.

A text is quoted where either would take the bare word for something else (`1e-4` is a number only in YAML 1.2, `off`
is one of 1.1's truth values), several lines stand as a block, and nothing is written as an anchor.
"""

from __future__ import annotations

from typing import Any

import yaml

from .yaml_reader import is_text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_yaml(value: Any) -> str:
    """YAML text of mappings, lists and scalars, keys in the order of the mapping."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=_style(text))


def _style(text: str) -> str | None:
    """PyYAML's name of the style: block, quotes, or its own choice, by which YAML 1.1 reads the text back."""
    lines = text.split("\n")
    if not all(map(str.isprintable, lines)):  # other line ends of Unicode would come back as blanks
        return '"'
    if len(lines) > 1:
        return "|"
    return None if is_text(text) else "'"


_Dumper.add_representer(str, _text)
