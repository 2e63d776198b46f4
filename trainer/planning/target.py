"""What a plan is made for: the device that the recipe names, or this machine's."""

from __future__ import annotations

from dataclasses import dataclass

from ...cgroups import usable_memory
from ...cluster import Hardware
from ...cluster.config.hardware import hardware
from ...recipes import Recipe
from ..machine.facts import Machine


@dataclass(frozen=True, kw_only=True)
class Target:
    """The nodes that are planned for.

    Attributes:
        device: As the catalogue knows it.
        here: This machine has it.
        accelerator: "cuda" or "cpu".
        bf16: It computes in that type in hardware.
        fp16: Likewise.
        count: Devices that this machine has of it; 0: it is elsewhere, or a CPU.
        device_memory: Bytes of a device; None: not known, or a CPU, whose memory is the host's.
        host_memory: Bytes of a node; None: not known.
    """

    device: Hardware
    here: bool
    accelerator: str
    bf16: bool
    fp16: bool
    count: int
    device_memory: float | None
    host_memory: float | None

    def memory(self, devices: int) -> float | None:
        """Bytes that a rank may fill, of `devices` ranks on a node; None: not known."""
        if self.accelerator == "cuda":
            return self.device_memory
        return None if self.host_memory is None else self.host_memory / max(1, devices)


def target_of(recipe: Recipe, machine: Machine) -> tuple[Target, str]:
    """What the recipe's `cluster.hardware` names, and why that."""
    name, why = recipe.cluster.hardware, "the recipe says so"
    if name == "auto":
        name, why = machine.hardware or machine.accelerator, "what this machine has"
    device = hardware(name)
    cuda = device.name != "cpu"
    here = (machine.hardware or machine.accelerator) == device.name
    given = recipe.cluster.host_memory_gib
    known = usable_memory() if here or not cuda else None
    memory = machine.accelerators[0].memory_bytes if here and machine.accelerators else device.memory_bytes
    return Target(
        device=device,
        here=here,
        accelerator="cuda" if cuda else "cpu",
        bf16=machine.bf16 if here else "bf16" in device.peak_flops,
        fp16=machine.fp16 if here else "fp16" in device.peak_flops,
        count=len(machine.accelerators) if here and cuda else 0,
        device_memory=memory if cuda else None,
        host_memory=known if given is None else given * 2**30,
    ), why
