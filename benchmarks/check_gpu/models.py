"""Steps `train-*` and `lora-*`: large models for a few steps, their memory against the plan, their speed."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

from checks import Checks, main
from random_tokens import LLAMA_1B, LLAMA_3B, TINY, StepTimes, recipe_of, run

BEGAN = time.perf_counter()
MFU = 0.30  # at least, of a 1.2B model on one H100; 0.3 to 0.45 are expected


def train(checks: Checks, strategy: str, offload: str = "none") -> None:
    import torch

    from shoestring.trainer.machine.facts import peak

    steps = 2 if offload != "none" else 10
    length, micro = (2048, 4) if checks.cuda else (64, 2)
    recipe = recipe_of(
        f"train-{strategy}-{offload}", LLAMA_1B if checks.cuda else TINY, length=length, batch=micro, steps=steps,
        data={"micro_batch_size": micro}, strategy={"name": strategy, "devices": 1, "offload": offload},
        precision="bf16", techniques=["gradient_checkpointing"],
    )  # fmt: skip
    times = StepTimes()
    made, summary = run(recipe, "run", times)
    size, second = made.fitted.inputs.size, statistics.median(times.seconds[1:])
    planned, peak_bytes = made.fitted.memory.total, summary["peak_bytes"]
    flops = size.flops_per_token(length) * micro * length / second
    checks.figure(
        parameters=size.parameters, tokens_a_step=micro * length, seconds_a_step=second,
        tokens_per_second=micro * length / second, first_step_after_seconds=times.first - BEGAN,
        peak_gib=peak_bytes / 2**30, planned_gib=planned / 2**30, allocated_before_gib=times.allocated / 2**30,
        terms={term.name: term.bytes / 2**30 for term in made.fitted.memory.at(made.fitted.memory.moment)},
        tflops=flops / 1e12, loss=times.loss, seconds=summary["seconds"],
        data_wait=summary.get("data_wait"),
    )  # fmt: skip
    checks.holds(f"trains {steps} steps, its loss finite", summary["steps"] == steps and math.isfinite(times.loss))
    checks.holds_on_cuda("its peak is within what was planned", lambda: torch.cuda.max_memory_reserved() <= planned)
    if offload == "none":
        if checks.cuda:
            checks.figure(mfu=flops / peak("bf16", made.hardware)[0])
        checks.holds_on_cuda(f"MFU is at least {MFU:.0%}", lambda: flops / peak("bf16", made.hardware)[0] >= MFU)


def lora(checks: Checks, dtype: str, bytes_a_weight: float) -> None:
    length, micro = (2048, 1) if checks.cuda else (64, 2)
    recipe = recipe_of(
        f"lora-{dtype}", LLAMA_3B if checks.cuda else {**TINY, "hidden_size": 256, "intermediate_size": 768},
        length=length, batch=micro, steps=3, model={"dtype": dtype, "adapter": {"kind": "lora", "rank": 16}},
        data={"micro_batch_size": micro}, strategy={"name": "single"}, precision="bf16",
        techniques=["gradient_checkpointing"],
    )  # fmt: skip
    times = StepTimes()
    made, summary = run(recipe, "run", times)
    size = made.fitted.inputs.size
    frozen = size.parameters - size.trainable
    expected = size.inside * bytes_a_weight + (frozen - size.inside) * 2 + size.trainable * 4
    checks.figure(
        parameters=size.parameters, trained=size.trainable, kept_gb=times.bytes_kept / 1e9, expected_gb=expected / 1e9,
        peak_gib=summary["peak_bytes"] / 2**30, planned_gib=made.fitted.memory.total / 2**30,
        allocated_before_gib=times.allocated / 2**30, seconds_a_step=statistics.median(times.seconds[1:]),
        first_step_after_seconds=times.first - BEGAN,
    )  # fmt: skip
    checks.holds("trains 3 steps, its loss finite", summary["steps"] == 3 and math.isfinite(times.loss))
    checks.holds(
        "its weights are kept in the bytes that were claimed, to 5 %", abs(times.bytes_kept / expected - 1) < 0.05
    )
    checks.holds_on_cuda(
        "the device holds no more than them and a tenth", lambda: times.allocated < 1.1 * expected + 2**28
    )


STEPS: dict[str, Callable[[Checks], None]] = {
    f"train-{strategy}": partial(train, strategy=strategy) for strategy in ("single", "zero1", "zero2", "zero3")
}
STEPS["train-zero2-offload"] = partial(train, strategy="zero2", offload="optimizer")
STEPS |= {"lora-bf16": partial(lora, dtype="bf16", bytes_a_weight=2.0)}
STEPS |= {"lora-nf4": partial(lora, dtype="nf4", bytes_a_weight=0.516)}

if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    main(STEPS)
