"""A run that has no memory left says what filled it, beside the plan, and what would need less."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from shoestring.callbacks import GradientCheckpointing
from shoestring.recipes import load_recipe
from shoestring.recipes.schema import OptimizerSpec
from shoestring.trainer import Trainer, fit, plan
from shoestring.trainer.monitor.out_of_memory import _computed, is_out_of_memory
from shoestring.trainer.run.out_of_memory import OutOfMemory
from shoestring.trainer.tasks import build
from shoestring.trainer.tasks.language import CausalLM

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
    assert [line.split(": ")[0] for line in said[6:9]] == ["  activations", "  logits", "  all else"]
    less = said[said.index("What needs less, the cheapest first:") + 1 :]
    assert any("data.micro_batch_size=" in line for line in less)
    assert any("techniques+=gradient_checkpointing" in line for line in less)
    journal = "".join(path.read_text() for path in (tmp_path / "events").iterdir())
    assert "can't allocate memory" in journal


class InTheLoss(pl.Callback):
    """Asks for a pebibyte where logits have just been made, or where backward begins."""

    def __init__(self, when: str) -> None:
        self.when = when

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if self.when == "backward":
            torch.empty(2**50, dtype=torch.uint8)

    def on_train_start(self, trainer, pl_module) -> None:
        def ask(module, args, output):
            if self.when == "forward" and module.training:
                torch.empty(2**50, dtype=torch.uint8)

        pl_module.model.get_output_embeddings().register_forward_hook(ask)


def test_what_a_compiler_traced_with_fills_no_memory() -> None:
    with FakeTensorMode():
        traced = (torch.ones(1 << 20, requires_grad=True) * 2).exp()  # keeps its result for backward
    real = torch.ones(3, requires_grad=True) * 2
    tensors = list(_computed(torch.device("cpu")))
    assert any(tensor is real for tensor in tensors)
    assert not any(tensor is traced for tensor in tensors)
    assert all(tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel())


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_and_logits_are_told_apart(when: str, checkpointed: bool) -> None:
    """Logits of the micro-batch, or what the loss keeps of them; what lies between blocks, or all in them."""
    rows, length, vocabulary, hidden, layers = 3, 32, 512, 16, 4
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(1, vocabulary, (2 * rows, length))
    data = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=rows)
    module = CausalLM(transformers.LlamaForCausalLM(config), OptimizerSpec(), chunked_loss=False)
    trainer = Trainer(
        techniques=[GradientCheckpointing()] if checkpointed else [], ledger=False, accelerator="cpu", max_steps=1,
        callbacks=[InTheLoss(when)], checkpoint_every=None,
    )  # fmt: skip
    gc.collect()
    left = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _computed(torch.device("cpu"))}
    with pytest.raises(RuntimeError, match="can't allocate memory") as error:
        trainer.fit(module, data)
    counted = error.value.held  # type: ignore[attr-defined]
    tokens = 4 * rows * length
    assert 0.95 * tokens * vocabulary < counted["logits"] <= tokens * vocabulary
    between = layers * tokens * hidden
    activations = counted["activations"] - sum(left.values())  # what other tests have left is in this process, too
    if checkpointed:
        assert between <= activations < 5 * between
    else:
        assert 8 * between < activations < 40 * between
    assert counted["weights"] == 4 * sum(p.numel() for p in module.parameters())


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
