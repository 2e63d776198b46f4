"""Every registered technique under every strategy: one process group each, in which they train one after another.

The ranks only train and write down what they saw (tests/support/ranks.py); what must hold is said here.
"""

import json
import shutil
from functools import cache

import pytest
import ranks
import torch
from processes import last_words, succeed
from safetensors.torch import load_file
from toy import ACCUMULATE, DEVICE, STEPS

from shoestring.callbacks.catalog.registry import names, technique_class
from shoestring.callbacks.sparsity.masks import Masking

# NCCL gives every rank a GPU of its own: on a machine with one, only what needs no second rank is shown
RANKS = 2 if DEVICE == "cpu" or torch.cuda.device_count() > 1 else 1
STRATEGIES = {"single": 1, **dict.fromkeys(("ddp", "zero1", "zero2", "zero3", "fsdp2"), RANKS)}
SEVERAL = [name for name, world in STRATEGIES.items() if world > 1]
ZERO = [name for name in STRATEGIES if name.startswith("zero")]
NAMES = [name for name in names() if ranks.wanted(name)]
GO = [(s, name) for s in STRATEGIES for name in NAMES if not ranks.refused(s, name)]
THOROUGH = [(s, name) for s, name in GO if ranks.thorough(s, name)]
ABSENT = [(s, "absent") for s in STRATEGIES if ranks.wanted("absent")]
TOPOLOGY = [s for s in STRATEGIES if s != "fsdp2"]
# how far 12 steps under one strategy may drift from those under another: sums are taken in another order
FP32, BF16 = 2e-5, 6e-2
# A float that lies between two codes may fall to either: it then moves by 1/127 of its token's largest, and losses by
# up to 1e-3 in 12 steps. How many do depends on the CPU's order of summing; `in_double_precision` has none.
CODES = 5e-3
# decisions by threshold may fall differently where two numbers differ by rounding alone
FLIPPED = 0.01


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """strategy -> (what each rank reports, the folder of tensors); trained when first asked for."""

    @cache
    def train(strategy):
        folder = tmp_path_factory.mktemp(strategy)
        succeed(ranks.main, strategy, folder, world=STRATEGIES[strategy], folder=folder, timeout=600)
        shutil.rmtree(folder / "runs")
        return [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(STRATEGIES[strategy])], folder

    def case(strategy, name, *parts):
        reports_by_rank, folder = train(strategy)
        for report in reports_by_rank:
            assert "error" not in report[name], f"{report[name]['error']}\n{last_words(folder)}"
        reports = [report[name] for report in reports_by_rank]
        for part in parts:
            reports = [report[part] for report in reports]
        return reports

    case.folder = lambda strategy: train(strategy)[1]
    return case


def losses(reports) -> list[float]:
    """Mean loss of every global batch: micro-batches are equally large on all ranks."""
    each = [report["losses"] for report in reports]
    micro = [sum(losses) / len(each) for losses in zip(*each, strict=True)]
    return [sum(micro[i : i + ACCUMULATE]) / ACCUMULATE for i in range(0, len(micro), ACCUMULATE)]


def drift(one, other) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def tolerance(case: str) -> float:
    return {"mixed_precision": BF16, "quantization_aware": CODES}.get(case, FP32)


# -- every technique under every strategy ------------------------------------------------------------------------------
@pytest.mark.parametrize(("strategy", "case"), ABSENT + GO)
def test_trains_alike_on_all_ranks(strategy, case, ran):
    reports = ran(strategy, case, "whole")
    assert all(report["steps"] == STEPS for report in reports)
    assert all(report["samples"] == STEPS * 8 for report in reports)
    assert len({report["masters"] for report in reports}) == 1
    assert len({report["fragments"] for report in reports}) == 1
    assert len({report.get("here") for report in reports}) == 1, "ranks hold different weights"
    assert all(report.get("here") == report.get("rounded") for report in reports), "copies are not their masters'"
    assert sum(losses(reports)[-3:]) < sum(losses(reports)[:3])


@pytest.mark.parametrize(("strategy", "case"), ABSENT + THOROUGH)
def test_resumes_bit_for_bit(strategy, case, ran):
    """Crashed amid an accumulation window and an epoch, a step after the checkpoint; continued by a new trainer."""
    for whole, resumed in zip(ran(strategy, case, "whole"), ran(strategy, case, "resumed"), strict=True):
        assert (whole["resumed_from"], resumed["resumed_from"]) == (None, ranks.CHECKPOINT)
        assert resumed["losses"] == whole["losses"][ranks.CHECKPOINT * ACCUMULATE :]
        assert resumed["validations"] == [v for v in whole["validations"] if v[0] > ranks.CHECKPOINT]
        for kept in ("final", "masters", "fragments", "steps", "samples", "tokens", "stopped_by"):
            assert resumed[kept] == whole[kept], kept


def test_a_schedule_in_tokens_does_not_depend_on_when_is_saved(ran):
    for whole, resumed in zip(ran("ddp", "tokens", "whole"), ran("ddp", "tokens", "resumed"), strict=True):
        assert resumed["losses"] == whole["losses"][ranks.CHECKPOINT * ACCUMULATE :]
        assert resumed["final"] == whole["final"]


@pytest.mark.parametrize(("strategy", "name"), THOROUGH)
def test_strength_zero_equals_absence(strategy, name, ran):
    for noop, absent in zip(ran(strategy, name, "noop"), ran(strategy, "absent", "short"), strict=True):
        assert noop["losses"] == absent["losses"]
        assert noop["final"] == absent["final"]


@pytest.mark.parametrize(("strategy", "case"), [pair for pair in ABSENT + GO if pair[0] in SEVERAL])
def test_losses_are_those_of_one_device(strategy, case, ran):
    run = "still" if case == "absent" else "whole"  # dropout draws other numbers on other ranks
    alone, together = losses(ran("single", case, run)), losses(ran(strategy, case, run))
    assert drift(alone, together) < tolerance(case)


@pytest.mark.skipif(RANKS < 2, reason="needs two devices")
def test_what_is_rounded_does_not_depend_on_the_split_in_double_precision(ran):
    """Micro-batches are half as large on each of two ranks: a scale of more than one token would show at once."""
    alone, together = losses([ran("single", "double")[0]]), losses(ran("ddp", "double"))
    assert drift(alone, together) < 1e-6
    assert drift(alone, losses(ran("single", "quantization_aware", "whole"))) < CODES, "the same training"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_journal_has_every_step_with_its_loss(strategy, ran):
    report = ran(strategy, "absent", "whole")[0]
    assert report["rows"] == pytest.approx(losses([report]), rel=1e-6)


@pytest.mark.parametrize("run", ["sgd", "sgd-clipped"])
@pytest.mark.parametrize("strategy", SEVERAL)
def test_gradients_are_as_large_as_those_of_one_device(strategy, run, ran):
    """A mean over the global batch, however it is cut into micro-batches; Adam would hide a wrong factor."""
    assert drift(losses(ran("single", "absent", run)), losses(ran(strategy, "absent", run))) < FP32
    assert losses(ran("single", "absent", "sgd")) != losses(ran("single", "absent", "sgd-clipped"))


def test_print_losses_step_by_step(ran, capsys):
    curves = {strategy: losses(ran(strategy, "absent", "still")) for strategy in STRATEGIES}
    rows = ["", "loss of the same recipe, two ranks but for single", "step  " + "".join(f"{s:>12}" for s in curves)]
    rows += [f"{i + 1:4}  " + "".join(f"{curves[s][i]:12.7f}" for s in curves) for i in range(STEPS)]
    rows += ["drift " + "".join(f"{drift(curves['single'], curves[s]):12.1e}" for s in curves)]
    with capsys.disabled():
        print("\n".join(rows))
    assert all(drift(curves["single"], curves[s]) < FP32 for s in curves)


# -- sharding ----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(RANKS < 2, reason="needs two devices")
def test_optimizer_state_halves_from_ddp_to_zero1(ran, capsys):
    held = {strategy: [r["state_bytes"] for r in ran(strategy, "absent", "still")] for strategy in STRATEGIES}
    with capsys.disabled():
        print("\noptimizer state, bytes on each rank: " + ", ".join(f"{s} {held[s]}" for s in held))
    assert held["ddp"] == held["single"] * 2
    for strategy in ZERO:
        for rank in range(2):
            assert held[strategy][rank] / held["ddp"][rank] == pytest.approx(0.5, abs=0.03)
    assert held["fsdp2"][0] / held["ddp"][0] == pytest.approx(0.5, abs=0.05)  # of odd rows the first rank has one more
    assert sum(held["fsdp2"]) == pytest.approx(held["ddp"][0], rel=0.02)


@pytest.mark.skipif(RANKS < 2, reason="needs two devices")
@pytest.mark.parametrize("strategy", [*ZERO, "fsdp2"])
def test_nothing_is_whole_where_it_should_be_cut(strategy, ran):
    assert not any(report["whole"] for report in ran(strategy, "absent", "still"))


# -- masks and averages ------------------------------------------------------------------------------------------------
PRUNED = [name for name in names() if issubclass(technique_class(name), Masking)]  # weights, moments and gradients
MASKED = [(name, run) for name in PRUNED for run in ("whole", "resumed")]
MASKED += [("masks", "clipped"), ("masks", "bf16"), ("topology", "set"), ("topology", "rigl")]
WHOLE = [f"{name}-whole" for name in PRUNED]


def has(strategy: str, case: str, run: str) -> bool:
    """Whether there is such a training."""
    if case in ("masks", "topology"):
        return case == "masks" or strategy in TOPOLOGY
    return not ranks.refused(strategy, case) and (run == "whole" or ranks.thorough(strategy, case))


@pytest.mark.parametrize(("strategy", "run"), [(s, run) for s in STRATEGIES for run in MASKED if has(s, *run)])
def test_masked_is_exactly_zero_everywhere(strategy, run, ran):
    reports = ran(strategy, *run)
    for kind in ("masters", "moments", "gradients", "copies"):
        assert sum(report["leaks"][f"{kind} seen"] for report in reports) > 1000
        assert [report["leaks"][kind] for report in reports] == [0] * len(reports), kind
    if run[1] == "bf16" and strategy in ZERO:
        assert {report["copies"] for report in reports} == {"torch.bfloat16"}


def tensors(ran, strategy, case, prefix):
    loaded = load_file(ran.folder(strategy) / f"{case}.safetensors")
    return {name: tensor for name, tensor in loaded.items() if name.startswith(prefix)}


ALIKE = [*WHOLE, "masks-clipped", "topology-set", "topology-rigl"]


@pytest.mark.parametrize(("strategy", "case"), [(s, c) for s in SEVERAL for c in ALIKE if has(s, *c.split("-", 1))])
def test_masks_are_those_of_one_device(strategy, case, ran):
    ran(strategy, case.split("-")[0]), ran("single", case.split("-")[0])
    alone, together = tensors(ran, "single", case, "mask/"), tensors(ran, strategy, case, "mask/")
    assert alone.keys() == together.keys() and alone
    for name, mask in alone.items():
        assert mask.shape == together[name].shape
        assert abs(mask.sum() - together[name].sum()) <= 0.01 * mask.numel()
        assert (mask != together[name]).float().mean() <= FLIPPED, name
    pruned = 1 - sum(mask.sum() for mask in alone.values()) / sum(mask.numel() for mask in alone.values())
    assert pruned == pytest.approx(0.6, abs=0.01), "the example prunes to 60 %"


@pytest.mark.parametrize("name", ["set", "rigl"])
@pytest.mark.parametrize("strategy", TOPOLOGY)
def test_masks_are_the_same_on_all_ranks_after_fifty_steps_with_three_updates(strategy, name, ran):
    reports = ran(strategy, "topology", name)
    assert len({report["fragments"] for report in reports}) == len({report["masters"] for report in reports}) == 1
    assert all(report["updates"] == {name: 4} for report in reports), "the first masks, and three that moved"
    ran("single", "topology")
    alone, masks = (tensors(ran, each, f"topology-{name}", "mask/") for each in ("single", strategy))
    assert alone and all(torch.equal(mask, masks[n]) for n, mask in alone.items()), "the connections one process grows"


@pytest.mark.parametrize("strategy", SEVERAL)
def test_averages_are_those_of_one_device(strategy, ran):
    ran(strategy, "weight_averaging"), ran("single", "weight_averaging")
    for prefix in ("ema/", "master/"):
        alone, together = (tensors(ran, s, "weight_averaging-whole", prefix) for s in ("single", strategy))
        assert alone.keys() == together.keys() and alone
        for name, average in alone.items():
            assert (average - together[name]).abs().max() < 1e-3, name  # Adam enlarges rounding where gradients vanish
            assert (average - together[name]).abs().mean() < 1e-5, name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_average_is_the_final_model(strategy, ran):
    ran(strategy, "weight_averaging")
    averages = tensors(ran, strategy, "weight_averaging-whole", "ema/")
    finals = tensors(ran, strategy, "weight_averaging-whole", "master/")
    assert averages and all((averages[f"ema/{n.removeprefix('master/')}"] == f).all() for n, f in finals.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clustered_layers_end_with_few_values(strategy, ran):
    ran(strategy, "weight_clustering")
    finals = tensors(ran, strategy, "weight_clustering-whole", "master/")
    layers = {n: w for n, w in finals.items() if w.ndim == 2 and "embed" not in n}
    assert len(layers) == 5 and all(w.unique().numel() <= 8 for w in layers.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_trained_and_kept_are_the_factors(strategy, ran):
    ran(strategy, "low_rank")
    finals = tensors(ran, strategy, "low_rank-whole", "master/")
    assert finals["master/head.first.weight"].shape == (3, 11) and finals["master/head.second.weight"].shape == (7, 3)
    assert "master/head.weight" not in finals


# -- offload -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", sorted(ranks.OFFLOADS))
def test_offload_trains_the_same(strategy, ran):
    """Optimizer state in host memory (ZeRO-2), weights too (ZeRO-3): on a CPU the same place by another path."""
    offloaded = ran(strategy, "offload", "still")
    assert drift(losses(ran("single", "absent", "still")), losses(offloaded)) < FP32
    assert len({report["masters"] for report in offloaded}) == 1


@pytest.mark.parametrize("strategy", sorted(ranks.OFFLOADS))
def test_offload_resumes_bit_for_bit(strategy, ran):
    for whole, resumed in zip(ran(strategy, "offload", "whole"), ran(strategy, "offload", "resumed"), strict=True):
        assert resumed["resumed_from"] == ranks.CHECKPOINT
        assert resumed["final"] == whole["final"] and resumed["masters"] == whole["masters"]


@pytest.mark.parametrize("strategy", sorted(ranks.OFFLOADS))
def test_offloaded_masks_and_clipping(strategy, ran):
    reports = ran(strategy, "offload", "clipped")
    for kind in ("masters", "moments", "gradients", "copies"):
        assert [report["leaks"][kind] for report in reports] == [0] * len(reports), kind
    assert drift(losses(ran("single", "masks", "clipped")), losses(reports)) < FP32


@pytest.mark.parametrize("strategy", SEVERAL)
def test_clipping_sees_masked_gradients(strategy, ran):
    assert drift(losses(ran("single", "masks", "clipped")), losses(ran(strategy, "masks", "clipped"))) < FP32


# -- the step ----------------------------------------------------------------------------------------------------------
def test_nothing_blocks_in_the_step(ran):
    """Signals, budget and counters cost one asynchronous sum a step; DDP's own reduction is not Python's."""
    for report in ran("ddp", "collectives", "per_step"):
        assert report == ({"all_reduce": 1.0} if RANKS > 1 else {}), "alone, there is nothing to sum"
