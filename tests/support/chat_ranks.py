"""What one rank does to show how trained tokens are weighed: the gradient of one global batch of chats."""

import logging
import warnings
from pathlib import Path

import pytorch_lightning as pl
from safetensors.torch import save_file

from shoestring.recipes import load_recipe
from shoestring.trainer import Budget, Trainer
from shoestring.trainer.tasks import build_task
from shoestring.trainer.tasks.build import TaskData

LENGTH = 72  # tokens: of two chats, or of one long one


class Gradient(pl.Callback):
    """Keeps the gradient of the first step."""

    def __init__(self):
        self.gradients = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, parameter in pl_module.named_parameters():
            self.gradients.setdefault(name, parameter.grad.clone())


def gradient(folder: Path, name: str, *, ranks: int, micro: int, pack: bool, samples: int) -> None:
    """Train one step on all samples at once and save the gradient under this name."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    recipe = load_recipe(
        "quickstart",
        [
            f"data.source={folder / 'chats.jsonl'}", "data.validation=0", f"data.sequence_length={LENGTH}",
            f"data.pack={str(pack).lower()}", f"data.batch_size={samples}", "data.micro_batch_size=auto",
            "model.config={model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
            "num_attention_heads: 2, num_key_value_heads: 2}",
            "model.tokenizer={train: bpe, vocab_size: 300}",
        ],
    )  # fmt: skip
    task, seen = build_task(recipe, workdir=folder), Gradient()
    assert len(task.train) == samples, len(task.train)
    trainer = Trainer(
        Budget(steps=1), [], callbacks=[seen], strategy="ddp" if ranks > 1 else "single", devices=ranks,
        accelerator="cpu", accumulate_grad_batches=samples // ranks // micro, limit_val_batches=0, logger=False,
        default_root_dir=folder, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(task.module, datamodule=TaskData(task, micro))
    if trainer.is_global_zero:
        save_file(seen.gradients, folder / f"{name}.safetensors")
