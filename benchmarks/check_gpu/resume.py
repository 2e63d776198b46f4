"""Step `resume`: a language model that is stopped by SIGTERM and resumed, against one that is not, to the bit."""

from __future__ import annotations

import os
import signal
import statistics
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from checks import Checks, main
from random_tokens import LLAMA_HALF_B, TINY, StepTimes, recipe_of, run
from toy import fingerprint

from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.machine.signals import Preempted


class Stop(pl.Callback):
    """Asks this process to stop, as a cluster does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def resume(checks: Checks) -> None:
    config = (
        {**LLAMA_HALF_B, "hidden_size": 768, "num_hidden_layers": 8, "intermediate_size": 3072} if checks.cuda else TINY
    )
    length, batch, steps = (1024, 8, 10) if checks.cuda else (32, 4, 8)
    same, seconds = {}, {}
    for wanted in (False, True):
        label = "deterministic" if wanted else "fastest"
        recipe = recipe_of(
            label, config, length=length, batch=batch, steps=steps, precision="bf16", deterministic=wanted,
            strategy={"name": "single"},
        )  # fmt: skip
        times = StepTimes()
        run(recipe, f"{label}-whole", times, saves=True)
        code = None
        try:
            run(recipe, f"{label}-broken", Stop(steps // 2), saves=True)
        except Preempted as stopped:
            code = stopped.code
        checks.holds("SIGTERM ends it with 85", code == 85)
        _, summary = run(recipe, f"{label}-broken", saves=True)
        checks.holds("it is resumed in the middle", 0 < summary["resumed_from"] < steps)
        finals = [fingerprint(load_weights(Path(f"{label}-{kind}") / "final")) for kind in ("whole", "broken")]
        same[wanted], seconds[wanted] = finals[0] == finals[1], statistics.median(times.seconds[2:])
        checks.figure(**{f"{label}_seconds_a_step": seconds[wanted], f"{label}_is_bit_equal": same[wanted]})
    if checks.cuda:
        checks.figure(cost_of_determinism=seconds[True] / seconds[False] - 1)
        checks.holds("deterministic: true resumes to the bit", same[True])
    else:
        checks.holds("a CPU resumes to the bit, with the key and without", all(same.values()))
        checks.needs("deterministic: true resumes to the bit on a GPU")


if __name__ == "__main__":
    main({"resume": resume})
