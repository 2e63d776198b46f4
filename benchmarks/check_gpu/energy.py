"""Step `energy`: what our meter says against the power that the driver tells, under load and while idle."""

from __future__ import annotations

import threading
import time

import torch
from checks import Checks, main

from shoestring.callbacks.accounting.energy import EnergyMeter

SECONDS = 8.0


def energy(checks: Checks) -> None:
    if not checks.cuda:
        joules, source = EnergyMeter(None, 1, accelerator="cpu").read()
        checks.figure(source=source)
        checks.needs("kWh within 5 % of the driver's power")
        return
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    samples: list[tuple[float, float]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            samples.append((time.perf_counter(), pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3))

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    (a @ a).sum().item()
    meter = EnergyMeter(None, 1, accelerator="cuda")
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        for _ in range(20):
            b = a @ a
        torch.cuda.synchronize()
    del b
    joules, source = meter.read()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    watts = sum(power for _, power in samples) / len(samples)
    checks.figure(joules=joules, source=source, seconds=seconds, driver_watts=watts, driver_joules=watts * seconds)
    checks.holds("energy is read from NVML", source == "nvml")
    checks.holds("kWh within 5 % of the driver's power", abs(joules / (watts * seconds) - 1) < 0.05)


if __name__ == "__main__":
    main({"energy": energy})
