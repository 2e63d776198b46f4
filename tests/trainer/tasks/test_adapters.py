"""Adapters on layers that share their weight with others, and rows of which nothing is to be predicted."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from fits import llama
from torch.utils.data import DataLoader

from shoestring.recipes.schema import AdapterSpec, OptimizerSpec
from shoestring.trainer.export import write
from shoestring.trainer.export.trained import CannotExport
from shoestring.trainer.tasks.language import CausalLM
from shoestring.trainer.tasks.lora import add_adapter, merge_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merging_an_adapter_of_a_tied_layer_changes_that_layer_alone(target):
    model = llama(layers=1)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapted = add_adapter(model, AdapterSpec(rank=2, targets=(target, "q_proj")), "causal-lm").eval()
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.5)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        apart = adapted(input_ids=ids).logits
        merged = merge_adapter(adapted)
        assert torch.allclose(merged(input_ids=ids).logits, apart, atol=1e-5)
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert merged.config.tie_word_embeddings is False, "or a reload would tie them again"


def test_merging_leaves_layers_tied_that_have_no_adapter():
    model = llama(layers=1)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    merged = merge_adapter(add_adapter(model, AdapterSpec(rank=2, targets=("q_proj",)), "causal-lm"))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings


def test_an_export_of_another_loss_than_the_trained_model_is_refused():
    write._same_loss("hf", 2.0, 2.0005, torch.float32)
    write._same_loss("gguf-ready-safetensors", 2.0, 2.01, torch.float32)
    for after in (2.01, float("nan")):
        with pytest.raises(CannotExport, match=r"hf: the trained model has a loss of 2 on held-out samples"):
            write._same_loss("hf", 2.0, after, torch.float32)


def test_a_row_without_targets_counts_nothing():
    """Rows one by one, the second one masked altogether: the mean is over the tokens of the other two."""
    rows = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in (1, 5, 9)]
    rows[1]["labels"] = torch.full((8,), -100)
    module = CausalLM(llama(layers=1), OptimizerSpec())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    metrics = pl.Trainer(devices=1, **quiet).validate(module, DataLoader(rows, batch_size=1), verbose=False)[0]
    with torch.no_grad():
        wanted = sum(float(module.model(**{k: v[None] for k, v in rows[i].items()}).loss) for i in (0, 2)) / 2
    assert metrics["val_loss"] == pytest.approx(wanted, rel=1e-5)
