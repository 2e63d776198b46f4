"""What quantization buys on a CPU, and what training for it buys: two tables.

    python benchmarks/quantization.py [speed|accuracy] [--rounds 15] [--processes 5] [--seeds 5] [--record FILE]
                                      [--write]

speed: an encoder of BertConfig (6 layers, d=384, feed-forward 1536, vocabulary 30522, random weights), batches of 8 x
128 and 1 x 128 tokens. ONNX Runtime's int8 in three forms: weights within 7 bits, right on any CPU; all 8 bits, right
with VNNI; and all 8 bits as unsigned bytes, which would be right on any CPU too. CPU time of the process, one thread,
variants in turns A B C … A B C …, the median. Where a process's memory happens to lie, and what clock the machine has
just then, moves ratios by some percent: so there are several processes, and figures are the medians over them, ratios
with the lowest and the highest.
Bytes are those of files written to disk.
accuracy: what low_bit.py measures, which has the rules of that part.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from low_bit import accuracy, into
from report import RESULTS, Runs, arguments, in_processes, measured, quiet, table, take_turns
from torch import Tensor, nn

from shoestring.callbacks.compression.fake_quantization import PRODUCT_BITS
from shoestring.trainer.export.onnx_file import quantize_file, trace
from shoestring.trainer.export.quantize import quantize, quantize_embeddings
from shoestring.trainer.export.runtimes import LogitsFunction, onnxruntime

SHAPES = ((8, 128), (1, 128))
TORCH, ORT = "torch fp32", "ONNX Runtime fp32"  # what everything is compared with


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
    small_tables = copy.deepcopy(model)
    quantize_embeddings(small_tables)
    files = {
        "fp32": onnx(model, folder / "fp32.onnx"),
        "any": onnx(small_tables, folder / "any.onnx", PRODUCT_BITS["any"]),
        "vnni": onnx(small_tables, folder / "vnni.onnx", PRODUCT_BITS["vnni"]),
        "unsigned": unsigned(folder / "fp32.onnx", folder / "unsigned.onnx"),
    }
    onnx(model, folder / "int8-table-fp32.onnx", PRODUCT_BITS["any"])
    torch.save(model.state_dict(), folder / "fp32.pt")
    torch.save(quantize(model, embeddings=True, compiled=False).state_dict(), folder / "int8.pt")
    blocks = copy.deepcopy(model.bert.encoder)
    torch.save(blocks.state_dict(), folder / "blocks-fp32.pt")
    torch.save(quantize(blocks, compiled=False).state_dict(), folder / "blocks-int8.pt")
    half = copy.deepcopy(model).bfloat16()
    return {
        "torch fp32": model,
        "torch bf16": lambda ids: half(ids).float(),
        "ONNX Runtime fp32": lambda ids: files["fp32"]({"ids": ids}),
        "torchao int8, compiled": quantize(model, embeddings=True),
        "ONNX Runtime int8, any CPU": lambda ids: files["any"]({"ids": ids}),
        "ONNX Runtime int8-vnni": lambda ids: files["vnni"]({"ids": ids}),
        "ONNX Runtime int8, unsigned weights": lambda ids: files["unsigned"]({"ids": ids}),
    }


def onnx(model: nn.Module, path: Path, bits: int | None = None) -> LogitsFunction:
    """The encoder in ONNX Runtime on one thread, as an export writes it. bits: of int8 products; None: floats."""
    trace(model, {"ids": torch.randint(0, 30522, (2, 128))}, path)
    if bits is not None:
        quantize_file(path, bits=bits)
    return onnxruntime(path, threads=1)


def unsigned(plain: Path, path: Path) -> LogitsFunction:
    """The float file with ONNX Runtime's own dynamic quantization to unsigned weights."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(plain, path, per_channel=True, weight_type=QuantType.QUInt8, op_types_to_quantize=["MatMul"])
    return onnxruntime(path, threads=1)


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


def cpu_times(ways: dict[str, Callable[[Tensor], Tensor]], shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """By variant: median CPU milliseconds of a call, and the relative error beside fp32."""
    ids = torch.randint(0, 30522, shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = ways[TORCH](ids)
        errors = {name: float((run(ids) - exact).norm() / exact.norm()) for name, run in ways.items()}
        spent = take_turns({name: partial(run, ids) for name, run in ways.items()}, rounds)
    return {name: {"ms": spent[name], "error": errors[name]} for name in ways}


def speed(rounds: int) -> dict[str, Any]:
    """What one process finds: bytes of every file, and `cpu_times` of every shape."""
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ways = encoders(folder)
        row["bytes"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        for shape in SHAPES:
            torch._dynamo.reset()  # one compilation for each shape
            here = {**ways, "torchao PT2E int8, static, compiled": pt2e(ways[TORCH], shape)}
            row[f"{shape[0]} x {shape[1]}"] = cpu_times(here, shape, rounds)
    return row


def speed_table(title: str, processes: list[dict[str, Any]]) -> str:
    """Of what several processes found for a shape."""
    seen = [each[title] for each in processes]
    rows = []
    for name, row in seen[0].items():
        cells = [name, f"{statistics.median(each[name]['ms'] for each in seen):.1f}"]
        for base in (TORCH, ORT):
            gains = [each[base]["ms"] / each[name]["ms"] for each in seen]
            cells += [f"{statistics.median(gains):.2f}", f"{min(gains):.2f} - {max(gains):.2f}"]
        rows.append([*cells, f"{row['error']:.4f}"])
    between = "lowest - highest"
    head = [f"{title} tokens", "CPU ms", "x torch", between, "x ORT", between, "relative error"]
    return "\n".join(table(head, rows))


def size_table(sizes: dict[str, int]) -> str:
    lines = ["\n| file | fp32 MB | int8 MB | smaller |", "|---|---|---|---|"]
    for title, whole, small in (
        ("torch, six blocks alone", "blocks-fp32.pt", "blocks-int8.pt"),
        ("torch, embeddings in int8 too", "fp32.pt", "int8.pt"),
        ("ONNX, embeddings in int8 too", "fp32.onnx", "any.onnx"),
        ("ONNX, embeddings left in fp32", "fp32.onnx", "int8-table-fp32.onnx"),
    ):
        ratio = sizes[whole] / sizes[small]
        lines.append(f"| {title} | {sizes[whole] / 1e6:.1f} | {sizes[small] / 1e6:.1f} | {ratio:.2f} x |")
    return "\n".join(lines)


def main() -> None:
    options = arguments(__doc__, seeds=5, recorded=True)
    options.add_argument("part", nargs="?", choices=("speed", "accuracy", "all"), default="all")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--processes", type=int, default=5)
    options.add_argument("--json", type=Path, help="measure speed in this process, and write the figures here")
    chosen = options.parse_args()
    quiet()
    if chosen.json:
        chosen.json.write_text(json.dumps(speed(chosen.rounds)))
        return
    if chosen.part in ("speed", "all"):
        processes = in_processes(__file__, chosen.processes, "speed", "--rounds", f"{chosen.rounds}")
        print(measured(f"quantization.py speed --rounds {chosen.rounds} --processes {chosen.processes}"), end="\n\n")
        print(*(speed_table(f"{rows} x {length}", processes) for rows, length in SHAPES), sep="\n\n")
        print(size_table(processes[0]["bytes"]))
    if chosen.part in ("accuracy", "all"):
        section = accuracy(chosen.seeds, Runs(chosen.record))
        print(section)
        if chosen.write:
            path = RESULTS / "quantization.md"
            path.write_text(into(path.read_text(), section))


if __name__ == "__main__":
    main()
