"""Padded text: the loss is averaged per token over the whole global batch, however it is cut into micro-batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoestring.callbacks import SequenceLengthWarmup
from shoestring.recipes import recipe_from
from shoestring.trainer import Budget, Trainer
from shoestring.trainer.tasks import build_task
from shoestring.trainer.tasks.build import TaskData

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "it",
    "ran",
    "after",
    "one",
    "very",
    "small",
    "mouse",
    "until",
    "both",
    "were",
    "tired",
]


def weights_after_three_steps(home: Path, micro: int, blind: bool = False, warmup: bool = False) -> torch.Tensor:
    """Final weights of the same recipe with 8 samples a step in micro-batches of `micro`; `blind` drops the weights.

    warmup: rows are cut to 4 tokens.
    """
    recipe = recipe_from(
        {
            "model": {
                "task": "causal-lm",
                "config": {
                    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "intermediate_size": 32, "max_position_embeddings": 64,
                },
                "tokenizer": {"train": "bpe", "vocab_size": 300},
            },
            "data": {
                "source": str(home / "*.txt"), "pack": False, "batch_size": 8, "micro_batch_size": micro,
                "sequence_length": 32, "validation": 0.0,
            },
            "budget": {"steps": 3},
            "optimizer": {"name": "sgd", "lr": 0.5, "schedule": "constant", "warmup": "0%"},
        }
    )  # fmt: skip
    task = build_task(recipe, workdir=home)
    trainer = Trainer(
        Budget(steps=3),
        [SequenceLengthWarmup(start=4, until="1000 steps", multiple=4)] if warmup else [],
        run_dir=home / f"run-{micro}-{blind}-{warmup}",
        accelerator="cpu",
        accumulate_grad_batches=8 // micro,
    )
    if blind:
        step = task.module.training_step
        task.module.training_step = lambda batch, batch_idx: step(
            {**batch, "loss_weight": torch.tensor(1.0)}, batch_idx
        )
    trainer.fit(task.module, datamodule=TaskData(task, micro))
    return torch.cat([p.detach().flatten() for p in task.module.parameters()])


def test_accumulation_does_not_change_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path / "home"))
    for number in range(24):
        (tmp_path / f"{number}.txt").write_text(" ".join(WORDS[: 2 + number % 14]))
    whole, quarters = weights_after_three_steps(tmp_path, 8), weights_after_three_steps(tmp_path, 2)
    assert torch.allclose(whole, quarters, atol=1e-6)
    # without the weights the short samples of a micro-batch count for too much
    assert not torch.allclose(whole, weights_after_three_steps(tmp_path, 2, blind=True), atol=1e-4)
    # a row that is cut has fewer targets, in every micro-batch alike
    short = weights_after_three_steps(tmp_path, 8, warmup=True)
    assert torch.allclose(short, weights_after_three_steps(tmp_path, 2, warmup=True), atol=1e-6)
    assert not torch.allclose(short, whole, atol=1e-4)
