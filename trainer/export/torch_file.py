"""One safetensors file that says how to read itself: tensors plain, sparse or in low-bit form, and a header in JSON.

The header is the file's own metadata (key "shoestring"): `{"version": 1, "tensors": {name: how}, "recipe": ...}`. A
tensor `w` is stored under its name, or in parts: `w:values` `w:scale` (int8, int4, grid), `w:values` `w:codebook`,
`w:mask` `w:kept` (sparse; of the integers where it is both). This reads it with torch, NumPy and safetensors alone:

    import json, math, numpy as np, torch
    from safetensors import safe_open

    def load(path):
        with safe_open(path, "pt") as file:
            get, out = file.get_tensor, {}
            for name, how in json.loads(file.metadata()["shoestring"])["tensors"].items():
                shape, count = how["shape"], math.prod(how["shape"])
                w = get(name + how["holds"])  # "" | ":values" | ":kept"
                if how["encoding"] == "grid":  # bit after bit, the lowest first; the highest counts negative
                    bits = np.unpackbits(w.numpy(), bitorder="little")
                    bits = bits[: len(bits) // how["bits"] * how["bits"]].reshape(-1, how["bits"])
                    w = torch.from_numpy(bits @ np.array([*(2 ** np.arange(how["bits"] - 1)), -2 ** (how["bits"] - 1)]))
                if how["encoding"] == "codebook":  # the first index of a byte in its highest bits
                    each = torch.arange(8 - how["bits"], -1, -how["bits"])
                    w = get(name + ":codebook")[(w[:, None] >> each & 2 ** how["bits"] - 1).flatten()[:count]]
                if how["sparse"]:
                    mask = np.unpackbits(get(name + ":mask").numpy(), count=count, bitorder="little")
                    mask = torch.from_numpy(mask).bool()
                    w = torch.zeros(count, dtype=w.dtype).masked_scatter_(mask, w).view(shape)
                if how["encoding"] == "int4":  # two to a byte, the first in the low half
                    w = ((torch.stack([w & 15, w >> 4], 1).view(-1, how["group"]) + 8) % 16).char() - 8
                if how["encoding"] == "grid":
                    w = w.flatten()[:count].view(-1, how["group"])
                if how["encoding"] in ("int8", "int4", "grid"):
                    w = (w.float() * get(name + ":scale").float()).flatten()[:count]
                out[name] = w.view(shape).to(getattr(torch, how["dtype"]))
        return out

Tied weights are stored once: `model.load_state_dict(load(path), strict=False)` fills both. Where the header has
"ranks", each linear layer named there is two, `name.first` without a bias and `name.second`.
"float16" and "bfloat16" store plain tensors in that dtype, to be widened again on loading.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import ShoestringError
from ...callbacks.compression import codebooks
from . import encodings, low_rank
from .encodings import Codebook, Grid
from .runtimes import LogitsFunction, eager
from .trained import AS_TRAINED, CannotExport, Trained

NAME = "model.safetensors"
VERSION = 1
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Way = str | Grid | Codebook
Ways = Mapping[str, Grid | Codebook]  # by the name of a weight: what it was trained to be


def write(trained: Trained, folder: Path, quantize: str | None, sparse: bool) -> list[str]:
    """The model's weights and buffers, encoded."""
    about = {"recipe": trained.recipe.hash, "ranks": low_rank.ranks(trained.model)}
    save(trained.model, folder / NAME, quantize=quantize, sparse=sparse, about=about, ways=trained.ways)
    return []


def save(
    model: nn.Module, path: Path, *, quantize: str | None, sparse: bool, about: dict[str, Any], ways: Ways | None = None
) -> None:
    """Write `model` to `path`.

    quantize: "int8" or "int4" for the weights of linear, convolution and embedding layers, while norms and biases stay
    as they are; "float16" or "bfloat16" for everything; "trained" for the weights in `ways`; None for nothing. sparse:
    tensors are stored as mask and kept values where that is smaller.
    """
    from safetensors.torch import save_file

    parts: dict[str, Tensor] = {}
    how: dict[str, dict[str, Any]] = {}
    for name, about_it, encoded in encoded_tensors(model, quantize, sparse, ways):
        how[name] = about_it
        parts |= {f"{name}{suffix}": part.contiguous() for suffix, part in encoded.items()}
    header = json.dumps({"version": VERSION, "tensors": how, **about})
    save_file(parts, path, metadata={"format": "pt", "shoestring": header})


def encoded_tensors(
    model: nn.Module, quantize: str | None, sparse: bool, ways: Ways | None = None
) -> Iterator[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """(name, how it is stored, its parts by the suffix of their name) of every tensor, one after another."""
    axes, chosen = channel_axes(model), _chosen(model, quantize, ways)
    for name, tensor in stored(model):
        try:
            yield name, *encode(tensor, chosen.get(name), axes.get(name, 0), sparse)
        except ShoestringError as error:
            raise CannotExport(f"{name}: {error}") from None


def _chosen(model: nn.Module, quantize: str | None, ways: Ways | None) -> Mapping[str, Way]:
    """By the name of a tensor: what `quantize` makes of it. Those that stay as they are are not in here."""
    if quantize == AS_TRAINED:
        return ways or {}
    names = (name for name, _ in stored(model)) if quantize in HALVES else channel_axes(model)
    return dict.fromkeys(names, quantize) if quantize else {}


def encode(tensor: Tensor, way: Way | None, axis: int, sparse: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(how a tensor is stored, its parts by the suffix of their name). axis: the output channel's, for int8."""
    tensor = tensor.detach().cpu()
    how: dict[str, Any] = {
        "encoding": "plain", "sparse": False, "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }  # fmt: skip
    holds, bits = ":values", None  # bits: of a value, where several share a byte
    if isinstance(way, Codebook):
        packed, codebook = codebooks.encode(tensor, way.values(tensor))
        how |= {"encoding": "codebook", "holds": holds, "bits": codebooks.bits_for(len(codebook))}
        return how, {holds: packed, ":codebook": codebook}
    if way == "int4":
        values, scale = encodings.quantize_int4(tensor)
        how |= {"encoding": "int4", "holds": holds, "group": encodings.GROUP}
        return how, {holds: encodings.pack_bits(values, 4), ":scale": scale}
    if isinstance(way, Grid):
        values, steps = way.encode(tensor)
        rest, bits = {":scale": steps.view(-1, 1)}, way.bits
        how |= {"encoding": "grid", "bits": bits, "group": tensor.numel() // steps.numel()}
    elif way == "int8":
        values, scale = encodings.quantize_int8(tensor, axis)
        rest = {":scale": scale}
        how["encoding"] = "int8"
    else:
        holds, values, rest = "", _halved(tensor, way) if way else tensor, {}
    if sparse and encodings.sparse_pays(values, bits):
        mask, values = encodings.encode_sparse(values)
        holds, rest = ":kept", {":mask": mask, **rest}
        how["sparse"] = True
    return {**how, "holds": holds}, {holds: encodings.pack_bits(values, bits) if bits else values, **rest}


def _halved(tensor: Tensor, way: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = tensor.to(HALVES[way])
    if torch.isfinite(tensor).all() and not torch.isfinite(half).all():
        raise encodings.CannotEncode(
            f"{way}: a magnitude of {tensor.abs().max():.3g} is too large for it. Use bfloat16."
        )
    return half


def read(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, decoded, by name."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads((file.metadata() or {}).get("shoestring", "{}"))
        if header.get("version") != VERSION:
            raise CannotExport(f"{path} has version {header.get('version')}; this program reads {VERSION}.")
        return {name: _decode(file, name, how) for name, how in header["tensors"].items()}


def _decode(file: Any, name: str, how: dict[str, Any]) -> Tensor:
    shape, dtype = tuple(how["shape"]), getattr(torch, how["dtype"])
    values = file.get_tensor(name + how["holds"])
    if how["encoding"] == "codebook":
        return codebooks.decode(values, file.get_tensor(f"{name}:codebook"), shape).to(dtype)
    if how["encoding"] == "grid":
        count = math.prod(shape)
        if how["sparse"]:
            count = int(encodings.unpack_mask(file.get_tensor(f"{name}:mask"), shape).sum())
        values = encodings.unpack_bits(values, how["bits"], count)
    if how["sparse"]:
        values = encodings.decode_sparse(file.get_tensor(f"{name}:mask"), values, shape)
    if how["encoding"] == "int8":
        values = encodings.dequantize_int8(values, file.get_tensor(f"{name}:scale"))
    elif how["encoding"] == "int4":
        scale = file.get_tensor(f"{name}:scale")
        whole = encodings.unpack_bits(values, 4, scale.numel() * how["group"]).view(-1, how["group"])
        values = encodings.dequantize_int4(whole, scale, shape)
    elif how["encoding"] == "grid":
        scale = file.get_tensor(f"{name}:scale")
        values = (values.view(-1, how["group"]).float() * scale).view(shape)
    return values.to(dtype)


def reload(trained: Trained, folder: Path) -> LogitsFunction:
    """The file's weights in a model of the same shape, in which nothing of the trained one is left."""
    return eager(filled(trained.model, folder / NAME))


def opened(model: nn.Module, path: Path) -> nn.Module:
    """The model in a file, given the one that it was made from: a copy, in the shape that the header tells."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        wanted = json.loads((file.metadata() or {}).get("shoestring", "{}")).get("ranks") or {}
    return filled(low_rank.shaped(model, wanted), path)


def filled(model: nn.Module, path: Path) -> nn.Module:
    """A copy of `model` with the weights of a file; every tensor of the model must come from there."""
    fresh = copy.deepcopy(model)
    names = {name for name, _ in stored(fresh)}
    tensors = read(path)
    if names != tensors.keys():
        raise CannotExport(f"{path} is of another model: they differ in {', '.join(sorted(names ^ tensors.keys()))}.")
    fresh.load_state_dict(tensors, strict=False)
    return fresh.eval()


def expected(trained: Trained, quantize: str | None) -> LogitsFunction:
    """Return what the file must compute: the model itself, or a copy with its weights rounded in memory."""
    return eager(trained.model if quantize is None else rounded(trained.model, quantize, trained.ways))


@torch.no_grad()
def rounded(model: nn.Module, quantize: str, ways: Ways | None = None) -> nn.Module:
    """A copy whose weights are what is left of them after quantization, in their own dtype."""
    model = copy.deepcopy(model)
    axes, tensors = channel_axes(model), dict(stored(model))
    for name, way in _chosen(model, quantize, ways).items():
        tensors[name].copy_(_rounded(tensors[name], way, axes.get(name, 0)))
    return model.eval()


def _rounded(tensor: Tensor, way: Way, axis: int) -> Tensor:
    if isinstance(way, Grid | Codebook):
        return way.rounded(tensor)
    if way == "int8":
        return encodings.dequantize_int8(*encodings.quantize_int8(tensor, axis))
    if way == "int4":
        return encodings.dequantize_int4(*encodings.quantize_int4(tensor), tuple(tensor.shape))
    return _halved(tensor, way)


def stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return what a file holds: every parameter once, and the buffers that a state dict has."""
    yield from model.named_parameters()
    kept = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def channel_axes(model: nn.Module) -> dict[str, int]:
    """The weights of linear, convolution and embedding layers, and which axis is the output channel (or the row)."""
    axes: dict[int, int] = {}
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and weight.ndim >= 2:
            transposed = type(layer).__name__ == "Conv1D"  # transformers' linear layer with weight [in, out]
            if transposed or isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding):
                axes[id(weight)] = int(transposed)
    return {name: axes[id(p)] for name, p in model.named_parameters() if id(p) in axes}
