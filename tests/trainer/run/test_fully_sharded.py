"""FSDP2: what is whole and when, in which dtype, and the same training as under ddp."""

import json

import fully_sharded_ranks
import pytest
from fully_sharded_ranks import STEPS
from processes import succeed
from toy import ACCUMULATE

from shoestring.callbacks import StructuredPruning
from shoestring.callbacks.catalog.compose import compose
from shoestring.callbacks.contract import IncompatibleTechniques, Settings
from shoestring.strategies import Sharding
from shoestring.trainer.machine.facts import run_facts
from shoestring.trainer.run.zero import UnknownStrategy, make_strategy

CASES = [(s, "32-true", share) for s in ("ddp", "fsdp2") for share in (False, True)]
CASES += [(s, "bf16-mixed", False) for s in ("ddp", "fsdp2")]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of two ranks has seen, by case."""
    folder = tmp_path_factory.mktemp("fsdp2")
    succeed(fully_sharded_ranks.main, CASES, folder, world=2, folder=folder)
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "apart"), [("32-true False", 1e-6), ("32-true True", 1e-6), ("bf16-mixed False", 1e-2)]
)
def test_it_trains_as_ddp_does(case, apart, seen):
    for rank in seen:
        assert len(rank[f"fsdp2 {case}"]["losses"]) == STEPS * ACCUMULATE
        assert rank[f"fsdp2 {case}"]["losses"] == pytest.approx(rank[f"ddp {case}"]["losses"], abs=apart)
        assert rank[f"fsdp2 {case}"]["validated"] == pytest.approx(rank[f"ddp {case}"]["validated"], abs=apart)


def test_one_block_is_whole_at_a_time_and_a_rank_keeps_its_rows(seen):
    for rank in seen:
        one = rank["fsdp2 32-true False"]
        assert one["whole"][: 2 * ACCUMULATE] == [[True, False], [False, True]] * ACCUMULATE
        assert one["held"] == pytest.approx(one["parameters"] / 2, rel=0.1)
        assert rank["ddp 32-true False"]["whole"][0] == [True, True]
    assert sum(rank["fsdp2 32-true False"]["held"] for rank in seen) == seen[0]["fsdp2 32-true False"]["parameters"]


def test_blocks_that_share_a_weight_are_gathered_together(seen):
    assert all(whole == [True, True] for whole in seen[0]["fsdp2 32-true True"]["whole"])


def test_in_bf16_weights_are_gathered_in_bf16_and_masters_are_float32(seen):
    one = seen[0]["fsdp2 bf16-mixed False"]
    assert (one["dtypes"], one["masters"]) == (["torch.bfloat16"], ["torch.float32"])


def test_after_the_fit_it_evaluates_and_refuses_to_save_a_part_for_the_whole(seen):
    one = seen[0]["fsdp2 32-true False"]
    assert one["validated"][0] == pytest.approx(one["validated"][1], abs=1e-6)
    assert "no rank has them" in one["refused"]


def test_what_it_does_not_have_is_refused():
    with pytest.raises(UnknownStrategy, match="fp16 has a loss scale"):
        make_strategy("fsdp2", accelerator="cuda", settings=Settings(precision="16-mixed"))
    with pytest.raises(UnknownStrategy, match="offload 'optimizer' needs zero2 or zero3"):
        make_strategy("fsdp2", accelerator="cpu", offload="optimizer")
    with pytest.raises(UnknownStrategy, match="reduce_bucket does nothing with strategy 'fsdp2'"):
        make_strategy("fsdp2", accelerator="cpu", sharding=Sharding(reduce_bucket=1000))


def test_a_technique_that_does_not_go_with_it_says_so_in_its_card():
    with pytest.raises(IncompatibleTechniques, match="structured_pruning does not work with 'fsdp2'"):
        compose([StructuredPruning.example()], run_facts("fsdp2", "cpu"))
