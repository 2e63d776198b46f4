"""Compiled blocks: `torch.compile` on the repeated blocks of a model, one compilation for all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import nn

from ..contract import Card, IncompatibleTechniques, Technique, require
from ..forward.blocks import blocks

BACKENDS = ("inductor", "aot_eager", "eager")
_VARIANTS = 64  # of one block: shapes, modes, kinds of layer
MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")


def _call(block: nn.Module) -> Callable[..., Any]:
    """A call of `block` whose code is here: `nn.Module.compile` leaves blocks of torch's own classes as they are."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return block._call_impl(*args, **kwargs)

    return call


@dataclass(kw_only=True, eq=False, repr=False)
class CompiledBlocks(Technique, pl.Callback):
    """Compile the repeated blocks of a model: fewer passes over memory, fewer launches, fewer activations kept.

    Blocks of one class share one compilation, so it takes as long for 80 layers as for 2, and what is around them (the
    embedding, the loss) runs as it is. Names of parameters stay. Rounding differs from that of the uncompiled model; a
    run that is resumed on the same software and CPU or GPU computes the same bits again.

    Source: arXiv 2410.06511 §2.2.3; the compiler is that of doi 10.1145/3620665.3640366.

    Args:
        every: Every how many blocks one is compiled: 1 is all of them, 0 is off.
        dynamic: True compiles once for all shapes, so that it does not matter in which order they come. False compiles
            for each shape anew, which is faster where all batches have one; a 65th shape is an error.
        mode: As `torch.compile` takes it: "default", "reduce-overhead" (CUDA graphs), "max-autotune" and
            "max-autotune-no-cudagraphs" (minutes of search).
        backend: "inductor" writes kernels; "aot_eager" and "eager" only trace, to find out what does not compile.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import CompiledBlocks
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[CompiledBlocks()])
    """

    card = Card(
        name="compiled_blocks",
        does="compiles repeated blocks, once for all that are alike",
        paper="2410.06511",
        saves={"time", "memory"},
        keeps="result",
        reads={"modules", "numerics"},
        writes={"activations"},
    )

    every: int = 1
    dynamic: bool = True
    mode: str = "default"
    backend: str = "inductor"

    def check(self) -> None:
        require(self.every >= 0, self, "every", "0 (off), 1 (every block), 2 (every second), …")
        require(self.mode in MODES, self, "mode", " | ".join(MODES))
        require(self.backend in BACKENDS, self, "backend", " | ".join(BACKENDS))

    @classmethod
    def noop(cls) -> Self:
        return cls(every=0)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._compiled: list[tuple[nn.Module, Any]] = []  # and its own compiled call, where the user has given it one
        self._config = ExitStack()
        if stage != "fit" or not self.every:
            return
        repeated = blocks(pl_module)
        if not repeated:
            raise IncompatibleTechniques(f"compiled_blocks finds no repeated blocks in {type(pl_module).__name__}")
        options: dict[str, Any] = {"backend": self.backend, "dynamic": self.dynamic}
        if self.backend == "inductor":
            options["mode"] = self.mode
        # a hook that somebody puts on a layer later must be seen; and what is compiled must not depend on what came
        # first, as it would if blocks ran uncompiled from some number of shapes on
        self._config.enter_context(
            torch._dynamo.config.patch(
                skip_nnmodule_hook_guards=False, recompile_limit=_VARIANTS, fail_on_recompile_limit_hit=True
            )
        )
        for block in repeated[:: self.every]:
            before = vars(block).get("_compiled_call_impl")
            block._compiled_call_impl = torch.compile(_call(block), **options)
            self._compiled.append((block, before))

    def on_reshape(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.compiler.reset()  # what was compiled for the old shapes

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for block, before in getattr(self, "_compiled", []):
            del block._compiled_call_impl  # the class has None
            if before is not None:
                block._compiled_call_impl = before
        self._compiled = []
        if (config := self.__dict__.pop("_config", None)) is not None:
            config.close()
