"""What must hold within the section `strategy` of a recipe; see `rules`."""

from __future__ import annotations

from collections.abc import Iterator

from ..strategies import NVME, OFFLOADS, SETTINGS
from .recipe import Recipe
from .rule import Broken, depends_on


@depends_on("strategy")
def strategy_fits(recipe: Recipe) -> Iterator[Broken]:
    strategy = recipe.strategy
    for key, number in (("devices", strategy.devices), ("nodes", strategy.nodes)):
        if strategy.name == "single" and number not in (1, "auto"):
            yield Broken(f"strategy.{key}", "1 with strategy.name single", "use ddp, zero1, zero2, zero3 or fsdp2")
    if strategy.name != "auto" and strategy.offload not in OFFLOADS[strategy.name]:
        allowed = f"{' | '.join(OFFLOADS[strategy.name])} with strategy.name {strategy.name}"
        needed = [name for name, offloads in OFFLOADS.items() if strategy.offload in offloads]
        yield Broken("strategy.offload", allowed, f"offloading {strategy.offload} needs {' or '.join(needed)}")
    if strategy.nvme is not None and (strategy.name != NVME or strategy.offload != "optimizer"):
        hint = f"set strategy.name={NVME} and strategy.offload=optimizer, or leave it out"
        if strategy.offload == "parameters":
            hint = "weights stay on devices or in host memory: a drive takes the state of offload optimizer"
        yield Broken(
            "strategy.nvme", f"null, or a folder with strategy.name {NVME} and strategy.offload optimizer", hint
        )
    if isinstance(strategy.allgather_bucket, int) and strategy.allgather_bucket % 2:
        yield Broken("strategy.allgather_bucket", "auto, or an even number of elements")
    if strategy.devices != "auto" and strategy.devices * strategy.nodes % strategy.hpz:
        world = strategy.devices * strategy.nodes
        yield Broken("strategy.hpz", f"a number that divides all ranks: {world}", "best the devices of a node")


@depends_on("strategy", "precision")
def fsdp2_scales_no_loss(recipe: Recipe) -> Iterator[Broken]:
    if recipe.strategy.name == "fsdp2" and recipe.precision == "fp16":
        hint = "a loss scale of fp16 is not kept alike on ranks that have different gradients: use bf16, or zero3"
        yield Broken("precision", "auto | fp32 | bf16 with strategy.name fsdp2", hint)


@depends_on("strategy", "precision")
def settings_fit(recipe: Recipe) -> Iterator[Broken]:
    if recipe.strategy.name != "auto":
        yield from settings_without_use(recipe, recipe.strategy.name, recipe.precision)


def settings_without_use(recipe: Recipe, strategy: str, precision: str) -> Iterator[Broken]:
    """Keys of the section `strategy` that would do nothing under a strategy that is decided. "auto" is not."""
    section = recipe.strategy
    for key, able in SETTINGS.items():
        if strategy not in able and getattr(section, key) != type(section).model_fields[key].default:
            hint = f"it does nothing with strategy {strategy}; remove it"
            yield Broken(f"strategy.{key}", f"{key} only with strategy.name {' | '.join(able)}", hint)
    summed_by_zero = strategy in SETTINGS["gradient_dtype"]
    if section.gradient_dtype == "bf16" and summed_by_zero and precision not in ("auto", "bf16"):
        yield Broken("strategy.gradient_dtype", f"fp32 with precision {precision}", "bf16 is for precision bf16")
