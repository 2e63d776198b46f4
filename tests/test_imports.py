"""The shape of the package: who may import whom, what stays light, and that everything is shipped."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[1]
ROOMS = ("trainer", "callbacks", "recipes", "cluster")
MODULES = sorted(p.relative_to(ROOT) for room in ROOMS for p in (ROOT / room).rglob("*.py"))
GROUND = sorted(p.relative_to(ROOT) for p in ROOT.glob("*.py") if p.name != "__init__.py")  # what rooms share
LIGHT = ("recipes", "cluster", "trainer", "trainer.cli", "trainer.ledger", "callbacks", "callbacks.contract",
         "callbacks.catalog.compose", "callbacks.accounting.clock", "callbacks.accounting.budget",
         "callbacks.catalog.registry")  # fmt: skip


NEUTRAL = {"accounting", "parameters", "sampling", "forward"}  # of callbacks: what techniques of any kind act through


FILES = {p.with_suffix("").parts: p for p in [*MODULES, *GROUND]}  # a package's own is (…, "__init__")


@cache
def imported(path: Path) -> set[Path]:
    """The modules of ours that a module imports: at once, when asked for, or for type checkers alone."""
    targets: set[Path] = set()
    nodes: list[ast.AST] = [ast.parse((ROOT / path).read_text())]
    while nodes:
        node = nodes.pop()
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parent.parts[: len(path.parent.parts) - node.level + 1]
            target = (*base, *(node.module.split(".") if node.module else ()))
            for name in node.names:
                places = ((*target, name.name), (*target, name.name, "__init__"), target, (*target, "__init__"))
                targets |= {FILES[place] for place in places if place in FILES}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not any((n or "").split(".")[0] == "shoestring" for n in names), f"{path} imports itself absolutely"
    return targets - {path}


def imports(path: Path) -> set[str]:
    """The rooms that a module reaches into, its own and the ground floor aside."""
    return {target.parts[0] for target in imported(path) if target not in GROUND} - {path.parts[0]}


def circle(arrows: dict[str, set[str]]) -> set[str]:
    """Who is left when all that import nobody who is left have gone, and then all whom nobody imports."""
    left = dict(arrows)
    for forward in (True, False):
        while True:
            pointed = set().union(*(arrows[one] & left.keys() for one in left))
            gone = [one for one in left if not (arrows[one] & left.keys() if forward else one in pointed)]
            if not gone:
                break
            for one in gone:
                del left[one]
    return set(left)


def test_circles_are_detected() -> None:
    line = {"a": {"b"}, "b": {"c"}, "c": set(), "d": {"c"}}
    assert circle(line) == set()
    assert circle({**line, "c": {"b"}}) == {"b", "c"}, "and neither a nor d, which only lead there"


def test_no_circles_between_packages() -> None:
    arrows: dict[str, set[str]] = {str(path.parent): set() for path in MODULES}
    for path in MODULES:
        inner = len(path.parts) > 2  # a room's own modules and the packages in it are told apart below
        arrows[str(path.parent)] |= {str(t.parent) for t in imported(path) if inner and len(t.parts) > 2}
        arrows[str(path.parent)].discard(str(path.parent))
    assert {"callbacks/compression", "callbacks/sparsity", "trainer/export", "trainer/tasks"} < arrows.keys()
    assert not circle(arrows)


def test_no_circles_between_modules() -> None:
    arrows = {
        str(path): {str(target) for target in imported(path)}
        for path in [*MODULES, *GROUND]
        if path.name != "__init__.py"
    }
    assert not circle(arrows)


# the room's own `__init__.py` names every technique, for type checkers
@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.parts[0] == "callbacks" and p.parts[1:] != ("__init__.py",)], ids=str
)
def test_perspectives_do_not_know_one_another(path: Path) -> None:
    """Packages of techniques import what is neutral beside them, never each other, and nothing neutral imports them."""
    inside = {t.parts[1] for t in imported(path) if t.parts[0] == "callbacks" and len(t.parts) > 2}
    own = {path.parts[1]} if len(path.parts) > 2 else set()
    assert inside <= own | NEUTRAL


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_trainer_knows_the_others(path: Path) -> None:
    if path.parts[0] != "trainer":
        assert imports(path) == set()


@pytest.mark.parametrize("path", GROUND, ids=str)
def test_the_ground_floor_knows_no_room(path: Path) -> None:
    assert imported(path) <= set(GROUND)
    users = {room for room in ROOMS for p in MODULES if p.parts[0] == room and path in imported(p)}
    assert len(users) > 1, "what one room uses alone is that room's"


def test_the_trainer_does_know_them() -> None:
    assert set().union(*(imports(p) for p in MODULES if p.parts[0] == "trainer")) == {"callbacks", "recipes", "cluster"}


def test_techniques_do_not_know_one_another() -> None:
    from shoestring.callbacks.catalog.registry import TECHNIQUES

    homes = {home.partition(":")[0].rpartition(".")[2] for home in TECHNIQUES.values()}
    for home in TECHNIQUES.values():
        path = ROOT / "callbacks" / (home.partition(":")[0].replace(".", "/") + ".py")
        modules = {
            (node.module or "").rpartition(".")[2]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        assert not modules & homes, path


def test_light_packages_load_without_torch() -> None:
    names = ", ".join(f"shoestring.{name}" for name in (*LIGHT, *(path.stem for path in GROUND)))
    check = f"import sys, {names}; heavy = {{'torch', 'pytorch_lightning', 'transformers', 'wandb'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{check}; assert not heavy, heavy"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [*GROUND, *MODULES], ids=str)
def test_every_module_imports(path: Path) -> None:
    name = ".".join(("shoestring", *path.with_suffix("").parts)).removesuffix(".__init__")
    assert importlib.import_module(name).__name__ == name


def test_pyproject_lists_every_package() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {"shoestring", *(".".join(("shoestring", *p.parent.parts)) for p in MODULES)}
    assert set(packages) == there


def test_public_names() -> None:
    from shoestring.callbacks import Card, GradualPruning, Technique, compose
    from shoestring.recipes import load_recipe
    from shoestring.trainer import Budget, Ledger, Trainer, fit, plan

    assert all(callable(x) for x in (Card, compose, load_recipe, Budget, Ledger, Trainer, fit, plan))
    assert issubclass(GradualPruning, Technique)
