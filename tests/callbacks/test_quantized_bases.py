"""Every technique beside a base in few bits: refused by the plan with its reason, or the codes stay what they are."""

from __future__ import annotations

import pytest
import torch
from fits import llama

from shoestring.callbacks import IncompatibleTechniques
from shoestring.callbacks.catalog.registry import TECHNIQUES, declare
from shoestring.callbacks.parameters.layers import owners, quantizable, trained_weights
from shoestring.recipes import recipe_from
from shoestring.recipes.schema import AdapterSpec
from shoestring.trainer import plan
from shoestring.trainer.tasks.lora import add_adapter
from shoestring.trainer.tasks.quantized import QuantizedLinear
from shoestring.trainer.tasks.quantized_loading import make_quantized

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2}  # fmt: skip
EDIT_ALL_WEIGHTS = {"quantization_aware", "structured_pruning"}  # frozen ones too


def recipe(dtype: str, technique: str):
    model = {"task": "causal-lm", "config": CONFIG, "tokenizer": {"train": "bpe"}, "dtype": dtype,
             "adapter": {"kind": "lora", "rank": 2}}  # fmt: skip
    settings = {key: value for key, value in vars(type(declare(technique)).example()).items() if key[0] != "_"}
    named = {key: settings[key] for key in declare(technique).setting_names() if key in settings}
    return recipe_from(
        {
            "model": model, "data": {"source": "python-stdlib"}, "budget": {"steps": 1000},
            "strategy": {"name": "single"}, "techniques": [{technique: named}],
        }
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(EDIT_ALL_WEIGHTS))
def test_what_edits_frozen_weights_is_refused_before_anything_is_spent(name):
    with pytest.raises(IncompatibleTechniques, match=f"{name} does not work with 'model.dtype nf4 or int8'"):
        plan(recipe("nf4", name))
    assert name in {technique.card.name for technique in plan(recipe("auto", name)).declared}


def test_the_cards_say_which_they_are():
    assert {name for name in TECHNIQUES if "model.dtype nf4 or int8" in declare(name).card.refuses} == EDIT_ALL_WEIGHTS


def test_codes_are_nobodys_weights():
    """Pruning, clustering and rounding choose from these; adapters and what trains beside them stay."""
    adapted = add_adapter(make_quantized(llama, "nf4"), AdapterSpec(rank=2), "causal-lm")
    codes = {f"{name}.weight" for name, part in adapted.named_modules() if isinstance(part, QuantizedLinear)}
    assert len(codes) == 14
    for chosen in (owners(adapted), quantizable(adapted), trained_weights(adapted)):
        assert not codes & set(chosen)
    assert len(trained_weights(adapted)) == 28
    assert {adapted.get_parameter(name).dtype for name in owners(adapted)} == {torch.float32}
