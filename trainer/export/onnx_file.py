"""An ONNX file for ONNX Runtime: dynamic batch and sequence axes, optionally with int8 weights and dynamic activations.
It has operator set 23, which ONNX Runtime opens from 1.23 on.

int8 is ONNX Runtime's dynamic quantization of matrix products with constant weights: weights QInt8, symmetric, a
scale per output channel; activations uint8, a scale and zero point per tensor, found in each call. Embeddings and
convolutions stay float32. Codes stay within 7 bits unless the file is for CPUs with VNNI alone: without it ONNX Runtime
sums products in saturating 16-bit pairs, and codes of 8 bits give other numbers. Which of the two a file is stands in
its metadata, `CPU`, and `open_session` opens one for VNNI in such a way that it is right, if slow, everywhere.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...callbacks.compression.fake_quantization import PRODUCT_BITS, highest
from . import encodings
from .runtimes import CPU, EXACT, Batch, LogitsFunction, eager, needed, onnxruntime, sample
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
    """Return what an exported graph takes of a batch: no position ids, and a mask wherever there are tokens."""
    kept = {name: value for name, value in batch.items() if name != "position_ids"}
    if "input_ids" in kept:
        kept.setdefault("attention_mask", torch.ones_like(kept["input_ids"]))
    return kept


@dataclass(frozen=True, kw_only=True)
class Products:
    """Which matrix products become int8, and how their weights are rounded.

    bits: of the codes. only: the names of the weights; by default all linear layers'. on_grid: they lie on a grid
    that training has left them on, and keep it.
    """

    bits: int = PRODUCT_BITS["any"]
    only: Collection[str] | None = None
    on_grid: bool = False

    @property
    def cpu(self) -> str:
        return next(cpu for cpu, bits in PRODUCT_BITS.items() if self.bits <= bits)


def write(trained: Trained, folder: Path, products: Products | None, *, traced: Path | None = None) -> list[str]:
    """Trace the model on two samples and write it to `folder/model.onnx`; the tokenizer goes beside it.

    products: what becomes int8; None: nothing. traced: a file that `trace` wrote of this very model, taken instead.
    """
    notes = ["packed documents attend to each other"] if "position_ids" in sample(trained, rows=1) else []
    if traced is not None:
        shutil.copyfile(traced, folder / NAME)
    else:
        trace(trained.model, model_inputs(sample(trained, rows=2)), folder / NAME)
    if products is not None:
        keep = left(trained.model, products.only) if products.only is not None else ()
        quantize_file(folder / NAME, keep, products.bits, products.on_grid)
        if products.cpu == "vnni":
            notes.append(
                "for CPUs with VNNI (and Arm): on other CPUs ONNX Runtime computes other numbers from this file, "
                f"unless its session has {EXACT}='1'"
            )
    if trained.task.tokenizer is not None:
        trained.task.tokenizer.save_pretrained(folder)
    return notes


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


def quantize_file(path: Path, keep: Sequence[Tensor] = (), bits: int = 7, on_grid: bool = False) -> None:
    """Replace a float32 ONNX file by its dynamically quantized form. keep: weights whose products stay in floats.

    bits, on_grid: of `Products`. Raises `CannotExport` where a product with another weight did not become one of int8,
    or where its codes are not what they were to be: others would overflow on the CPUs that the file is for.
    """
    onnx = needed("onnx")
    quantization = needed("onnxruntime.quantization")
    graph = onnx.load(str(path))
    del graph.graph.value_info[:]  # intermediate shapes as traced: where folding has reused a name they are wrong
    products = _products(graph, keep)
    with _quietly():
        quantization.quantize_dynamic(
            graph, str(path), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
            weight_type=quantization.QuantType.QInt8, nodes_to_exclude=[p.node for p in products if p.kept],
            extra_options={"TensorQuantOverrides": {
                p.name: _channels(p, bits, on_grid) for p in products if not p.kept
            }},
        )  # fmt: skip
    made = onnx.load(str(path))
    _check_products(made.graph, sum(not p.kept for p in products), bits, path)
    onnx.helper.set_model_props(made, {CPU: Products(bits=bits).cpu})
    onnx.save(made, str(path))


@dataclass(frozen=True)
class Product:
    """A matrix product of the graph: its node, and its constant's name, values [in, out] or, at axis 0, [out, in]."""

    node: str
    name: str
    weight: Tensor
    axis: int
    kept: bool


def _products(graph: Any, keep: Sequence[Tensor]) -> list[Product]:
    """The products with a constant matrix; kept: that is one of `keep`.

    The exporter transposes and renames constants, so they are recognized by their values.
    """
    onnx = needed("onnx")
    constants = {each.name: each for each in graph.graph.initializer}
    products = []
    for node in graph.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in constants:
            continue
        weight = torch.tensor(onnx.numpy_helper.to_array(constants[node.input[1]]))
        kept = weight.ndim != 2 or any(torch.equal(weight, w) or torch.equal(weight, w.T) for w in keep)
        # a Gemm is first split into a product of this name and a sum
        name = node.name if node.op_type == "MatMul" or not kept else f"{node.name}_MatMul"
        axis = 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
        products.append(Product(name, node.input[1], weight, axis, kept))
    return products


def _channels(product: Product, bits: int, on_grid: bool) -> list[dict[str, Any]]:
    """What ONNX Runtime's quantizer is told of each output channel of a weight."""
    _, steps = encodings.quantize_product(product.weight, product.axis, bits, on_grid)
    zero = np.int8(0)
    return [{"axis": product.axis, "scale": step, "zero_point": zero} for step in steps.flatten().numpy()]


def _check_products(graph: Any, wanted: int, bits: int, path: Path) -> None:
    onnx = needed("onnx")
    constants = {each.name: each for each in graph.initializer}
    weights = [node.input[1] for node in graph.node if node.op_type == "MatMulInteger"]
    if len(weights) < wanted:
        raise CannotExport(f"{len(weights)} of {wanted} matrix products became int8 products in {path.name}")
    for name in weights:
        largest = int(np.abs(onnx.numpy_helper.to_array(constants[name]).astype(np.int16)).max(initial=0))
        if largest > highest(bits):
            raise CannotExport(f"{name} in {path.name} has a code of {largest}, above {highest(bits)} of {bits} bits")


def left(model: nn.Module, ways: Collection[str]) -> list[Tensor]:
    """The weights of linear layers that are not in `ways`."""
    named = dict(model.named_parameters())
    return [named[name].detach() for name in channel_axes(model) if name not in ways]


def reload(folder: Path) -> LogitsFunction:
    return onnxruntime(folder / NAME)


def expected(trained: Trained, products: Products | None) -> LogitsFunction:
    """Return what the file must compute: the model or its emulation with int8 products, on the graph's inputs."""
    run = eager(trained.model if products is None else emulated(trained.model, products))
    return lambda batch: run(model_inputs(batch))


def emulated(model: nn.Module, products: Products) -> nn.Module:
    """A copy that computes linear layers as ONNX Runtime's dynamic int8 does, in float32 arithmetic."""
    model = copy.deepcopy(model)
    axes = {n: axis for n, axis in channel_axes(model).items() if products.only is None or n in products.only}
    named = dict(model.named_parameters())
    by_weight = {id(named[name]): axis for name, axis in axes.items()}
    for layer in model.modules():
        axis = by_weight.get(id(layer._parameters.get("weight")))
        if axis is None or not (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"):
            continue
        tensor: Any = layer.weight
        weight = encodings.dequantize_int8(*encodings.quantize_product(tensor, axis, products.bits, products.on_grid))
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
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
