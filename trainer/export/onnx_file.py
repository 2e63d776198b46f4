"""An ONNX file for ONNX Runtime: dynamic batch and sequence axes, optionally with int8 weights and dynamic activations.
It has operator set 23, which ONNX Runtime opens from 1.23 on.

int8 is ONNX Runtime's dynamic quantization of matrix products with constant weights: weights QInt8, symmetric, a
scale per output channel; activations uint8, a scale and zero point per tensor, found in each call. Measured on a CPU
with VNNI: 2.5 times as fast as ONNX Runtime in float32; QUInt8 weights only 1.5 times. Embeddings and convolutions stay
float32.

A causal model takes `input_ids` and `attention_mask` [batch, sequence]; positions count from 0, so packed documents are
one document to it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import shutil
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import encodings
from .runtimes import Batch, Outputs, eager, needed, onnxruntime, sample
from .torch_file import channel_axes
from .trained import CannotExport, Trained

NAME = "model.onnx"
OPSET = 23  # the first with an operator for attention: one kernel, masks and all


class Positional(nn.Module):
    """A model called by position, for tracing: tensors in the order of `names` -> logits."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        out: Any = self.model(**dict(zip(self.names, tensors, strict=True)))
        return getattr(out, "logits", out)


def model_inputs(batch: Batch) -> Batch:
    """What an exported graph takes of a batch: no positions, and a mask wherever there are tokens."""
    kept = {name: value for name, value in batch.items() if name != "position_ids"}
    if "input_ids" in kept:
        kept.setdefault("attention_mask", torch.ones_like(kept["input_ids"]))
    return kept


def write(
    trained: Trained, folder: Path, quantize: bool, *, only: Collection[str] | None = None, traced: Path | None = None
) -> list[str]:
    """Trace the model on two samples and write it to `folder/model.onnx`; the tokenizer goes beside it.

    only: the weights whose products become int8; by default all. traced: a file that `trace` wrote of this very model,
    taken instead.
    """
    if traced is not None:
        shutil.copyfile(traced, folder / NAME)
    else:
        trace(trained.model, model_inputs(sample(trained, rows=2)), folder / NAME)
    if quantize:
        quantize_file(folder / NAME, left(trained.model, only) if only is not None else ())
    if trained.task.tokenizer is not None:
        trained.task.tokenizer.save_pretrained(folder)
    return ["packed documents see each other"] if "position_ids" in sample(trained, rows=1) else []


def trace(model: nn.Module, batch: Batch, path: Path) -> None:
    """torch.export, then ONNX, all weights inside the one file (2 GiB at most)."""
    names = list(batch)
    rows = torch.export.Dim("batch", min=1, max=65536)
    length = torch.export.Dim("sequence", min=2, max=longest(model))
    shapes = tuple({0: rows, 1: length} if "input_ids" in batch else {0: rows} for _ in names)
    tensors = tuple(
        value[:2] if len(value) > 1 else value.repeat(2, *[1] * (value.ndim - 1)) for value in batch.values()
    )
    with _quietly():
        try:
            program = program_of(Positional(model, names).eval(), tensors, dynamic_shapes=(shapes,), input_names=names,
                                 output_names=["logits"])  # fmt: skip
        except CannotExport:
            raise
        except Exception as error:  # torch.export and onnxscript raise their own types for what they cannot trace
            what = str(error).strip().splitlines() or [type(error).__name__]
            raise CannotExport(f"{type(model).__name__} cannot be exported to ONNX: {what[0][:300]}") from error
        program.save(str(path), external_data=False)


def program_of(model: nn.Module, args: tuple[Any, ...], **options: Any) -> Any:
    """The ONNX program of a model, by torch.export. options: as of `torch.onnx.export`.

    onnxscript's fusions of this operator set are left out: its rotary embeddings have tables of one row, which ONNX
    Runtime refuses for a batch of several.
    """
    needed("onnx")
    needed("onnxscript")
    from onnxscript import optimizer

    program: Any = torch.onnx.export(
        model, args, dynamo=True, opset_version=OPSET, optimize=False, verbose=False, **options
    )
    optimizer.optimize_ir(program.model)
    return program


def quantize_file(path: Path, keep: Sequence[Tensor] = ()) -> None:
    """Replace a float32 ONNX file by its dynamically quantized form. keep: weights whose products stay in floats.

    Raises `CannotExport` where a product with another weight did not become one of int8.
    """
    onnx = needed("onnx")
    quantization = needed("onnxruntime.quantization")
    graph = onnx.load(str(path))
    del graph.graph.value_info[:]  # intermediate shapes as traced: where folding has reused a name they are wrong
    products, kept = _products(graph, keep)
    with _quietly():
        quantization.quantize_dynamic(
            graph, str(path), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
            weight_type=quantization.QuantType.QInt8, nodes_to_exclude=kept,
        )  # fmt: skip
    made = sum(node.op_type == "MatMulInteger" for node in onnx.load(str(path)).graph.node)
    if made < len(products) - len(kept):
        raise CannotExport(f"{made} of {len(products) - len(kept)} matrix products became int8 products in {path.name}")


def _products(graph: Any, keep: Sequence[Tensor]) -> tuple[list[str], list[str]]:
    """Names of the products with a constant; and of those among them whose constant is one of `keep`.

    The exporter transposes and renames constants, so they are recognized by their values.
    """
    onnx = needed("onnx")
    constants = {each.name: each for each in graph.graph.initializer}
    products, kept = [], []
    for node in graph.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in constants:
            continue
        products.append(node.name)
        found = torch.tensor(onnx.numpy_helper.to_array(constants[node.input[1]]))
        if any(torch.equal(found, w) or torch.equal(found, w.T) for w in keep):
            # a Gemm is first split into a product of this name and a sum
            kept.append(node.name if node.op_type == "MatMul" else f"{node.name}_MatMul")
    return products, kept


def left(model: nn.Module, ways: Collection[str]) -> list[Tensor]:
    """The weights of linear layers that are not in `ways`."""
    named = dict(model.named_parameters())
    return [named[name].detach() for name in channel_axes(model) if name not in ways]


def reload(folder: Path) -> Outputs:
    return onnxruntime(folder / NAME)


def expected(trained: Trained, quantize: bool, only: Collection[str] | None = None) -> Outputs:
    """What the file must compute: the model or its emulation with int8 products, on the inputs the graph takes."""
    run = eager(emulated(trained.model, only) if quantize else trained.model)
    return lambda batch: run(model_inputs(batch))


def emulated(model: nn.Module, only: Collection[str] | None = None) -> nn.Module:
    """A copy that computes linear layers as ONNX Runtime's dynamic int8 does, in float32 arithmetic.

    only: the names of their weights; by default all.
    """
    model = copy.deepcopy(model)
    axes = {name: axis for name, axis in channel_axes(model).items() if only is None or name in only}
    named = dict(model.named_parameters())
    by_weight = {id(named[name]): axis for name, axis in axes.items()}
    for layer in model.modules():
        axis = by_weight.get(id(layer._parameters.get("weight")))
        if axis is None or not (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"):
            continue
        weight = encodings.dequantize_int8(*encodings.quantize_int8(layer.weight, axis))  # type: ignore[arg-type]
        layer.weight = nn.Parameter(weight, requires_grad=False)  # of its own: a tied embedding stays float32
        layer.register_forward_pre_hook(lambda layer, args: (affine_uint8(args[0]), *args[1:]))
    return model.eval()


def affine_uint8(x: Tensor) -> Tensor:
    """`x` rounded to 256 levels from min(x, 0) to max(x, 0), one scale for the whole tensor: DynamicQuantizeLinear."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    if scale == 0:
        return x
    zero = (-low / scale).round().clamp(0, 255)
    return ((x / scale).round().add(zero).clamp(0, 255) - zero) * scale


def longest(model: Any) -> int:
    """Tokens that a model takes at most."""
    config = getattr(model, "config", None)
    return getattr(config, "max_position_embeddings", None) or 1 << 20


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without remarks on torchvision, pre-processing and deprecations inside the exporter."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    before = [found.level for found in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found in loggers:
            found.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for found, level in zip(loggers, before, strict=True):
                found.setLevel(level)
