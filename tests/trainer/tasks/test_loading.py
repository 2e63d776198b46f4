"""Loading takes little more than what is kept, the node together, and gives what transformers gives, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loading_ranks
import pytest
import torch
import transformers
from loading_ranks import KEPT, SHAPE, built
from processes import succeed

from shoestring.recipes.schema import ModelSpec
from shoestring.trainer.checkpoint.weights import load_weights

pytestmark = pytest.mark.filterwarnings("ignore")
AT_MOST = 1.3  # of the bytes that are kept
SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "intermediate_size": 32, **SMALL}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "bert": {"model_type": "bert", "intermediate_size": 32, "max_position_embeddings": 16, **SMALL},
    "experts": {**LLAMA, "model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 2},
}


def seen(strategy: str, world: int, folder: Path) -> list[dict[str, dict[str, Any]]]:
    shape = {key: value for key, value in SHAPE.items() if key != "model_type"}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(folder / "model")
    succeed(loading_ranks.main, strategy, str(folder / "model"), folder, world=world, folder=folder, timeout=300)
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(world)]


def test_alone_a_model_takes_little_more_than_what_is_kept(tmp_path: Path) -> None:
    (alone,) = seen("single", 1, tmp_path)
    assert alone["files fp32"]["peak"] < 1e5, "it is the map of its file"
    for kind in ("bf16", "nf4"):
        assert alone[f"files {kind}"]["peak"] <= AT_MOST * alone[f"files {kind}"]["whole"], kind
    assert alone["files nf4"]["whole"] < 0.6 * alone["files bf16"]["whole"]


def test_ranks_of_a_node_hold_one_frozen_base(tmp_path: Path) -> None:
    """What they hold is the file, whose pages they share; one of them makes it, weight by weight."""
    ranks = seen("ddp", 2, tmp_path)
    for kind in ("files fp32", "files bf16", "files nf4", "new bf16"):
        first, second = (rank[kind] for rank in ranks)
        assert first["sums"] == second["sums"] and first["sent"] == second["sent"] == [], kind
        assert first["peak"] + second["peak"] <= (AT_MOST - 1) * first["whole"] + first["largest"], kind
        assert first["alive"] + second["alive"] < 0.05 * first["whole"], kind


def test_no_rank_of_zero_3_holds_more_than_its_share_and_one_weight(tmp_path: Path) -> None:
    ranks = seen("zero3", 2, tmp_path)
    for kind in ranks[0]:
        source, kept = kind.split()
        spec = ModelSpec(
            task="causal-lm", **({"name": str(tmp_path / "model")} if source == "files" else {"config": SHAPE})
        )
        whole = {name: loading_ranks.digest(p) for name, p in built(spec, kept).named_parameters()}
        for rank in ranks:
            sizes = rank[kind]
            assert sizes["sums"] == whole, f"{kind}: the same weights as on one device"
            assert sizes["share"] <= 0.51 * sizes["whole"] + 1024
            assert sizes["peak"] <= 1.02 * (sizes["share"] + sizes["largest"]), kind


def test_a_run_that_cuts_its_weights_trains_those_of_the_run_that_does_not(tmp_path: Path) -> None:
    for strategy, world in (("single", 1), ("zero3", 2)):
        succeed(loading_ranks.train, strategy, world, tmp_path, world=world, folder=tmp_path, timeout=300)
        assert not (tmp_path / strategy / ".passing").exists(), "nobody needs the files once weights are cut"
    single, zero3 = (load_weights(tmp_path / strategy / "final") for strategy in ("single", "zero3"))
    assert single.keys() == zero3.keys()
    assert all(torch.allclose(single[name], zero3[name], atol=1e-5) for name in single)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_in_a_file_is_the_one_in_memory(shape: str, dtype: str, tmp_path: Path) -> None:
    """New, from the same random numbers, and from files in parts; renamed, merged and tied weights among them."""
    new = ModelSpec(task="causal-lm", config=SHAPES[shape])
    built(new, "fp32").save_pretrained(tmp_path / "saved", max_shard_size="4KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    for spec in (new, ModelSpec(task="causal-lm", name=str(tmp_path / "saved"))):
        made = []
        for where in ({}, *[{"passing": tmp_path / "files"}] * 2):
            made.append((built(spec, dtype, **where), float(torch.rand(1))))
        (whole, drawn), *others = made
        for other, then_drawn in others:
            assert then_drawn == drawn, "what is drawn next, such as an adapter, is the same"
            tensors = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in (whole, other)]
            assert tensors[0].keys() == tensors[1].keys()
            for name, tensor in tensors[0].items():
                assert torch.equal(tensors[1][name], tensor) and tensors[1][name].dtype == tensor.dtype, name
            assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in whole.parameters()]
            in_memory = sum(p.numel() for p in other.parameters() if not hasattr(p, "mapped"))
            assert in_memory <= 32, "nothing of weight: one tied bias of bert's"
            assert KEPT[dtype].dtype in {p.dtype for p in other.parameters()}
