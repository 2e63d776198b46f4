"""A quantized base is made once on a machine, and loading it takes little more than what is kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapted
import pytest
import torch
import transformers
from fits import llama

from shoestring.recipes.schema import ModelSpec
from shoestring.trainer import fit, plan
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.tasks import build_task
from shoestring.trainer.tasks.models import build_model
from shoestring.trainer.tasks.quantized import QuantizedLinear
from shoestring.trainer.tasks.shared_weights import keep_from_sending
from shoestring.trainer.tasks.weight_dtypes import Kept

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip


def built(task: str, dtype: str, cache, **model: object) -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    classes = None if task == "causal-lm" else ["a", "b"]
    spec = ModelSpec(task=task, **model)
    made = build_model(
        spec, task, tokenizer=None, sequence_length=8, classes=classes, kept=Kept("bf16", dtype), cache=cache
    )
    made.next_draw = float(torch.rand(1))
    return made


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_a_mapped_base_is_the_one_that_was_read(task, dtype, tmp_path):
    llama().save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    alone, *mapped = (built(task, dtype, cache, name=name) for cache in (None, *[tmp_path / "cache"] * 2))
    assert len(list((tmp_path / "cache" / "bases").glob("*/weights"))) == 1
    for other in mapped:
        assert other.drawn_weights == alone.drawn_weights == ({"score.weight"} if task != "causal-lm" else set())
        assert other.next_draw == alone.next_draw, "what is drawn next, such as an adapter, is the same"
        tensors = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in (alone, other)]
        assert tensors[0].keys() == tensors[1].keys()
        for name_, tensor in tensors[0].items():
            assert torch.equal(tensors[1][name_], tensor) and tensors[1][name_].dtype == tensor.dtype, name_
        assert other.config.to_dict() == alone.config.to_dict()


def test_new_weights_are_made_once_for_a_seed_and_a_shape(tmp_path):
    first, second = (
        built("causal-lm", "nf4", tmp_path, config={**SHAPE, "tie_word_embeddings": True}) for _ in range(2)
    )
    assert first.next_draw == second.next_draw
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert torch.isfinite(first(input_ids=torch.arange(1, 9)[None]).logits).all()
    built("causal-lm", "nf4", tmp_path, config={**SHAPE, "hidden_size": 32})
    assert len(list(tmp_path.glob("bases/*/weights"))) == 2


def test_writing_to_a_mapped_base_changes_no_file(tmp_path):
    first = built("causal-lm", "nf4", tmp_path, config=SHAPE)
    layer = next(part for part in first.modules() if isinstance(part, QuantizedLinear))
    layer.weight.data.zero_()
    again = built("causal-lm", "nf4", tmp_path, config=SHAPE)
    assert all(part.weight.any() for part in again.modules() if isinstance(part, QuantizedLinear))


def test_what_every_rank_has_mapped_is_sent_to_none(tmp_path):
    model = built("causal-lm", "nf4", tmp_path, config=SHAPE)
    model.requires_grad_(False).lm_head.requires_grad_()
    keep_from_sending(model)
    kept = {name for name, p in model.named_parameters() if hasattr(p, "ds_optim_param")}
    assert (
        kept
        == set(model._ddp_params_and_buffers_to_ignore)
        == dict(model.named_parameters()).keys() - {"lm_head.weight"}
    )


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "bases").write_text("no folder")
    with pytest.raises(TaskError, match=r"model: the weights cannot be kept in .*bases"):
        built("causal-lm", "nf4", tmp_path, config=SHAPE)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_that_no_file_has_are_drawn_and_a_new_head_stays_whole(kind: str, tmp_path: Path) -> None:
    """A classifier beside the files of a masked language model: its pooler is new, and its head is trained."""
    given = adapted.classes_beside(tmp_path, dtype=kind)
    first, again = (dict(build_task(given, workdir=tmp_path).module.named_parameters()) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    module = build_task(given, workdir=tmp_path).module
    base: Any = module.model.base_model.model  # type: ignore[union-attr]
    pooler = base.bert.pooler.dense.base_layer
    assert pooler.dequantized(torch.float32).std() == pytest.approx(0.02, rel=0.2), "as a new model draws it"
    assert not any("pooler" in name for name in module.frozen_base.weights)  # type: ignore[union-attr]
    assert base.classifier.modules_to_save.default.weight.is_floating_point()
    report = fit(plan(given), run_dir=tmp_path / "run")
    assert report is not None and report.summary["steps"] == 2
