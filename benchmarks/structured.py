"""What structure buys on a CPU: half of the heads and neurons of an encoder cut away, beside bf16, ONNX Runtime, zeros.

    python benchmarks/structured.py [--processes 5] [--write]

One thread; the variants take turns in one process, where each one's *process CPU time* counts, so that other work on
the machine disturbs it little, and its median. Where a process's memory happens to lie, and what clock the machine has
just then, moves ratios by some percent: so there are several processes, and figures are the medians over them, with the
lowest and the highest. `--write` puts the table into benchmarks/results/structured.md.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import arguments, in_processes, measured, page, publish, quiet, table, take_turns, wrapped
from torch import Tensor, nn

from shoestring.callbacks.accounting.flops import FlopCounter
from shoestring.callbacks.parameters.cut import shrink
from shoestring.callbacks.sparsity.structured_groups import choose
from shoestring.trainer.export.onnx_file import trace
from shoestring.trainer.export.runtimes import onnxruntime

BATCH, LENGTH, WIDTH, HEADS, FFN, LAYERS = 8, 128, 384, 6, 1536, 6
SPARSITIES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
COLUMNS = (128, 1024)
TARGET = 1.8


class Encoder(nn.Module):
    """A BERT encoder without its embeddings and pooler: [B, T, D] -> [B, T, D]."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=FFN, num_hidden_layers=LAYERS,
            vocab_size=100, max_position_embeddings=LENGTH,
        )  # fmt: skip
        self.encoder = BertModel(config, add_pooling_layer=False).encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).last_hidden_state


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


def halved(x: Tensor) -> Encoder:
    """Half of the heads and half of the neurons of every layer cut away."""
    model = encoder()
    scores = {name: p.detach().square() for name, p in model.named_parameters()}
    shrink(model, choose(model, lambda: model(x), scores, ratio=0.5, round_to=16))
    return model


def masked(share: float) -> Encoder:
    model = encoder()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(torch.rand_like(p) >= share)
    return model


def onnx(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Any]:
    """`model` in ONNX Runtime on one thread, written and opened as exports are."""
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    trace(model, {"x": x}, path)
    run = onnxruntime(path, threads=1)
    return lambda: run({"x": x})


def gigaflops(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad(), FlopCounter() as counter:
        model(x)
    return counter.flops.realised / 1e9


def models_of(x: Tensor) -> dict[str, nn.Module]:
    return {
        "torch fp32": encoder(),
        "structured 50 %": halved(x),
        "90 % zeros, dense tensors": masked(0.9),
        "torch bf16": encoder().bfloat16(),
        "structured 50 %, bf16": halved(x).bfloat16(),
    }


def encoders(rounds: int) -> dict[str, dict[str, float]]:
    """By variant: milliseconds, millions of parameters, and GFLOP of one call."""
    x = torch.randn(BATCH, LENGTH, WIDTH)
    models = models_of(x)
    given = {name: x.bfloat16() if "bf16" in name else x for name in models}
    variants: dict[str, Callable[[], Any]] = {name: partial(model, given[name]) for name, model in models.items()}
    with tempfile.TemporaryDirectory() as place:
        for name, plain in (
            ("ONNX Runtime fp32", "torch fp32"),
            ("structured 50 %, ONNX Runtime fp32", "structured 50 %"),
        ):
            variants[name] = onnx(models[plain], x, Path(place))
            models[name], given[name] = models[plain], x
        with torch.inference_mode():
            spent = take_turns(variants, rounds)
    return {
        name: {"ms": ms, "parameters": sum(p.numel() for p in models[name].parameters()) / 1e6,
               "gflop": gigaflops(models[name], given[name])}
        for name, ms in spent.items()
    }  # fmt: skip


def products(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of one product of a 1536 x 384 weight with [384, n], by n and by what the weight is stored as."""
    times = {}
    for n in COLUMNS:
        weight, x = torch.randn(FFN, WIDTH), torch.randn(WIDTH, n)
        variants: dict[str, Callable[[], Any]] = {
            "fp32": partial(torch.matmul, weight, x), "bf16": partial(torch.matmul, weight.bfloat16(), x.bfloat16())
        }  # fmt: skip
        for share in SPARSITIES:
            sparse = (weight * (torch.rand_like(weight) >= share)).to_sparse_csr()
            variants[f"{share}"] = partial(torch.matmul, sparse, x)
        with torch.inference_mode():
            times[f"{n}"] = take_turns(variants, rounds)
    return times


def gains(seen: list[dict[str, float]], base: str, name: str) -> list[float]:
    """How many times as fast as `base`, process by process."""
    return [each[base] / each[name] for each in seen]


def encoder_table(results: list[dict[str, Any]]) -> tuple[list[str], list[float]]:
    """(table, the gains of structured pruning)."""
    seen = [{name: row["ms"] for name, row in each["encoders"].items()} for each in results]
    rows = []
    for name, row in results[0]["encoders"].items():
        gain = gains(seen, "torch fp32", name)
        rows.append([
            name, f"{median(each[name] for each in seen):.1f}", f"{median(gain):.2f}",
            f"{min(gain):.2f} - {max(gain):.2f}", f"{row['parameters']:.2f} M", f"{row['gflop']:.2f}",
        ])  # fmt: skip
    head = ["variant", "ms", "speed-up", "lowest - highest", "parameters", "GFLOP executed"]
    return table(head, rows), gains(seen, "torch fp32", "structured 50 %")


def product_table(results: list[dict[str, Any]]) -> list[str]:
    rows = []
    for n in COLUMNS:
        seen = [each["products"][f"{n}"] for each in results]
        gain = {share: median(gains(seen, "fp32", f"{share}")) for share in SPARSITIES}
        even = next((f"{share:.0%}" for share in SPARSITIES if gain[share] >= 1), "never")
        rows.append([
            f"{n}", f"{median(each['fp32'] for each in seen):.2f}", f"{median(gains(seen, 'fp32', 'bf16')):.2f}x",
            *(f"{each:.2f}x" for each in gain.values()), even,
        ])  # fmt: skip
    return table(["n", "dense fp32 ms", "dense bf16", *(f"{s:.0%}" for s in SPARSITIES), "breaks even at"], rows)


def once(rounds: int) -> dict[str, Any]:
    quiet()
    return {"encoders": encoders(rounds), "products": products(rounds)}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--json", type=Path, help="measure in this process, and write the figures here")
    given = parser.parse_args()
    if given.json:
        given.json.write_text(json.dumps(once(given.rounds)))
        return
    results = in_processes(__file__, given.processes, "--rounds", f"{given.rounds}")
    encoder_rows, gain = encoder_table(results)
    text = page(
        "Structure, zeros and number formats on a CPU", measured("structured.py --write"),
        wrapped(f"One thread, variants in turns: the median of process CPU time over {given.rounds} calls, then the "
                f"median over {given.processes} processes. ONNX Runtime opens what `shoestring export` writes."),
        wrapped(f"Encoder of {LAYERS} layers, d={WIDTH}, {HEADS} heads, FFN {FFN}, {BATCH} x {LENGTH} tokens. "
                "Structured: half of the heads and half of the neurons of every layer cut away."),
        encoder_rows,
        wrapped(f"Target: structured 50 % at least {TARGET}x faster than torch fp32. Measured {median(gain):.2f}x "
                f"({min(gain):.2f} to {max(gain):.2f}): {'met' if median(gain) >= TARGET else 'MISSED'}."),
        wrapped(f"One product of a {FFN} x {WIDTH} weight in CSR with [{WIDTH}, n]; speed-up over dense fp32, by share "
                "of zeros."),
        product_table(results),
    )  # fmt: skip
    publish(text, __file__, given.write)


if __name__ == "__main__":
    main()
