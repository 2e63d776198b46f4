"""hpZ of ZeRO++: neighbours hold a second copy of the weights, and nothing that is computed changes."""

from __future__ import annotations

import json

import hpz_ranks
import pytest
from processes import succeed

from shoestring.recipes import RecipeError, load_recipe
from shoestring.strategies import Sharding
from shoestring.trainer import plan
from shoestring.trainer.run.zero import UnknownStrategy, make_strategy

ZERO3 = ["strategy.name=zero3", "strategy.devices=4", "data.micro_batch_size=8"]


def test_a_second_copy_changes_no_bit_and_resumes_to_the_bit(tmp_path) -> None:
    succeed(hpz_ranks.main, tmp_path, world=2, folder=tmp_path, timeout=500)
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert seen["copied"] == seen["plain"]
        assert seen["again"]["losses"] == seen["copied"]["losses"][hpz_ranks.HALF :]
        assert all(seen["again"][key] == seen["copied"][key] for key in ("final", "states"))
        assert seen["stale"]["losses"] != seen["again"]["losses"], "a copy from before the checkpoint was read"


def test_the_plan_counts_it_and_refuses_what_cannot_be() -> None:
    terms = {
        hpz: plan(load_recipe("quickstart", [*ZERO3, f"strategy.hpz={hpz}"])).predictions["memory_terms"]
        for hpz in (1, 2)
    }
    assert "second copy of the weights" not in terms[1]
    assert terms[2]["second copy of the weights"] == pytest.approx(2 * terms[2]["weights"]), "of 2 ranks, not of 4"
    with pytest.raises(RecipeError, match=r"strategy\.hpz: found 3; allowed: a number that divides all ranks: 4"):
        load_recipe("quickstart", [*ZERO3, "strategy.hpz=3"])
    with pytest.raises(RecipeError, match=r"hpz only with strategy\.name zero3"):
        load_recipe("quickstart", ["strategy.name=zero2", "strategy.hpz=2", "strategy.devices=2"])


def test_quantized_weights_are_for_gpus() -> None:
    recipe = load_recipe("quickstart", [*ZERO3, "strategy.quantized_weights=true"])
    with pytest.raises(RecipeError, match=r"strategy\.quantized_weights: .*needs GPUs: DeepSpeed's kernels"):
        plan(recipe)
    with pytest.raises(UnknownStrategy, match="quantized_weights needs GPUs"):
        make_strategy("zero3", accelerator="cpu", sharding=Sharding(quantized_weights=True))
    strategy = make_strategy("zero3", accelerator="cpu", sharding=Sharding(hpz=2))
    assert strategy.config["zero_optimization"]["zero_hpz_partition_size"] == 2
