"""What a type checker sees of the public API: a misspelt name or setting is an error, and what is right has none."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import pytorch_lightning as pl

import shoestring.callbacks
import shoestring.trainer
import shoestring.trainer.ledger
from shoestring.callbacks.catalog.registry import HOMES
from shoestring.trainer.run.options import LightningOptions

ROOT = Path(__file__).parents[1]

# each line that ends in "# wrong" has to be an error, and no other line may be one
CLIENT = """\
import pytorch_lightning as pl
from shoestring.callbacks import Accountant, Card, LRSchedule, RigL, SequenceLengthWarmup, Technique, compose, make
from shoestring.callbacks import Rigl  # wrong
from shoestring.recipes import load_recipe
from shoestring.trainer import Budget, Ledger, Trainer, fit, plan
from shoestring.trainer import Tariner  # wrong
from shoestring.trainer.ledger import Jurnal  # wrong
from shoestring.trainer.tasks import build_taks  # wrong

techniques: list[Technique] = [RigL(sparsity=0.9, every=50), SequenceLengthWarmup(start=32)]
trainer = Trainer(
    budget=Budget(usd=20, hours=2.5), techniques=techniques, strategy="zero2", devices=8,
    max_epochs=3, gradient_clip_val=1.0, callbacks=[pl.Callback()], precision="bf16-mixed", logger=False,
)
trainer.fit(pl.LightningModule(), datamodule=pl.LightningDataModule())
trainer.fit(pl.LightningModule(), datamoduel=pl.LightningDataModule())  # wrong
pl.Trainer(callbacks=[RigL(sparsity=0.9), LRSchedule(shape="cosine"), Accountant(Budget(hours=2))])
made = plan(load_recipe("quickstart", ["budget.usd=1"]))
report = fit(made, run_dir="runs/first", num_sanity_val_steps=0)
names: list[str] = [run.name for run in Ledger().runs()]
ordered: tuple[Technique, ...] = compose([make("rigl", {"sparsity": 0.9})]).techniques
Card(name="mine", does="one line", writes={"weights"}, saves={"size"}, needs={"cuda"})

RigL(sparsty=0.9)  # wrong
RigL(sparsity="much")  # wrong
RigL(0.9)  # wrong
LRSchedule(shpae="cosine")  # wrong
Trainer(budjet=Budget(usd=1))  # wrong
Trainer(max_epoch=3)  # wrong
Trainer(techniques=[1])  # wrong
Budget(usdd=1)  # wrong
fit(made, rundir="runs/first")  # wrong
made.world_sise  # wrong

reveal_type(Trainer)
reveal_type(plan(load_recipe("quickstart")))
reveal_type(report)
reveal_type(trainer.summary)
"""
WRONG = {number for number, line in enumerate(CLIENT.splitlines(), 1) if line.endswith("# wrong")}
# as in the client's project; large packages, whose types are not asked for here, would take a minute to read. Lightning
# is followed: to classes whose base mypy does not know it would let pass any argument
MYPY = """\
[mypy]
follow_imports = silent
ignore_missing_imports = True
[mypy-torch.*,torchmetrics.*,lightning_utilities.*,numpy.*,transformers.*,datasets.*,peft.*,torchao.*,deepspeed.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of somebody else's that has this package among its libraries."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "libraries").mkdir()
    (folder / "libraries" / "shoestring").symlink_to(ROOT)
    (folder / "client.py").write_text(CLIENT)
    return folder


def mypy(folder: Path) -> dict[int, list[str]]:
    """Line -> what mypy says of it, its kind first."""
    (folder / "mypy.ini").write_text(MYPY)
    command = [sys.executable, "-m", "mypy", f"--cache-dir={folder / 'cache'}", "client.py"]
    environment = {**os.environ, "MYPYPATH": "libraries"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    diagnostics: dict[int, list[str]] = {}
    for line, message in re.findall(r"^client\.py:(\d+): (.*)$", done.stdout, re.MULTILINE):
        diagnostics.setdefault(int(line), []).append(message)
    assert diagnostics, done.stdout + done.stderr
    return diagnostics


def pyright(folder: Path) -> dict[int, list[str]]:
    """Line -> what pyright says of it, its kind first."""
    settings = {"include": ["client.py"], "extraPaths": ["libraries"], "reportUnusedExpression": False}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    diagnostics: dict[int, list[str]] = {}
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        line = one["range"]["start"]["line"] + 1
        diagnostics.setdefault(line, []).append(f"{one['severity']}: {one['message']}")
    return diagnostics


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_checker_finds_what_is_misspelt_and_nothing_else(checker, client) -> None:
    diagnostics = checker(client)
    errors = {line: messages for line, messages in diagnostics.items() if "error:" in " ".join(messages)}
    assert errors.keys() == WRONG, {line: errors.get(line) for line in errors.keys() ^ WRONG}
    lines = CLIENT.splitlines()
    revealed = [" ".join(diagnostics[number]) for number, line in enumerate(lines, 1) if line.startswith("reveal_type")]
    trainer, planned, reported, summary = revealed
    assert re.search(r"(-> shoestring\.trainer\.run\.trainer\.Trainer|type\[Trainer\])\"$", trainer)
    assert re.search(r"(\.|\")Plan\"$", planned) and re.search(r"Report \| None\"", reported)
    assert "dict[str, Any]" in summary


def test_every_registered_technique_is_imported_for_checkers() -> None:
    """`trainer/__init__.py` lists by hand what it loads on first use; `callbacks/__init__.pyi` is the list itself."""
    for module in (shoestring.trainer, shoestring.trainer.ledger):
        source = Path(module.__file__ or "")
        imported = {
            alias.asname: "." * node.level + (node.module or "")
            for guard in ast.parse(source.read_text()).body
            if isinstance(guard, ast.If)
            for node in guard.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        homes = {name: home if home.startswith(".") else f".{home}" for name, home in module._HOMES.items()}
        missing = [
            f"    from {home} import {name} as {name}" for name, home in homes.items() if imported.get(name) != home
        ]
        assert not missing, f"add to `if TYPE_CHECKING` in {source.relative_to(ROOT)}:\n" + "\n".join(missing)
        assert imported.keys() == homes.keys(), f"{source.relative_to(ROOT)} imports what it does not load: remove it"
    for name, home in HOMES.items():
        assert getattr(shoestring.callbacks, name) is getattr(import_module(f"shoestring.callbacks.{home}"), name)
    assert shoestring.callbacks.__all__ == sorted(HOMES)


def test_lightning_options_are_those_of_lightning() -> None:
    own = set(inspect.signature(shoestring.trainer.Trainer.__init__).parameters) - {"lightning"}
    lightnings = set(inspect.signature(pl.Trainer.__init__).parameters)
    assert LightningOptions.__annotations__.keys() == lightnings - own
