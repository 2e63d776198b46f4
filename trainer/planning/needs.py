"""What is asked about a run's memory, and the form of the answer. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...callbacks.contract import Effect
from ...strategies import Sharding
from ..tasks.chunks import Chunked
from ..tasks.optimizers.cards import OPTIMIZERS, OptimizerCard
from .activations import BYTES, Checkpointing
from .sizes import Size

MOMENTS = ("loss", "backward", "step")
FRAGMENTATION = 0.05  # of what the allocator holds


@dataclass(frozen=True)
class Term:
    """One thing that fills memory: its name, its bytes, and the moments of a step at which it is alive."""

    name: str
    bytes: float
    moments: tuple[str, ...] = MOMENTS


@dataclass(frozen=True)
class Memory:
    """The terms of one device, and those of a node's host memory. On CPUs the two are one."""

    device: tuple[Term, ...]
    host: tuple[Term, ...]
    context: float
    drive: float = 0.0  # bytes of a node's drive

    def at(self, moment: str) -> tuple[Term, ...]:
        """What is alive then, the largest first."""
        alive = [term for term in self.device if moment in term.moments and term.bytes > 0]
        return tuple(sorted(alive, key=lambda term: -term.bytes))

    @property
    def moment(self) -> str:
        """The fullest one."""
        return max(MOMENTS, key=lambda moment: sum(term.bytes for term in self.at(moment)))

    @property
    def needed(self) -> float:
        """Bytes that a device must have: without any fragmentation."""
        return self.context + sum(term.bytes for term in self.at(self.moment))

    @property
    def fragmentation(self) -> float:
        """What an allocator usually loses between its blocks, in bytes."""
        return FRAGMENTATION * (self.needed - self.context)

    @property
    def total(self) -> float:
        """Bytes that a device should have."""
        return self.needed + self.fragmentation

    @property
    def host_total(self) -> float:
        """Bytes of host memory that a node must have."""
        return sum(term.bytes for term in self.host)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that decides what a run's memory holds.

    Attributes:
        size: The model's counts.
        length: Tokens of a sample.
        micro: Samples of a forward pass.
        accumulate: Micro-batches in an optimizer step.
        devices: Ranks of a node.
        nodes: How many there are.
        strategy: single | ddp | zero1 | zero2 | zero3 | fsdp2.
        offload: none | optimizer | parameters.
        nvme: Offloaded optimizer state lies on a drive, and not in host memory.
        accelerator: "cuda" or "cpu".
        precision: fp32 | bf16 | fp16, of the computation.
        base: What a frozen weight is kept in: a key of `FROZEN_BYTES`.
        optimizer: What it keeps of a parameter, and what its step copies.
        checkpointing: Which blocks are computed again in backward.
        adapter_dtype: compute | float32.
        dropout: Adapters drop parts of their inputs.
        effect: Of all other techniques together.
        shared_extra: What techniques keep beside the states is split as these are; a teacher is not.
        in_backward: Each parameter steps in backward, and its gradient is freed.
        chunked_loss: Whether logits exist in parts only, as the recipe says; False where something needs them whole.
        sharding: How ZeRO sums gradients and communicates.
    """

    size: Size
    length: int
    micro: int
    accumulate: int
    devices: int
    nodes: int
    strategy: str
    offload: str
    accelerator: str
    precision: str
    base: str = "fp32"
    optimizer: OptimizerCard = OPTIMIZERS["adamw"]
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    adapter_dtype: str = "compute"
    dropout: bool = False
    effect: Effect = field(default_factory=Effect)
    shared_extra: bool = True
    chunked_loss: Chunked = False
    sharding: Sharding = field(default_factory=Sharding)
    in_backward: bool = False
    nvme: bool = False

    @property
    def world(self) -> int:
        """All ranks."""
        return self.devices * self.nodes

    @property
    def stage(self) -> int:
        """Of ZeRO; FSDP2 splits what its third does; 0 where nothing is split."""
        return 3 if self.by_rows else int(self.strategy[-1]) if self.strategy.startswith("zero") else 0

    @property
    def by_rows(self) -> bool:
        """Whether FSDP2 splits: masters are all that ranks have of weights, and a block is gathered at a time."""
        return self.strategy == "fsdp2"

    @property
    def own(self) -> float:
        """Bytes of a trained weight as the forward pass finds it: autocast leaves it in float32, ZeRO does not."""
        return BYTES[self.precision] if self.stage else 4.0
