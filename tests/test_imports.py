"""The shape of the package: who may import whom, what stays light, and that everything is shipped."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[1]
ROOMS = ("trainer", "callbacks", "recipes", "cluster")
MODULES = sorted(p.relative_to(ROOT) for room in ROOMS for p in (ROOT / room).rglob("*.py"))
LIGHT = ("recipes", "cluster", "trainer", "trainer.cli", "trainer.ledger", "callbacks", "callbacks.contract",
         "callbacks.compose", "callbacks.clock", "callbacks.budget", "callbacks.registry")  # fmt: skip


def imports(path: Path) -> set[str]:
    """The rooms that a module reaches into by relative imports, its own aside."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parent.parts[: len(path.parent.parts) - node.level + 1]
            target = (*base, *(node.module or "").split("."))
            found.add(target[0] or "root")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not any((n or "").split(".")[0] == "shoestring" for n in names), f"{path} imports itself absolutely"
    return {room for room in found if room in ROOMS} - {path.parts[0]}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_trainer_knows_the_others(path: Path) -> None:
    if path.parts[0] != "trainer":
        assert imports(path) == set()


def test_the_trainer_does_know_them() -> None:
    assert set().union(*(imports(p) for p in MODULES if p.parts[0] == "trainer")) == {"callbacks", "recipes", "cluster"}


def test_techniques_do_not_know_one_another() -> None:
    from shoestring.callbacks.registry import TECHNIQUES

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
    names = ", ".join(f"shoestring.{name}" for name in LIGHT)
    check = f"import sys, {names}; heavy = {{'torch', 'pytorch_lightning', 'transformers', 'wandb'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{check}; assert not heavy, heavy"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_imports(path: Path) -> None:
    name = ".".join(("shoestring", *path.with_suffix("").parts)).removesuffix(".__init__")
    assert importlib.import_module(name).__name__ == name


def test_pyproject_lists_every_package() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {"shoestring", *(".".join(("shoestring", *p.parent.parts)) for p in MODULES)}
    assert set(told) == there


def test_public_names() -> None:
    from shoestring.callbacks import Card, GradualPruning, Technique, compose
    from shoestring.recipes import load_recipe
    from shoestring.trainer import Budget, Ledger, Trainer, fit, plan

    assert all(callable(x) for x in (Card, compose, load_recipe, Budget, Ledger, Trainer, fit, plan))
    assert issubclass(GradualPruning, Technique)
