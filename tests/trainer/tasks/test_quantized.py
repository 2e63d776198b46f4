"""Low-bit bases: their bytes, what they compute, how they are loaded, adapters beside them, and merging."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fits import llama

from shoestring.recipes import RecipeError, recipe_from
from shoestring.recipes.schema import AdapterSpec, ModelSpec
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.tasks.lora import add_adapter, merge_adapter
from shoestring.trainer.tasks.models import build_model
from shoestring.trainer.tasks.quantized import QuantizedLinear, weights_in
from shoestring.trainer.tasks.quantized_loading import make_quantized
from shoestring.trainer.tasks.weight_dtypes import Kept

pytestmark = pytest.mark.filterwarnings("ignore")
LORA = {"kind": "lora", "rank": 4}


def kept_bytes(layer: QuantizedLinear) -> int:
    return sum(p.numel() * p.element_size() for name, p in layer.named_parameters() if name != "bias")


@pytest.mark.parametrize(("kind", "size", "error"), [("nf4", 0.5159, 0.095), ("int8", 1.0079, 0.009)])
def test_a_layer_in_few_bits_takes_its_bytes_and_gives_its_gradient(kind, size, error):
    torch.manual_seed(0)
    full = torch.nn.Linear(512, 384)
    torch.nn.init.normal_(full.weight, std=0.02)
    layer = QuantizedLinear(full, kind)
    assert kept_bytes(layer) / full.weight.numel() == pytest.approx(size, abs=1e-3)
    off = (layer.dequantized(torch.float32) - full.weight).norm() / full.weight.norm()
    assert error / 2 < off < error
    x = torch.randn(2, 5, 512, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    layer.plain()(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in layer.parameters())
    before = layer.dequantized(torch.float32)
    assert torch.equal(layer.bfloat16().dequantized(torch.float32), before), "no cast rounds codes or scales"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_sizes_that_are_no_multiple_of_a_block_come_back():
    torch.manual_seed(0)
    full = torch.nn.Linear(7, 13)
    back = QuantizedLinear(full, "nf4").dequantized(torch.float32)
    assert back.shape == (13, 7) and (back - full.weight).abs().max() < 0.2 * full.weight.abs().max()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_read_from_a_file_layer_by_layer_is_what_quantizing_the_whole_gives(kind, tmp_path):
    torch.manual_seed(0)
    whole = llama()
    whole.save_pretrained(tmp_path)
    spec = ModelSpec(task="causal-lm", name=str(tmp_path))
    read = build_model(spec, "causal-lm", tokenizer=None, sequence_length=8, kept=Kept("fp32", kind))
    layers = {name: part for name, part in read.named_modules() if isinstance(part, QuantizedLinear)}
    assert len(layers) == 2 * 7, "every linear layer of both blocks, and not the output layer"
    for name, layer in layers.items():
        wanted = QuantizedLinear(whole.get_submodule(name), kind)
        assert torch.equal(layer.dequantized(torch.float32), wanted.dequantized(torch.float32)), name
    assert torch.equal(read.lm_head.weight, whole.lm_head.weight)
    assert weights_in(read) == weights_in(whole) == sum(p.numel() for p in whole.parameters())
    assert getattr(read.config, "quantization_config", None) is None, "it is saved in full"


def test_new_weights_are_quantized_as_they_are_made():
    made, whole = make_quantized(llama, "nf4"), llama()
    assert not any(p.is_meta for p in (*made.parameters(), *made.buffers()))
    assert torch.equal(made.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)
    weight = made.model.layers[1].mlp.up_proj.dequantized(torch.float32)
    assert weight.std() == pytest.approx(whole.config.initializer_range, rel=0.15)
    assert torch.isfinite(made(input_ids=torch.arange(1, 9)[None]).logits).all()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merged_is_the_base_and_the_adapters_together(kind):
    adapted = add_adapter(make_quantized(llama, kind), AdapterSpec(rank=2), "causal-lm").eval()
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        apart = adapted(input_ids=ids).logits
        merged = merge_adapter(adapted)
        assert (merged(input_ids=ids).logits - apart).abs().max() < 1e-5
    assert not any(isinstance(part, QuantizedLinear) for part in merged.modules())
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "precision", "base"),
    [("auto", "fp32", "float32"), ("auto", "bf16", "bfloat16"), ("fp32", "bf16", "float32"),
     ("bf16", "bf16", "bfloat16"), ("bf16", "fp32", "float32"), ("nf4", "bf16", "uint8"), ("int8", "fp32", "int8")],
)  # fmt: skip
@pytest.mark.parametrize("computed", ["compute", "float32"])
def test_adapters_have_float32_weights_whatever_the_base_is_in(tiny: Any, dtype, precision, base, computed):
    model = {"dtype": dtype, "adapter": {**LORA, "dtype": computed}}
    task = tiny.task(precision=precision, model=model)
    parameters = dict(task.module.named_parameters())
    assert {p.dtype for p in parameters.values() if p.requires_grad} == {torch.float32}
    (frozen,) = {str(p.dtype) for name, p in parameters.items() if name.endswith("q_proj.base_layer.weight")}
    assert frozen == f"torch.{base}"
    seen = []
    matrix = task.module.model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    matrix.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        task.module.model(input_ids=torch.arange(1, 9)[None])
    assert seen == [torch.bfloat16 if (computed, precision) == ("compute", "bf16") else torch.float32]


def test_a_full_model_keeps_float32_unless_zero_holds_masters(tiny: Any):
    for precision in ("fp32", "bf16"):
        assert {p.dtype for p in tiny.task(precision=precision).module.parameters()} == {torch.float32}
    recipe = tiny.recipe(model={"dtype": "bf16"}, strategy={"name": "zero2"})
    assert recipe.model.dtype == "bf16"


@pytest.mark.parametrize(
    ("model", "rest", "said"),
    [
        ({"dtype": "nf4"}, {}, "nf4 for the frozen base of a model.adapter"),
        ({"dtype": "bf16"}, {"strategy": {"name": "ddp"}}, "strategy ddp keeps no float32 masters of bf16 weights"),
        ({"dtype": "bf16", "adapter": LORA}, {"precision": "fp32"}, "bf16 with precision bf16 or auto"),
        ({"dtype": "int4", "adapter": LORA}, {}, "auto | fp32 | bf16 | nf4 | int8"),
    ],
)
def test_dtypes_that_cannot_be_are_refused(tiny: Any, model, rest, said):
    values = {"model": {"task": "causal-lm", "config": tiny.llama, "tokenizer": {"train": "bpe"}, **model}}
    values |= {"data": {"source": "python-stdlib"}, "budget": {"steps": 1}, **rest}
    with pytest.raises(RecipeError) as error:
        recipe_from(values)
    assert said in str(error.value)


def test_a_model_without_linear_layers_is_refused():
    fields = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    with pytest.raises(TaskError, match="a gpt2 has no linear layers to quantize"):
        build_model(
            ModelSpec(task="causal-lm", config=fields), "causal-lm", tokenizer=None, sequence_length=8,
            kept=Kept("fp32", "nf4"),
        )  # fmt: skip
