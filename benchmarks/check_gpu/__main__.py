"""What this project claims and no CPU can show: ten checks on one CUDA device, within ten minutes, without a network.

    python benchmarks/check_gpu [--device cuda|cpu] [--wheels DIR] [--only NAME ...] [--out FILE] [--patience N]

A Python with torch for the device is enough where `--wheels` names a folder with wheels of all that is missing (made
elsewhere: `python -m pip wheel -w DIR .`). Each step is a process of its own with a limit of its own; after each comes
a line of JSON, last a table. With `--device cpu` the same steps run with tiny sizes, and say what they could not show.
Exit code 0: nothing failed; 1: something did. Seconds in the table below are expected on one H100.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from subprocesses import Step, run, verdict
from wheels import install

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 600.0  # for all of it
PATIENCE = 10  # a CPU takes as many times the limits: others may use it too, and nobody pays for it by the minute
PACKAGES = ("torch", "pytorch-lightning", "deepspeed", "transformers", "peft", "torchao", "triton", "flash-attn")
STEPS = [  # name, script, limit in seconds; what is expected on an H100 stands behind
    Step("machine", HERE / "machine.py", 45, "imports, doctor, plan of quickstart"),  # 20
    Step("sharded-state", HERE / "sharding.py", 45, "ZeRO-2: sums over ranks, masks and averages after a resume"),  # 20
    Step("offload", HERE / "sharding.py", 70, "ZeRO-2 with offload: masked gradients on their way to the host"),  # 40
    Step("resume", HERE / "resume.py", 110, "a language model stopped and resumed, to the bit"),  # 60
    Step("train-single", HERE / "models.py", 60, "1.2B llama, 10 steps, one device"),  # 30
    Step("train-zero1", HERE / "models.py", 60, "1.2B llama, 10 steps, ZeRO-1"),  # 30
    Step("train-zero2", HERE / "models.py", 60, "1.2B llama, 10 steps, ZeRO-2"),  # 30
    Step("train-zero3", HERE / "models.py", 60, "1.2B llama, 10 steps, ZeRO-3"),  # 30
    Step("train-zero2-offload", HERE / "models.py", 80, "1.2B llama, 2 steps, ZeRO-2 with offload"),  # 40
    Step("lora-bf16", HERE / "models.py", 80, "3B LoRA on a bf16 base, 3 steps"),  # 40
    Step("lora-nf4", HERE / "models.py", 80, "3B LoRA on an nf4 base, 3 steps"),  # 40
    Step("attention", HERE / "attention.py", 60, "kernels of attention, 4096 tokens, forward and backward"),  # 20
    Step("checkpoint", HERE / "checkpoints.py", 70, "0.5B: copy, write, fsync and hash of a checkpoint"),  # 40
    Step("energy", HERE / "energy.py", 30, "energy against the driver's power"),  # 15
    Step("contracts-single", HERE / "contracts.py", 150, "the contract suite on one device"),  # 90
    Step("contracts-zero2", HERE / "contracts.py", 150, "the contract suite under ZeRO-2"),  # what is left
]


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of packages that may be missing here")
    parser.add_argument("--only", nargs="*", choices=[step.name for step in steps], metavar="NAME")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default benchmarks/results/gpu-<name>.json")
    parser.add_argument("--seconds", type=float, help="for all steps together; default 600 on a GPU")
    parser.add_argument("--patience", type=float, help="what limits are multiplied with; default 1 on a GPU, else 10")
    given = parser.parse_args(arguments)
    began, results = time.monotonic(), []
    patience = given.patience or (PATIENCE if given.device == "cpu" else 1)
    seconds = given.seconds or patience * SECONDS
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as scratch:
        env = environment(given.device, Path(scratch), given.wheels)
        for step in steps:
            if given.only and step.name not in given.only:
                continue
            left = seconds - (time.monotonic() - began)
            with folder_for(Path(scratch), step.name) as folder:
                limit = min(step.limit * patience, left)
                results.append(run(step, given.device, folder, env, limit))
            print(json.dumps(results[-1]), flush=True)
    whole = {**about(given.device, results), "seconds": round(time.monotonic() - began, 1), "steps": results}
    out = given.out or default_place(given.device, whole)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(whole, indent=1) + "\n")
    print("\n".join(table(results)))
    print(f"\n{whole['hardware']}, {whole['seconds']:.0f} s; written to {out}")
    return int(any(result["ok"] is False for result in results))


@contextmanager
def folder_for(scratch: Path, name: str) -> Iterator[Path]:
    """A step's own folder, gone after it: checkpoints of one must not fill the disk of the next."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=scratch) as folder:
        yield Path(folder)


def environment(device: str, scratch: Path, wheels: Path | None) -> dict[str, str]:
    """What steps run in: this checkout as the package, one device, a home of their own, and no network."""
    (scratch / "package").mkdir()
    (scratch / "package" / "shoestring").symlink_to(ROOT)
    paths = [scratch / "package", ROOT / "tests" / "support"]
    if wheels is not None and (added := install(wheels, scratch / "added")) is not None:
        paths.append(added)
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env |= {
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1",
        "SHOESTRING_HOME": str(scratch / "home"), "SHOESTRING_TEST_DEVICE": device, "DS_ACCELERATOR": device,
        "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],
    }  # fmt: skip
    if device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return env


def about(device: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Date, hardware and versions."""
    first = next((r["figures"] for r in results if r["step"] == "machine"), {})
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d"), "device": device, "hardware": first.get("hardware") or device,
        "name": first.get("name", ""), "driver": first.get("driver", ""), "versions": first.get("versions") or versions,
    }  # fmt: skip


def default_place(device: str, whole: Mapping[str, Any]) -> Path:
    """Among the results where a GPU has made them; what a CPU shows is nobody's result."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", str(whole["hardware"])).strip("-").lower()
    if device == "cpu":
        return ROOT / "build" / "check-gpu-cpu.json"
    return HERE.parent / "results" / f"gpu-{name}.json"


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The verdicts, one line a step."""
    width = max((len(result["step"]) for result in results), default=4)
    head = f"{'step':{width}}  {'seconds':>7}  verdict"
    return ["", head, *(f"{r['step']:{width}}  {r['seconds']:7.1f}  {verdict(r)}" for r in results)]


if __name__ == "__main__":
    sys.exit(main())
