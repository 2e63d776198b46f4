"""Adapters of every kind: what they begin with and merge to, what a plan counts of them, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import adapted as support
import pytest
import torch
from fits import llama

from shoestring.recipes import RecipeError, recipe_from
from shoestring.recipes.adapters import KINDS
from shoestring.recipes.schema import AdapterSpec
from shoestring.trainer.checkpoint.weights import load_weights, weights_digest
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.export.trained import open_run
from shoestring.trainer.planning.sizes import size_of
from shoestring.trainer.tasks.adapter_kinds import FROM_BASE
from shoestring.trainer.tasks.lora import add_adapter, merge_adapter
from shoestring.trainer.tasks.quantized import QuantizedLinear
from shoestring.trainer.tasks.quantized_loading import make_quantized

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(1, 17)[None]
FORMS: list[dict[str, Any]] = [
    *({"kind": kind} for kind in KINDS), {"rslora": True}, {"kind": "dora", "rslora": True, "dropout": 0.1},
    *({"start": start} for start in ("gaussian", "orthogonal", "olora", "pissa")),
    {"kind": "miss", "dropout": 0.1}, {"kind": "gralora", "alpha": 4.0},
]  # fmt: skip


def spec(form: dict[str, Any]) -> AdapterSpec:
    return AdapterSpec(**{"rank": 2, **form} if form.get("kind") != "ia3" else form)


def named(form: dict[str, Any]) -> str:
    return " ".join(str(value) for value in form.values())


@pytest.mark.parametrize("base", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("form", FORMS, ids=named)
def test_an_adapter_begins_as_the_base_and_merges_to_what_it_computes(form, base):
    adapter = spec(form)
    if base != "fp32" and not KINDS[adapter.kind].quantized:
        return
    model = (llama() if base == "fp32" else make_quantized(llama, base)).eval()
    with torch.no_grad():
        alone = model(input_ids=IDS).logits
    torch.manual_seed(1)
    adapted = add_adapter(model, adapter, "causal-lm").eval()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    with torch.no_grad():
        rounded = base != "fp32" and adapter.start in ("olora", "pissa")  # the rest was quantized again
        assert (adapted(input_ids=IDS).logits - alone).abs().max() < (0.1 if rounded else 1e-6)
        for p in trained:
            p.add_(torch.randn_like(p) * 0.1)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained)
    with torch.no_grad():
        apart = adapted(input_ids=IDS).logits
        assert (apart - alone).abs().max() > 1e-4
        assert (merge_adapter(adapted)(input_ids=IDS).logits - apart).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_counts_what_is_trained(kind):
    fields = {
        "model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    adapter: dict[str, Any] = {"kind": kind} if kind == "ia3" else {"kind": kind, "rank": 4}
    model = {"task": "causal-lm", "config": fields, "tokenizer": {"train": "bpe"}, "adapter": adapter}
    recipe = recipe_from({"model": model, "data": {"source": "python-stdlib"}, "budget": {"steps": 1}})
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{key: value for key, value in fields.items() if key != "model_type"})
    adapted = add_adapter(LlamaForCausalLM(config), recipe.model.adapter, "causal-lm")
    assert size_of(recipe).trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("start", ["olora", "pissa"])
def test_what_a_start_leaves_of_a_quantized_base_is_nearer_to_the_weights(start):
    """Adapter and rest together are nearer than the base alone: only what is left is rounded."""
    whole, model = llama(hidden=32).model.layers[0].mlp.up_proj.weight, llama(hidden=32)
    layer = QuantizedLinear(model.model.layers[0].mlp.up_proj, "nf4")
    model.model.layers[0].mlp.up_proj = layer
    adapted = add_adapter(model, AdapterSpec(rank=16, alpha=16, start=start, targets=("up_proj",)), "causal-lm")
    merged = merge_adapter(adapted).model.layers[0].mlp.up_proj.weight
    assert (merged - layer.dequantized(torch.float32)).norm() < 0.2 * whole.norm()
    if start == "pissa":
        original = llama(hidden=32).model.layers[0].mlp.up_proj.weight
        assert (merged - layer.dequantized(torch.float32)).any() and torch.isfinite(original).all()


def test_a_start_takes_apart_no_weight_that_another_layer_has():
    model = llama(layers=1)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with pytest.raises(TaskError, match=r"pissa takes .* and lm_head has the weight of another layer"):
        add_adapter(model, AdapterSpec(rank=2, start="pissa", targets=("lm_head",)), "causal-lm")


@pytest.mark.parametrize(
    ("model", "strategy", "said"),
    [
        ({"adapter": {"kind": "hra"}, "dtype": "nf4"}, "auto", "ia3 | vera | randlora | oft beside model.dtype nf4"),
        ({"adapter": {"kind": "ia3", "rank": 2}}, "auto", "it has no effect on ia3"),
        ({"adapter": {"kind": "dora", "start": "pissa"}}, "auto", "start for kind lora"),
        ({"adapter": {"kind": "loha", "dropout": 0.1}}, "auto", "dropout for kind lora | dora | gralora | miss"),
        ({"adapter": {"kind": "dora"}}, "zero3", "lora with strategy.name zero3"),
        ({"adapter": {"kind": "vblora"}}, "auto", "not vblora: its vectors have one length"),
        ({"adapter": {"kind": "prompt_tuning"}}, "auto", "there is nothing to merge into the weights"),
        ({"adapter": {"start": "loftq"}}, "auto", "loftq beside model.dtype nf4 | int8"),
        ({"adapter": {"start": "loftq"}, "dtype": "nf4"}, "auto", "loftq with model.name"),
        ({"adapter": {"kind": "vera", "start": "loftq"}, "dtype": "nf4"}, "auto", "start for kind lora"),
        ({"adapter": {"kind": "dorra"}}, "auto", " | ".join(KINDS)),
    ],
)  # fmt: skip
def test_kinds_that_do_not_go_together_are_refused(model, strategy, said):
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = {"model": {"task": "causal-lm", "config": config, "tokenizer": {"train": "bpe"}, **model}}
    values |= {"data": {"source": "python-stdlib"}, "budget": {"steps": 1}, "strategy": {"name": strategy}}
    with pytest.raises(RecipeError) as error:
        recipe_from(values)
    assert said in " ".join(str(error.value).split())


RESUMED: list[tuple[dict[str, Any], str]] = [
    *(({"kind": kind}, "fp32") for kind in KINDS if kind != "lora"),
    ({"kind": "lora", "rslora": True, "dropout": 0.1}, "nf4"), ({"kind": "lora", "start": "pissa"}, "fp32"),
    ({"kind": "lora", "start": "pissa"}, "nf4"), ({"kind": "lora", "start": "olora"}, "fp32"),
    ({"kind": "dora"}, "nf4"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "dtype"), RESUMED, ids=lambda each: named(each) if isinstance(each, dict) else each)
def test_every_kind_resumes_to_the_bit(form, dtype, tmp_path):
    """What a start has taken out of the base is saved with it, and so is the rest."""
    config = {"model_type": "llama", **support.SHAPE, "num_hidden_layers": 1}
    support.whole_and_resumed(tmp_path, {"config": config, "adapter": form, "dtype": dtype}, "single")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert json.loads((broken / "summary.json").read_text())["resumed_from"] == 4
    assert weights_digest(whole / "final") == weights_digest(broken / "final")
    saved = load_weights(whole / "final")
    assert any(name.endswith("up_proj.base_layer.weight") for name in saved) == (form.get("start") in FROM_BASE)
    trained = open_run(whole)
    with torch.no_grad():
        apart = trained.as_run.eval()(input_ids=IDS).logits
        assert (trained.model(input_ids=IDS).logits - apart).abs().max() < 1e-5
