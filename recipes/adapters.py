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


def _of_blocks(blocks: int, inputs: int) -> int:
    """Weights of OFT: a skew matrix for each block of inputs, of which there are as many as divide them evenly."""
    count = min(
        (each for each in range(1, inputs + 1) if inputs % each == 0), key=lambda each: (abs(each - blocks), each)
    )
    size = inputs // count
    return count * size * (size - 1) // 2


def _of_bases(rank: int, inputs: int, outputs: int) -> int:
    """Weights of RandLoRA: scales of as many random bases of `rank` as are of full rank together."""
    few = min(inputs, outputs)
    bases = -(-few // rank)
    return bases * (rank + few)


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
    "hira": AdapterKind("2502.07775", lambda r, i, o: r * (i + o), ("rank", "dropout"), quantized=False),
    "vera": AdapterKind("2310.11454", lambda r, i, o: r + o, ("rank", "dropout")),
    "randlora": AdapterKind("2502.00987", _of_bases, (*_SCALED, "dropout")),
    "oft": AdapterKind("2306.07280", lambda r, i, o: _of_blocks(r, i)),
    "shira": AdapterKind("2406.13175", lambda r, i, o: r * (i + o), quantized=False),
}
_TOKENS = "it trains tokens that are put before the input, and there is nothing to merge into the weights"
REFUSED = {  # PEFT's other kinds, and why a recipe cannot have them
    "adalora": "it moves ranks between layers while it trains, by calls from the training loop",
    "boft": "it takes sizes of blocks that divide every layer in the place of a rank: use oft",
    "c3a": "it takes a size of blocks that divides every layer, and does not begin as the base",
    "fourierft": "merged, it differs from what was trained by more than 1e-5: its transform is rounded otherwise",
    "vblora": "its vectors have one length that must divide every layer, and it does not begin as the base",
    "waveft": "it takes a number of frequencies in the place of a rank: use shira",
    **dict.fromkeys(("prompt_tuning", "prefix_tuning", "p_tuning", "cpt"), _TOKENS),
}
CHANGE_BASE = ("olora", "pissa", "loftq")  # starts after which the base is none that another model has
