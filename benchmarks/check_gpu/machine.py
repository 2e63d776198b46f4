"""Step `machine`: what is imported, what the doctor says, what a plan of quickstart chooses."""

from __future__ import annotations

import time

from checks import Checks, main


def machine(checks: Checks) -> None:
    began = time.perf_counter()
    import deepspeed
    import pytorch_lightning
    import torch
    import transformers

    checks.figure(import_seconds=time.perf_counter() - began)
    import shoestring.trainer
    from shoestring.recipes import load_recipe
    from shoestring.trainer import plan
    from shoestring.trainer.machine.doctor import diagnose
    from shoestring.trainer.machine.facts import facts, version

    here = facts()
    names = ("torch", "pytorch-lightning", "deepspeed", "transformers", "peft", "torchao", "triton", "flash-attn")
    versions = {"python": here.versions["python"], **{name: version(name) for name in names if version(name)}}
    findings = {finding.name: finding for finding in diagnose()}
    made = plan(load_recipe("quickstart"))
    chosen = {choice.what: choice.value for choice in made.choices}
    checks.figure(
        hardware=here.hardware, name=here.accelerators[0].name if here.accelerators else "", versions=versions,
        driver=findings["gpu"].found, cuda=torch.version.cuda, devices=len(here.accelerators), cpus=here.cpus,
        memory_gib=here.memory_bytes / 2**30, device_gib=[a.memory_bytes / 2**30 for a in here.accelerators],
        precision=made.precision, predicted=dict(made.predictions), imported=[
            module.__name__ for module in (deepspeed, pytorch_lightning, torch, transformers, shoestring.trainer)
        ],
    )  # fmt: skip
    wrong = [f"{finding.name}: {finding.found}" for finding in findings.values() if finding.ok is False]
    checks.figure(doctor=wrong)
    checks.holds("the doctor finds nothing that will fail", not wrong)
    checks.holds("quickstart is planned", "hardware" in chosen and made.world_size >= 1)
    checks.holds_on_cuda("the catalogue knows the device", lambda: here.hardware not in (None, "cpu"))
    checks.holds_on_cuda(
        "the device computes in bf16, and the plan does", lambda: here.bf16 and made.precision == "bf16"
    )
    checks.holds_on_cuda("energy is read from NVML", lambda: findings["nvml"].ok)


if __name__ == "__main__":
    main({"machine": machine})
