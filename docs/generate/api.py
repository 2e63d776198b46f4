"""The public names of the four packages, each documented from its docstring."""

from __future__ import annotations

import inspect
from importlib import import_module

from shoestring.callbacks.catalog.registry import TECHNIQUES

from .markdown import directive, page

PACKAGES = ("trainer", "callbacks", "recipes", "cluster")
# Names that stand in modules of their own: where an engine or a tool starts
MORE = {
    "cluster": (
        "engine.Engine", "engine.JobRecord", "job.Job", "job.make_job", "load.load_cluster", "launch.dry_run",
        "launch.submit", "launch.status",
    ),
}  # fmt: skip


def pages() -> dict[str, str]:
    index = page(
        "# Python",
        "The public names, by package. `import shoestring.trainer` is light: names are loaded on first use.",
        "```{toctree}\n:maxdepth: 2\n\n" + "\n".join(PACKAGES) + "\n```",
    )
    documented: dict[int, str] = {}  # an object -> the page that has it
    return {"api/index.md": index, **{f"api/{package}.md": _page(package, documented) for package in PACKAGES}}


def _page(package: str, documented: dict[int, str]) -> str:
    module = import_module(f"shoestring.{package}")
    techniques = {home.partition(":")[2] for home in TECHNIQUES.values()}
    names = [name for name in module.__all__ if name not in techniques]
    parts = []
    for name in names:
        home = documented.setdefault(id(getattr(module, name)), package)
        again = f"## {name}\n\nThe same as [in shoestring.{home}]({home}.md)."
        parts.append(_documented(f"shoestring.{package}", name) if home == package else again)
    parts += [_documented(f"shoestring.{package}.{home.partition('.')[0]}", home.partition(".")[2])
              for home in MORE.get(package, ()) if _exists(f"shoestring.{package}", home)]  # fmt: skip
    link = "Every technique has [a page of its own](../techniques/index.md)." if package == "callbacks" else ""
    return page(
        f"# shoestring.{package}", directive("automodule", f"shoestring.{package}", ":no-members:"), link, *parts
    )


def _exists(package: str, home: str) -> bool:
    module, _, name = home.partition(".")
    return hasattr(import_module(f"{package}.{module}"), name)


def _documented(module: str, name: str) -> str:
    member = getattr(import_module(module), name)
    if not inspect.isclass(member):
        kind = "autofunction" if callable(member) else "autodata"
        return f"## {name}\n\n" + directive(kind, f"{module}.{name}")
    plain = issubclass(member, BaseException) or hasattr(member, "model_fields")  # keys of a recipe have their own page
    options = () if plain else (":members:", ":member-order: bysource")
    return f"## {name}\n\n" + directive("autoclass", f"{module}.{name}", *options)
