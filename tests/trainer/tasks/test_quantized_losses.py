"""Adapters learn beside a low-bit base what they learn beside the whole one."""

from __future__ import annotations

import pytest
import torch

from shoestring.recipes.schema import AdapterSpec, ModelSpec
from shoestring.trainer.tasks.lora import add_adapter
from shoestring.trainer.tasks.models import build_model
from shoestring.trainer.tasks.weight_dtypes import Kept

pytestmark = pytest.mark.filterwarnings("ignore")
BASES = {"fp32": Kept(), "nf4": Kept("fp32", "nf4"), "int8": Kept("fp32", "int8")}


def curve(model: torch.nn.Module, batches: list[torch.Tensor], rate: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def test_the_loss_beside_a_quantized_base_is_within_a_percent_of_that_beside_the_whole_one(tiny, tmp_path):
    task = tiny.task()
    rows = torch.stack([task.train[i]["input_ids"] for i in range(160)])
    batches = list(rows.split(8))
    model = task.module.model
    first = curve(model, batches[:14] * 4, 3e-3)
    assert first[-1] < 0.8 * first[0], "it has been pretrained"
    model.save_pretrained(tmp_path / "model")
    spec = ModelSpec(task="causal-lm", name=str(tmp_path / "model"))
    curves = {}
    for name, kept in BASES.items():
        base = build_model(spec, "causal-lm", tokenizer=None, sequence_length=64, kept=kept, cache=tmp_path)
        torch.manual_seed(1)
        curves[name] = curve(add_adapter(base, AdapterSpec(rank=4), "causal-lm"), batches[14:] * 3, 3e-3)
    whole = curves.pop("fp32")
    assert whole[12] < whole[0], "of the same rows"
    for name, losses in curves.items():
        off = [abs(here - there) / there for here, there in zip(losses, whole, strict=True)]
        assert sum(off) / len(off) < 0.01 and off[-1] < 0.01, name
