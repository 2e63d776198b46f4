"""A run that has no memory left says what filled it, beside the plan, and what would need less."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from shoestring.recipes import load_recipe
from shoestring.trainer import fit, plan
from shoestring.trainer.monitor.out_of_memory import is_out_of_memory
from shoestring.trainer.run.out_of_memory import OutOfMemory
from shoestring.trainer.tasks import build

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = ["data.limit=20", "model.tokenizer.vocab_size=300", "evaluation={at_end: false}", "tracking.ledger=false"]
CHANGES = [*SMALL, "budget={steps: 3}", "strategy={name: single}", "export=null", "techniques=[]"]


class TooMuch(pl.Callback):
    """Asks for a pebibyte in the second step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 1:
            torch.empty(2**50, dtype=torch.uint8)


def test_what_filled_the_memory_is_said(tmp_path: Path) -> None:
    made = plan(load_recipe("quickstart", CHANGES))
    with pytest.raises(OutOfMemory) as error:
        fit(made, run_dir=tmp_path, callbacks=[TooMuch()])
    assert error.value.exit_code == 1
    said = str(error.value).splitlines()
    assert said[0].startswith("out of memory: ") and "can't allocate memory" in said[0]
    parameters = made.predictions["parameters"]
    size = f"{4 * parameters / 2**20:.1f} MiB"
    assert said[2] == f"  weights: {size} (planned {size})"
    assert said[4] == f"  gradients: {size} (planned {size})"
    twice = f"{8 * parameters / 2**20:.1f} MiB"
    assert said[5] == f"  optimizer states: {twice} (planned {twice})"
    assert said[6].startswith("  activations, logits and buffers: ")
    less = said[said.index("What needs less, the cheapest first:") + 1 :]
    assert any("data.micro_batch_size=" in line for line in less)
    assert any("techniques+=gradient_checkpointing" in line for line in less)
    journal = "".join(path.read_text() for path in (tmp_path / "events").iterdir())
    assert "can't allocate memory" in journal


def test_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def huge(*args, **settings):
        return bytearray(2**60)

    monkeypatch.setattr(build, "build_model", huge, raising=True)
    with pytest.raises(OutOfMemory, match="ran out before the first step"):
        fit(plan(load_recipe("quickstart", CHANGES)), run_dir=tmp_path)


def test_what_is_taken_for_it() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
