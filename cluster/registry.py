"""The engines by name. A third party adds its own by the entry point group `shoestring.engines`."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points

from .engine import Engine

# in the order in which one meets them
ENGINES = {
    "local": "engines.local:Local",
    "ssh": "engines.ssh:SSH",
    "slurm": "engines.slurm:Slurm",
    "kubernetes": "engines.kubernetes:Kubernetes",
    "ray": "engines.ray:Ray",
    "skypilot": "engines.skypilot:SkyPilot",
}


def names() -> list[str]:
    """Every engine's name, ours first."""
    return [*ENGINES, *sorted(point.name for point in entry_points(group="shoestring.engines"))]


@lru_cache
def engine(name: str) -> Engine:
    """The engine called `name`; KeyError if there is none (`names` says which there are)."""
    if name in ENGINES:
        module, _, attribute = ENGINES[name].partition(":")
        made: Engine = getattr(import_module(f".{module}", __package__), attribute)()
        return made
    for point in entry_points(group="shoestring.engines"):
        if point.name == name:
            loaded: Engine = point.load()()
            return loaded
    raise KeyError(name)


def shares_filesystem(name: str) -> bool:
    """Whether that engine's nodes see this machine's files; else it hands over all they need by itself."""
    return engine(name).shares_filesystem
