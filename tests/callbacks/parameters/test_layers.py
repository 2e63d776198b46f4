"""Which weights techniques act on."""

from __future__ import annotations

import pytest
from torch import nn

from shoestring.callbacks.contract import IncompatibleTechniques
from shoestring.callbacks.parameters.layers import check_skip, owners, quantizable, trained_weights


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
        self.twin = nn.Linear(4, 4)
        self.twin.weight = self.blocks[0][0].weight  # one weight under two names
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 9)
        self.head.weight = self.embed.weight  # tied
        self.again = self.conv  # one layer under two names


BLOCKS = ["blocks.0.0.weight", "blocks.0.1.weight", "blocks.1.0.weight", "blocks.1.1.weight"]


def test_trained_weights_of_layers_each_once_and_never_an_embedding():
    model = Model()
    names = trained_weights(model)
    assert names == ["conv.weight", *BLOCKS]
    assert set(names) <= {name for name, _ in model.named_parameters()}, "a name that the accessor does not know"
    assert trained_weights(nn.Linear(3, 3)) == ["weight"]


def test_a_weight_is_left_out_under_any_of_its_names():
    assert trained_weights(Model(), ["twin.*"]) == ["conv.weight", *BLOCKS[1:]]
    assert trained_weights(Model(), ["again.*"]) == BLOCKS
    assert trained_weights(Model(), ["blocks.*", "conv.*"]) == []
    assert trained_weights(Model(), ["blocks.1.*", "conv.weight", "*.0.weight"]) == ["blocks.0.1.weight"]


def test_owners_are_all_layers_that_share_a_weight_frozen_ones_too():
    model = Model()
    layers = owners(model)
    assert list(layers) == ["conv.weight", *BLOCKS, "frozen.weight"]
    assert layers["blocks.0.0.weight"] == [model.blocks[0][0], model.twin]
    assert layers["conv.weight"] == [model.conv], "once, whatever it is called"


def test_adapters_are_not_quantized_and_what_they_wrap_is_named():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), LoraConfig(target_modules=["0"], modules_to_save=["1"])
    )
    layers = quantizable(model)
    wrapped, copied = "base_model.model.0.base_layer.weight", "base_model.model.1.modules_to_save.default.weight"
    assert list(layers) == [wrapped, copied], "neither LoRA's matrices nor the unused original"
    assert layers[wrapped][0].adapter is model.get_submodule("base_model.model.0")
    assert layers[copied][0].adapter is None


def test_a_pattern_that_matches_nothing_is_named_with_the_nearest_parameter():
    model = Model()
    check_skip(model, ["head.*", "twin.weight", "*.bias", "embed*", "blocks.?.1.*"], "rigl")
    with pytest.raises(
        IncompatibleTechniques, match=r"rigl: skip='hed\.weight' matches no parameter of Model\. Nearest: head\.weight"
    ):
        check_skip(model, ["conv.*", "hed.weight"], "rigl")
    with pytest.raises(IncompatibleTechniques, match=r"skip='head' matches no parameter"):
        check_skip(model, ["head"], "rigl")
    check_skip(model, ["head", "blocks.0.1"], "low_rank", layers=True)
    with pytest.raises(IncompatibleTechniques, match=r"skip='head\.\*' is one text; write a list"):
        check_skip(model, "head.*", "rigl")
