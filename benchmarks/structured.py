"""What structure buys on a CPU: half of the heads and neurons of an encoder cut away, beside bf16, ONNX Runtime, zeros.

    python benchmarks/structured.py [--write]

One thread; the variants take turns in one process; the figure is the median of each one's *process CPU time*, so that
other work on the machine disturbs it little. `--write` puts the table into benchmarks/results/structured.md.
"""

from __future__ import annotations

import argparse
import logging
import platform
import tempfile
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.callbacks.cut import shrink
from shoestring.callbacks.flops import FlopCounter
from shoestring.callbacks.sparsity.structured_groups import choose

BATCH, LENGTH, WIDTH, HEADS, FFN, LAYERS = 8, 128, 384, 6, 1536, 6
SPARSITIES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
RESULTS = Path(__file__).parent / "results" / "structured.md"
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


def onnx(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """`model` in ONNX Runtime on one thread."""
    import onnxruntime

    path = Path(tempfile.mkdtemp()) / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, input_names=["x"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {"x": x.numpy()}
    return lambda: session.run(None, given)


def take_turns(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of process CPU time of each."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        for call in variants.values():
            call(), call()
        for _ in range(rounds):
            for name, call in variants.items():
                began = process_time()
                call()
                times[name].append((process_time() - began) * 1e3)
    return {name: median(seen) for name, seen in times.items()}


def gigaflops(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad(), FlopCounter() as counter:
        model(x)
    return counter.flops.realised / 1e9


def encoders(rounds: int) -> tuple[list[str], float]:
    x = torch.randn(BATCH, LENGTH, WIDTH)
    dense, half = encoder(), halved(x)
    models: dict[str, nn.Module] = {
        "torch fp32": dense,
        "structured 50 %": half,
        "90 % zeros, dense tensors": masked(0.9),
        "torch bf16": encoder().bfloat16(),
        "structured 50 %, bf16": halved(x).bfloat16(),
    }
    low = x.bfloat16()
    variants: dict[str, Callable[[], Any]] = {
        name: (lambda m=model, given=low if "bf16" in name else x: m(given)) for name, model in models.items()
    }
    variants["ONNX Runtime fp32"], variants["structured 50 %, ONNX Runtime fp32"] = onnx(dense, x), onnx(half, x)
    models |= {"ONNX Runtime fp32": dense, "structured 50 %, ONNX Runtime fp32": half}
    spent = take_turns(variants, rounds)
    base = spent["torch fp32"]
    lines = ["| variant | ms | speed-up | parameters | GFLOP executed |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {ms:.1f} | {base / ms:.2f} | {sum(p.numel() for p in models[name].parameters()) / 1e6:.2f} M | "
        f"{gigaflops(models[name], low if 'bf16' in name and 'ONNX' not in name else x):.2f} |"
        for name, ms in spent.items()
    ]
    return lines, base / spent["structured 50 %"]


def products(rounds: int) -> list[str]:
    """One product of a 1536 x 384 weight, as CSR, with [384, n]."""
    lines = [
        "| n | dense fp32 ms | dense bf16 | " + " | ".join(f"{s:.0%}" for s in SPARSITIES) + " | breaks even at |",
        "|---|---|---|" + "---|" * (len(SPARSITIES) + 1),
    ]
    for n in (128, 1024):
        weight, x = torch.randn(FFN, WIDTH), torch.randn(WIDTH, n)
        low, low_x = weight.bfloat16(), x.bfloat16()
        variants: dict[str, Callable[[], Any]] = {"fp32": lambda w=weight, x=x: w @ x, "bf16": lambda: low @ low_x}  # noqa: B023
        for share in SPARSITIES:
            sparse = (weight * (torch.rand_like(weight) >= share)).to_sparse_csr()
            variants[f"{share}"] = lambda w=sparse, x=x: w @ x
        spent = take_turns(variants, rounds)
        gain = [spent["fp32"] / spent[f"{share}"] for share in SPARSITIES]
        even = next((f"{share:.0%}" for share, g in zip(SPARSITIES, gain, strict=True) if g >= 1), "never")
        lines.append(
            f"| {n} | {spent['fp32']:.2f} | {spent['fp32'] / spent['bf16']:.2f}x | "
            + " | ".join(f"{g:.2f}x" for g in gain) + f" | {even} |"
        )  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    table, gain = encoders(given.rounds)
    csr = products(given.rounds)
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    text = "\n".join([
        "# Structure, zeros and number formats on a CPU", "",
        f"{date.today()}, {cpu}, torch {torch.__version__}. Made by `python benchmarks/structured.py --write`: one "
        f"thread, variants in turns, medians of process CPU time over {given.rounds} calls.", "",
        f"Encoder of {LAYERS} layers, d={WIDTH}, {HEADS} heads, FFN {FFN}, {BATCH} x {LENGTH} tokens. Structured: "
        "half of the heads and half of the neurons of every layer cut away.", "",
        *table, "",
        f"Target: structured 50 % at least {TARGET}x faster than torch fp32. Measured {gain:.2f}x: "
        f"{'met' if gain >= TARGET else 'MISSED'}.", "",
        f"One product of a {FFN} x {WIDTH} weight in CSR with [{WIDTH}, n]; speed-up over dense fp32, by share of "
        "zeros.", "",
        *csr, "",
    ])  # fmt: skip
    print(text)
    if given.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
