"""Distillation and early exits on the tasks as a recipe builds them: padded and packed sequences, classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import transformers
from torch.utils.data import DataLoader

from shoestring.callbacks import Distillation, EarlyExit
from shoestring.callbacks.compression.early_exit import run_until_sure
from shoestring.trainer.tasks.classify import Classifier
from shoestring.trainer.tasks.problems import SingleLabel

pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES = ("a", "b", "c")


def fit(module: pl.LightningModule, data: Any, techniques: list[Any], steps: int = 3) -> list[float]:
    """The losses of a few steps."""
    losses: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    trainer = pl.Trainer(
        max_steps=steps, limit_val_batches=0, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*techniques, Losses()],
    )  # fmt: skip
    torch.manual_seed(3)
    trainer.fit(module, data)
    return losses


@pytest.mark.parametrize("pack", [True, False])
def test_language_models_learn_from_a_saved_teacher(pack: bool, tiny: Any, tmp_path: Path) -> None:
    """Of another task's model, saved as Hugging Face does; its logits come from the cache the second time."""
    wider = {"config": {**tiny.llama, "hidden_size": 48}}
    tiny.task(model=wider).module.model.save_pretrained(tmp_path / "teacher")
    settings = {"teacher": str(tmp_path / "teacher"), "cache": str(tmp_path / "cache"), "top_k": 8}

    def run(*techniques: Any) -> list[float]:
        task = tiny.task(data={"pack": pack})
        torch.manual_seed(1)
        return fit(task.module, DataLoader(task.train, 8, collate_fn=task.collate), list(techniques))

    first, second = Distillation(**settings), Distillation(**settings)
    plain, distilled = run(), run(first)
    assert distilled != plain and all(torch.tensor(distilled).isfinite())
    assert run(second) == distilled
    assert (first.teacher_forwards, second.teacher_forwards) == (3, 0)
    assert run(EarlyExit(weight=0.5))[0] > plain[0]


def test_classifiers_learn_from_a_teacher_and_leave_early(tiny: Any) -> None:
    """Of padded sentences whose class is their first token."""

    def bert(layers: int) -> Any:
        torch.manual_seed(layers)
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
                max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip

    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(4, 32, (48, 8), generator=draw)
    ids[:, 0] = torch.arange(48) % 3 + 1
    mask = (torch.arange(8) < torch.randint(3, 9, (48, 1), generator=draw)).long()
    samples = [{"input_ids": i, "attention_mask": m, "labels": i[0] - 1} for i, m in zip(ids * mask, mask, strict=True)]
    data = DataLoader(samples, batch_size=16)
    optimizer = tiny.recipe(optimizer={"lr": 1e-2}).optimizer
    teacher = Classifier(bert(4), optimizer, SingleLabel(CLASSES))
    fit(teacher, data, [EarlyExit(weight=1.0)], steps=60)
    early = run_until_sure(teacher.model.eval(), input_ids=ids * mask, attention_mask=mask, threshold=0.9)
    assert (early.logits.argmax(-1) == ids[:, 0] - 1).float().mean() > 0.95
    assert early.mean_depth < 3
    student = Classifier(bert(2), optimizer, SingleLabel(CLASSES))
    taught = Distillation(teacher=teacher.model, labels=0.0, hidden=0.1, teacher_dtype="float32")
    fit(student, data, [taught], steps=60)
    with torch.no_grad():
        answers = student.model.eval()(input_ids=ids * mask, attention_mask=mask).logits.argmax(-1)
    assert (answers == ids[:, 0] - 1).float().mean() > 0.95, "learned without seeing a label"
