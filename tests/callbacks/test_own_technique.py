"""A technique of the user's own, named `module:attr` in a recipe: only with leave, and then like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import command

from shoestring.callbacks.catalog.registry import NotATechnique, technique_class
from shoestring.trainer.ledger import read

pytestmark = pytest.mark.filterwarnings("ignore")

CODE = '''
import pytorch_lightning as pl
from shoestring.callbacks.contract import Card, Technique, require

class ClipSign(Technique, pl.Callback):
    """The sign of the gradient, times `size`; 0 leaves it as it is."""

    card = Card(name="clip_sign", does="keeps the gradient's sign", reads={"gradients"}, writes={"gradients"})

    def __init__(self, *, size: float = 0.1) -> None:
        self.size = size

    def check(self) -> None:
        require(self.size >= 0, self, "size", "a number from 0")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.steps = getattr(self, "steps", 0) + 1
        for weight in pl_module.parameters() if self.size else ():
            weight.grad.sign_().mul_(self.size)

    def state_dict(self):
        return {"steps": getattr(self, "steps", 0)}

    def load_state_dict(self, state) -> None:
        self.steps = state["steps"]

def not_one():
    pass
'''
TRAIN = ("train", "digits", "strategy.name=single", "evaluation.at_end=false", "--run-dir", "run")
OWN = 'techniques=[{"own_code_of_a_test:ClipSign": {size: 0.01}}]'


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_code_of_a_test.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_code_of_a_test", raising=False)
    return tmp_path


def test_it_trains_and_goes_on_from_its_state(place, monkeypatch, capsys) -> None:
    assert command(monkeypatch, *TRAIN, OWN, "budget.steps=3", "--allow-code") == 0, capsys.readouterr().err
    assert "clip_sign" in json.dumps([row.fields for row in read(place / "run" / "events")])
    assert command(monkeypatch, *TRAIN, OWN, "budget.steps=5", "--allow-code") == 0, capsys.readouterr().err
    import torch

    newest = max((place / "run" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    assert torch.load(newest / "state.pt", weights_only=True)["callbacks"]["clip_sign"] == {"steps": 5}


@pytest.mark.parametrize(
    ("technique", "leave", "said"),
    [
        (OWN, (), "techniques.own_code_of_a_test:ClipSign: found own_code_of_a_test:ClipSign; allowed: a module:attr "
         "only with --allow-code"),
        ("techniques=['own_code_of_a_test:Missing']", ("--allow-code",), "cannot import 'own_code_of_a_test:Missing'"),
        ("techniques=['no_such_module_here:X']", ("--allow-code",), "No module named 'no_such_module_here'"),
        ("techniques=['own_code_of_a_test:not_one']", ("--allow-code",), "not a subclass of shoestring.callbacks"),
        ('techniques=[{"own_code_of_a_test:ClipSign": {size: -1}}]', ("--allow-code",), "allowed: a number from 0"),
        ('techniques=[{"own_code_of_a_test:ClipSign": {sise: 1}}]', ("--allow-code",), "did you mean 'size'?"),
    ],
)  # fmt: skip
def test_what_it_must_be(place, monkeypatch, capsys, technique, leave, said) -> None:
    assert command(monkeypatch, *TRAIN, technique, "budget.steps=3", *leave) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (place / "run").exists()


def test_from_python() -> None:
    assert technique_class("own_code_of_a_test:ClipSign").card.name == "clip_sign"
    with pytest.raises(NotATechnique, match="not_one"):
        technique_class("own_code_of_a_test:not_one")
