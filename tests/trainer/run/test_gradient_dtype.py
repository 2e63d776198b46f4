"""What gradients are summed in, over micro-batches and ranks, where weights are bfloat16."""

import json

import gradient_ranks
import pytest
from processes import succeed

ZERO = [("zero1", "none"), ("zero2", "none"), ("zero2", "optimizer"), ("zero3", "none"), ("zero3", "parameters")]
CASES = [*((each, "none", "fp32", "auto") for each in ("ddp", "fsdp2"))]
CASES += [*((*case, dtype, "auto") for case in ZERO for dtype in ("fp32", "bf16"))]
CASES += [(f"zero{stage}", "none", "fp32", "small") for stage in (1, 2, 3)]
BF16 = 2.0**-8  # half the distance of numbers near 1
FP32 = 2.0**-24


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """strategy, offload, dtype, buckets -> the errors of the mean over 16 micro-batches on each of two ranks."""
    folder = tmp_path_factory.mktemp("gradients")
    succeed(gradient_ranks.main, CASES, folder, world=2, folder=folder, timeout=300)
    return {tuple(case.split()): by_name for case, by_name in json.loads((folder / "errors.json").read_text()).items()}


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "fp32"], ids="-".join)
def test_sums_in_float32_are_the_mean_of_float64(case, errors):
    """32 numbers are added, and each sum is rounded once: to float32 by default, as under ddp."""
    assert errors[case]["gradient"] <= 32 * FP32
    assert errors[case]["step"] <= 64 * FP32, "the optimizer steps by what the accessor shows"


@pytest.mark.parametrize("case", ZERO, ids="-".join)
def test_sums_in_bfloat16_are_thousands_of_times_as_far_from_it(case, errors):
    """By 16 bits, of which the bound for float32 has given away five: each of 32 sums may have been rounded."""
    rough = errors[(*case, "bf16", "auto")]["gradient"]
    assert 2**10 * 32 * FP32 < rough < 32 * BF16
