"""What quantization buys on a CPU, and what training for it buys: two tables.

    python benchmarks/quantization.py [speed|accuracy] [--rounds 15] [--patience 0] [--seeds 5] [--json FILE]
                                      [--record FILE] [--write]

speed: an encoder of BertConfig (6 layers, d=384, feed-forward 1536, vocabulary 30522, random weights), batches of
8 x 128 and 1 x 128 tokens. CPU time of the process, one thread, variants in turns A B C … A B C …, the median. Other
processes disturb caches and clocks, so a second column counts only the turns during which everything else on the
machine took less than a tenth of one CPU, however they came out; it says how many there were.
Bytes are those of files written to disk.
accuracy: what few_bits.py tells, which has the rules of that part.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from few_bits import accuracy, into
from report import RESULTS, Runs, quiet
from torch import Tensor, nn

from shoestring.trainer.export.onnx_quantize import OnnxModel, export_onnx, quantize_onnx
from shoestring.trainer.export.quantize import quantize

SHAPES = ((8, 128), (1, 128))
QUIET = 0.1  # CPUs that others keep busy


class Encoder(nn.Module):
    """Token ids [B, T] -> last hidden states [B, T, 384]."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, vocab_size=30522
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids).last_hidden_state


def encoders(folder: Path) -> dict[str, Any]:
    """Every way to run the same encoder."""
    torch.manual_seed(0)
    model = Encoder().eval().requires_grad_(False)
    example = (torch.randint(0, 30522, (2, 128)),)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    plain = OnnxModel(export_onnx(model, example, folder / "fp32.onnx", dynamic), threads=1)
    int8 = quantize_onnx(model, example, folder / "int8.onnx", embeddings=True, dynamic=dynamic, threads=1)
    quantize_onnx(model, example, folder / "int8-table-fp32.onnx", dynamic=dynamic, threads=1)
    torch.save(model.state_dict(), folder / "fp32.pt")
    torch.save(quantize(model, embeddings=True, compiled=False).state_dict(), folder / "int8.pt")
    blocks = copy.deepcopy(model.bert.encoder)
    torch.save(blocks.state_dict(), folder / "blocks-fp32.pt")
    torch.save(quantize(blocks, compiled=False).state_dict(), folder / "blocks-int8.pt")
    half = copy.deepcopy(model).bfloat16()
    return {
        "torch fp32": model,
        "torch bf16": lambda ids: half(ids).float(),
        "ONNX Runtime fp32": lambda ids: plain(ids)[0],
        "torchao int8, compiled": quantize(model, embeddings=True),
        "ONNX Runtime int8": lambda ids: int8(ids)[0],
    }


def pt2e(model: nn.Module, shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """int8 by torchao's PT2E flow for x86, static scales, compiled with frozen weights for one shape."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    draw = torch.Generator().manual_seed(2)
    batches = [torch.randint(0, 30522, shape, generator=draw) for _ in range(4)]
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(model, (batches[0],)).module(), quantizer)
        for ids in batches:
            prepared(ids)
        run = torch.compile(move_exported_model_to_eval(convert_pt2e(prepared)))
        for ids in batches[:2]:
            run(ids)
    return run


def busy() -> float:
    """CPU seconds that all processes of the machine have used (Linux)."""
    user, nice, system, _, _, irq, soft = (int(x) for x in Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def turn(run: Callable[[Tensor], Tensor], ids: Tensor, calls: int) -> tuple[float, float]:
    """CPU milliseconds of one of `calls` calls, and how many CPUs everything else kept busy meanwhile."""
    mine, all_, wall = time.process_time(), busy(), time.perf_counter()
    for _ in range(calls):
        run(ids)
    mine, all_, wall = time.process_time() - mine, busy() - all_, time.perf_counter() - wall
    return 1e3 * mine / calls, max(0.0, all_ - mine) / wall


def cpu_times(
    ways: dict[str, Callable[[Tensor], Tensor]], shape: tuple[int, int], rounds: int, patience: float
) -> dict[str, Any]:
    """Median CPU milliseconds of a call over all turns and over quiet ones, and the relative error beside fp32.

    Ends after `rounds` rounds, or goes on for up to `patience` seconds until every variant has had as many quiet turns.
    """
    ids = torch.randint(0, 30522, shape, generator=torch.Generator().manual_seed(1))
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    calls = 1 + 32 // (shape[0] * 4)  # clock ticks of the machine's counter are 10 ms
    quiet = lambda name: [ms for ms, others in turns[name] if others < QUIET]  # noqa: E731
    with torch.no_grad():
        exact = ways["torch fp32"](ids)
        errors = {name: float((run(ids) - exact).norm() / exact.norm()) for name, run in ways.items()}
        for _ in range(2):
            for run in ways.values():
                run(ids)  # compilers and caches
        end, done = time.monotonic() + patience, 0
        while done < rounds or (time.monotonic() < end and min(len(quiet(name)) for name in ways) < rounds):
            for name, run in ways.items():
                turns[name].append(turn(run, ids, calls))
            done += 1
    return {
        name: {
            "ms": statistics.median(ms for ms, _ in turns[name]),
            "quiet": statistics.median(quiet(name)) if quiet(name) else None,
            "turns": [len(turns[name]), len(quiet(name))],
            "error": errors[name],
        }
        for name in ways
    }


def speed(rounds: int, patience: float) -> dict[str, Any]:
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ways = encoders(folder)
        told["bytes"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        for shape in SHAPES:
            torch._dynamo.reset()  # one compilation for each shape
            here = {**ways, "torchao PT2E int8, static, compiled": pt2e(ways["torch fp32"], shape)}
            told[f"{shape[0]} x {shape[1]}"] = cpu_times(here, shape, rounds, patience)
    for title, rows in told.items():
        if title != "bytes":
            print(speed_table(title, rows))
    print(size_table(told["bytes"]))
    return told


def speed_table(title: str, rows: dict[str, Any]) -> str:
    head = "CPU ms | x torch | x ORT | turns | quiet ms | x torch | x ORT | quiet turns | relative error |"
    lines = [f"\n| {title} tokens | {head}", "|---" * 10 + "|"]
    for name, row in rows.items():
        cells = [name]
        for kind, count in zip(("ms", "quiet"), row["turns"], strict=True):
            cells.append(f"{row[kind]:.1f}" if row[kind] else "-")
            for base in (rows["torch fp32"][kind], rows["ONNX Runtime fp32"][kind]):
                cells.append(f"{base / row[kind]:.2f}" if base and row[kind] else "-")
            cells.append(str(count))
        lines.append(f"| {' | '.join(cells)} | {row['error']:.4f} |")
    return "\n".join(lines)


def size_table(found: dict[str, int]) -> str:
    lines = ["\n| file | fp32 MB | int8 MB | smaller |", "|---|---|---|---|"]
    for title, whole, small in (
        ("torch, six blocks alone", "blocks-fp32.pt", "blocks-int8.pt"),
        ("torch, embeddings in int8 too", "fp32.pt", "int8.pt"),
        ("ONNX, embeddings in int8 too", "fp32.onnx", "int8.onnx"),
        ("ONNX, embeddings left in fp32", "fp32.onnx", "int8-table-fp32.onnx"),
    ):
        ratio = found[whole] / found[small]
        lines.append(f"| {title} | {found[whole] / 1e6:.1f} | {found[small] / 1e6:.1f} | {ratio:.2f} x |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("part", nargs="?", choices=("speed", "accuracy", "all"), default="all")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--patience", type=float, default=0.0, help="seconds to wait for quiet turns, per shape")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--json", default=None)
    options.add_argument("--record", type=Path, help="accuracy of seeds made before is taken from here, new ones added")
    options.add_argument("--write", action="store_true", help="put the part on accuracy into results/quantization.md")
    chosen = options.parse_args()
    quiet()
    told: dict[str, Any] = {}
    if chosen.part in ("speed", "all"):
        told["speed"] = speed(chosen.rounds, chosen.patience)
    if chosen.part in ("accuracy", "all"):
        told["accuracy"], section = accuracy(chosen.seeds, Runs(chosen.record))
        print(section)
        if chosen.write:
            path = RESULTS / "quantization.md"
            path.write_text(into(path.read_text(), section))
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
