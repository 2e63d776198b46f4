"""What `quantization_aware` or `weight_clustering` have trained a run's weights to be, as its recipe tells.

These techniques let layers compute with rounded weights while the full ones are trained and saved. Here is what they
rounded and how, so that an export holds the model that the run has evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...callbacks.catalog.registry import make
from ...callbacks.compression.quantization_aware import OFF, QuantizationAware
from ...callbacks.compression.weight_clustering import WeightClustering
from ...callbacks.parameters.layers import quantizable, trained_weights
from .encodings import Codebook, Grid

if TYPE_CHECKING:
    from torch import nn

    from ...callbacks.contract import Technique
    from ...recipes import Recipe


@dataclass(frozen=True)
class TrainedRounding:
    """ways: by the identity of a parameter, which merging adapters does not change. activation_bits: of what enters
    linear layers. apart: adapters in full precision lie beside low-bit weights, and no one matrix is both.
    """

    ways: dict[int, Grid | Codebook]
    activation_bits: int | None = None
    apart: bool = False


def trained_rounding(module: nn.Module, recipe: Recipe) -> TrainedRounding | None:
    """Return the rounding of the run's module, with adapters not merged; None where no technique rounds weights."""
    for spec in recipe.techniques:
        rounding = _of(make(spec.name, spec.settings), module)
        if rounding is not None:
            return rounding
    return None


def _of(technique: Technique, module: nn.Module) -> TrainedRounding | None:
    named = dict(module.named_parameters())
    if isinstance(technique, WeightClustering) and technique.clusters:
        names = trained_weights(module, technique.skip)
        adapted = any(hasattr(layer, "lora_A") for layer in module.modules())  # it is they who share values
        return TrainedRounding({id(named[name]): Codebook() for name in names}, apart=adapted)
    if not isinstance(technique, QuantizationAware) or technique.weight_bits in OFF:
        return None
    layers = quantizable(module, technique.skip)
    grid = Grid(technique.grid_bits, technique.group_size, technique.scale)
    adapted = any(layer.adapter is not None for used in layers.values() for layer in used)
    return TrainedRounding(
        {id(named[name]): grid for name in layers}, technique.activation_bits,
        adapted and technique.adapters == "apart",
    )  # fmt: skip
