"""The kinds of adapters that can be merged into the weights they are trained beside, and what goes with each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterKind:
    """What a kind of PEFT's adapters takes.

    Attributes:
        source: The paper.
        trained: Its weights on a layer, by `rank`, inputs and outputs.
        keys: Those of `model.adapter` that have an effect, beside `kind` and `targets`.
        quantized: It goes with a base whose weights are kept as codes.
        sharded: ZeRO-3 gathers what it needs when it needs it.
    """

    source: str
    trained: Callable[[int, int, int], int]
    keys: tuple[str, ...] = ("rank",)
    quantized: bool = True
    sharded: bool = False


def kronecker_weights(rank: int, inputs: int, outputs: int) -> int:
    """Weights of LoKr: a whole small factor, and a large one that is of low rank where that takes fewer."""
    (small_in, large_in), (small_out, large_out) = _near_root(inputs), _near_root(outputs)
    whole = rank >= max(large_in, large_out) / 2
    large = large_out * large_in if whole else rank * (large_out + large_in)
    return small_out * small_in + large


def _near_root(number: int) -> tuple[int, int]:
    """The two factors of a number that lie nearest to each other, as PEFT finds them."""
    small = next(each for each in range(int(number**0.5), 0, -1) if number % each == 0)
    return small, number // small


_SCALED = ("rank", "alpha")
_LORA = (*_SCALED, "dropout", "dtype")
KINDS = {
    "lora": AdapterKind("2106.09685", lambda r, i, o: r * (i + o), (*_LORA, "rslora", "start"), sharded=True),
    "dora": AdapterKind("2402.09353", lambda r, i, o: r * (i + o) + o, (*_LORA, "rslora")),
    "loha": AdapterKind("2108.06098", lambda r, i, o: 2 * r * (i + o), _SCALED, quantized=False),
    "lokr": AdapterKind("2309.14859", kronecker_weights, _SCALED, quantized=False),
    "gralora": AdapterKind("2505.20355", lambda r, i, o: r * (i + o), (*_SCALED, "dropout")),
    "miss": AdapterKind("2409.15371", lambda r, i, o: r * o, ("rank", "dropout")),
    "hra": AdapterKind("2405.17484", lambda r, i, o: r * i, quantized=False),
    "ia3": AdapterKind("2205.05638", lambda r, i, o: o, ()),
}
