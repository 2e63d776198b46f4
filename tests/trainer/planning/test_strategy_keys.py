"""Keys of the section `strategy`: what does nothing is refused, by recipe or plan; the rest reaches the run."""

from __future__ import annotations

import re

import pytest

from shoestring.recipes import RecipeError, load_recipe
from shoestring.strategies import Sharding
from shoestring.trainer import plan
from shoestring.trainer.planning.fitting import CannotFit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["strategy.name=ddp", "strategy.overlap=true"], "overlap only with strategy.name zero1 | zero2 | zero3"),
        (["strategy.name=zero2", "strategy.prefetch=1000"], "prefetch only with strategy.name zero3"),
        (["strategy.name=zero3", "strategy.allgather_bucket=1000"], "only with strategy.name zero1 | zero2"),
        (["strategy.name=zero2", "strategy.allgather_bucket=1001"], "auto, or an even number of elements"),
        (["strategy.name=zero2", "strategy.gradient_dtype=bf16", "precision=fp32"], "fp32 with precision fp32"),
        (["strategy.name=fsdp2", "strategy.reduce_bucket=1000"], "only with strategy.name zero1 | zero2 | zero3"),
        (["strategy.name=fsdp2", "strategy.offload=optimizer"], "none with strategy.name fsdp2"),
        (["strategy.name=zero2", "strategy.offload=optimizer", "strategy.nvme=x"], "a folder with strategy.name zero3"),
        (["strategy.name=zero3", "strategy.nvme=x"], "zero3 and strategy.offload optimizer"),
        (["strategy.name=zero3", "strategy.offload=parameters", "strategy.nvme=x"], "weights stay on devices"),
        (["strategy.name=fsdp2", "precision=fp16"], "auto | fp32 | bf16 with strategy.name fsdp2"),
        (["strategy.name=fsdp2", "optimizer.in_backward=true"], "auto | single | ddp with optimizer.in_backward"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(changes: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        load_recipe("quickstart", changes)


def test_it_is_refused_where_the_plan_chooses_what_leaves_it_idle() -> None:
    recipe = load_recipe("quickstart", ["strategy.name=auto", "strategy.devices=1", "strategy.prefetch=1000"])
    with pytest.raises(RecipeError, match=r"strategy\.prefetch.*it does nothing with strategy single; remove it"):
        plan(recipe)
    slow = [
        "strategy.name=zero2",
        "strategy.devices=2",
        "strategy.gradient_dtype=bf16",
    ]  # no accelerator: computed in float32
    with pytest.raises(RecipeError, match="fp32 with precision fp32"):
        plan(load_recipe("quickstart", slow))


def test_fsdp2_is_taken_only_where_it_is_asked_for() -> None:
    assert plan(load_recipe("quickstart", ["strategy.name=fsdp2", "strategy.devices=2"])).strategy == "fsdp2"
    assert plan(load_recipe("quickstart", ["strategy.name=fsdp2", "strategy.devices=1"])).strategy == "fsdp2"
    shape = "{model_type: llama, vocab_size: 128256, hidden_size: 8192, num_hidden_layers: 80, num_attention_heads: 64}"
    given = [f"model.config={shape}", "export=null", "cluster.hardware=h100-sxm", "strategy.devices=8"]
    given += ["data.micro_batch_size=1"]
    for name in ("auto", "zero3"):
        with pytest.raises(CannotFit) as error:
            plan(load_recipe("quickstart", [*given, f"strategy.name={name}"]))
        assert "cheapest first:" in str(error.value) and "fsdp2" not in str(error.value)


def test_no_change_is_proposed_that_would_leave_a_key_idle() -> None:
    shape = "{model_type: llama, vocab_size: 128256, hidden_size: 4096, num_hidden_layers: 32, num_attention_heads: 32}"
    changes = [f"model.config={shape}", "export=null", "cluster.hardware=h100-sxm", "strategy.prefetch=1000"]
    with pytest.raises(CannotFit) as error:
        plan(load_recipe("quickstart", [*changes, "strategy.name=zero3", "strategy.devices=1"]))
    proposed = str(error.value).split("cheapest first:")[1]
    assert "strategy." in proposed and not any(f"strategy.name={name}" in proposed for name in ("zero1", "zero2"))


def test_no_number_of_devices_is_proposed_that_a_second_copy_does_not_go_with() -> None:
    shape = "{model_type: llama, vocab_size: 128256, hidden_size: 8192, num_hidden_layers: 99, num_attention_heads: 64}"
    changes = [f"model.config={shape}", "export=null", "cluster.hardware=h100-sxm", "strategy.name=zero3"]
    changes += ["strategy.devices=3", "data.batch_size=192", "data.micro_batch_size=1"]
    proposed = {}
    for hpz in (1, 3):
        with pytest.raises(CannotFit) as error:
            plan(load_recipe("quickstart", [*changes, f"strategy.hpz={hpz}"]))
        proposed[hpz] = str(error.value).split("cheapest first:")[1]
    assert "strategy.devices=4" in proposed[1] and "strategy.devices=" not in proposed[3]


def test_what_the_recipe_says_is_what_the_run_is_made_with() -> None:
    sizes = ["strategy.reduce_bucket=1000", "strategy.allgather_bucket=2000", "strategy.overlap=true"]
    made = plan(load_recipe("quickstart", ["strategy.name=zero2", "strategy.devices=2", *sizes]))
    assert made.sharding == Sharding(reduce_bucket=1000, allgather_bucket=2000, overlap=True)
