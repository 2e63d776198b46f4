"""Pruning after training, in one pass over a calibration set: no gradients, minutes instead of hours.

`prune_one_shot` goes through the linear layers in the order in which the model runs them; the inputs a layer is judged
by come from the model with all earlier layers already pruned. Three methods:
  magnitude  removes the smallest |w| of each row; looks at no data
  wanda      removes the smallest |w| * |x| of each row, |x| the norm of what enters there (arXiv 2306.11695)
  sparsegpt  removes what costs least by the inverse Hessian and corrects the weights to its right (arXiv 2301.00774)
Zeros survive quantization (`quantize.quantize`), so prune first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import ShoestringError
from ...callbacks.parameters.layers import quantizable
from ...callbacks.sparsity.saliency import wanda

METHODS = ("magnitude", "wanda", "sparsegpt")
BLOCK = 128  # columns that SparseGPT corrects at once, and among which it compares
DAMPING = 0.01  # of the Hessian's mean diagonal, added to it


class CannotPrune(ShoestringError):
    """A pattern or a calibration set that does not fit the layer."""


def keep_mask(scores: Tensor, sparsity: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """Return the mask of what to keep, bool [rows, columns]: the highest `scores` of each row.

    sparsity: share of each row to remove, rounded down to whole weights. pattern: (n, m) keeps n of every m
    neighbours instead. Of equal scores the earlier ones go.
    """
    rows, columns = scores.shape
    if pattern is not None:
        n, m = pattern
        if columns % m:
            raise CannotPrune(f"rows of {columns} weights cannot be cut in groups of {m} for the pattern {n}:{m}")
        return _highest(scores.view(rows, columns // m, m), n).view(rows, columns)
    return _highest(scores, columns - int(sparsity * columns + 1e-9))


def _highest(scores: Tensor, keep: int) -> Tensor:
    order = scores.sort(dim=-1, stable=True).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter(-1, order[..., : scores.shape[-1] - keep], False)


def wanda_scores(weight: Tensor, hessian: Tensor) -> Tensor:
    """|w| times the norm of its input over the calibration set (arXiv 2306.11695, eq. 1), [out, in].

    hessian: X^T X, [in, in], whose diagonal holds the squared norms.
    """
    return wanda(weight, hessian.diagonal().clamp(min=0).sqrt().to(weight.dtype))


def sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float, pattern: tuple[int, int] | None = None, block: int = BLOCK
) -> Tensor:
    """A pruned and corrected copy of `weight` [out, in], given X^T X of its inputs [in, in] (arXiv 2301.00774, alg. 1).

    Columns are settled from left to right. Removing w_j costs w_j^2 / c_j^2, where c is the diagonal of the upper
    Cholesky factor of the inverse Hessian: the exact cost if all columns to the left are fixed. The optimal brain
    surgeon then moves what is to the right to make up for it. Which weights go is decided per block of `block` columns
    over all rows together, or per group of a pattern, just before its first column. Inputs that never occur are dead:
    their weights go.
    """
    left = weight.detach().to(torch.float64, copy=True)
    h = hessian.to(torch.float64, copy=True)
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    left[:, dead] = 0.0
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    if pattern is not None:
        if left.shape[1] % pattern[1]:
            raise CannotPrune(f"rows of {left.shape[1]} weights cannot be cut in groups of {pattern[1]}")
        block = max(pattern[1], block // pattern[1] * pattern[1])
    for start in range(0, left.shape[1], block):
        end = min(start + block, left.shape[1])
        errors = _settle(left[:, start:end], factor[start:end, start:end], sparsity, pattern)
        left[:, end:] -= errors @ factor[start:end, end:]
    return left.to(weight.dtype)


def _settle(block: Tensor, factor: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """Prune the columns of `block` in place; returns what each removal leaves to be made up for, [out, columns]."""
    scale = factor.diagonal()
    errors = torch.zeros_like(block)
    keep = torch.ones_like(block, dtype=torch.bool)
    if pattern is None:
        cost = ((block / scale) ** 2).view(1, -1)
        keep = keep_mask(cost, sparsity).view_as(block)
    for j in range(block.shape[1]):
        if pattern is not None and j % pattern[1] == 0:
            group = slice(j, j + pattern[1])
            keep[:, group] = keep_mask((block[:, group] / scale[group]) ** 2, 0.0, pattern)
        shown = block[:, j] * keep[:, j]
        errors[:, j] = (block[:, j] - shown) / scale[j]
        block[:, j] = shown
        block[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]
    return errors


def prune_weight(
    weight: Tensor, hessian: Tensor, method: str, sparsity: float, pattern: tuple[int, int] | None = None
) -> Tensor:
    """A pruned copy of one linear layer's weight [out, in]; hessian: X^T X of its inputs, [in, in]."""
    if method == "sparsegpt":
        return sparsegpt(weight, hessian, sparsity, pattern)
    scores = weight.abs() if method == "magnitude" else wanda_scores(weight, hessian)
    return weight * keep_mask(scores, sparsity, pattern)


# -- through a model ---------------------------------------------------------------------------------------------------
def prune_one_shot(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "sparsegpt",
    sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None,
    skip: Sequence[str] = (),
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, float]:
    """Prune the linear layers of `model` in place; returns the share of zeros by the name of the weight.

    batches: a few hundred samples that look like what the model will see, as tensors, tuples (positional) or mappings
    (by name); kept in memory. sparsity: share to remove; pattern: (n, m) keeps n of m instead. skip: patterns of
    weights to leave, such as output heads. forward: how to run the model on a batch, where that is not
    `model(batch)`. Costs one partial forward of all batches per layer, and one [in, in] matrix at a time.
    """
    _check(method, sparsity, pattern)
    data, training = list(batches), model.training
    if not data:
        raise CannotPrune("no calibration batches were given")
    run = forward or _call
    named = dict(model.named_parameters())
    owners = {name: used[0].module for name, used in quantizable(model, skip).items()}
    layers = {name: layer for name, layer in owners.items() if isinstance(layer, nn.Linear)}
    if not layers:
        raise CannotPrune(f"no linear layer is left to prune after skip={list(skip)}")
    zeros: dict[str, float] = {}
    model.eval()
    try:
        with torch.no_grad():
            for name in _in_order(model, layers, data[0], run):
                weight = named[name]
                hessian = _hessian(model, layers[name], data, run)
                weight.copy_(prune_weight(weight, hessian, method, sparsity, pattern))
                zeros[name] = float((weight == 0).float().mean())
    finally:
        model.train(training)
    return zeros


def _check(method: str, sparsity: float, pattern: tuple[int, int] | None) -> None:
    if method not in METHODS:
        raise CannotPrune(f"method={method!r} is not allowed; use {' | '.join(METHODS)}")
    if not 0 <= sparsity < 1:
        raise CannotPrune(f"sparsity={sparsity!r} is not allowed; use a share in [0, 1)")
    if pattern is not None and not 0 < pattern[0] < pattern[1]:
        raise CannotPrune(f"pattern={pattern!r} is not allowed; use (n, m) with 0 < n < m, as (2, 4)")


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _in_order(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, run: Callable[[nn.Module, Any], Any]
) -> list[str]:
    """Names of the layers that take part, in the order of their first call."""
    seen: dict[str, None] = {}
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: seen.setdefault(name)) for name, layer in layers.items()
    ]
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if missing := layers.keys() - seen.keys():
        raise CannotPrune(f"{', '.join(sorted(missing))} were not used in the first batch; add them to skip")
    return list(seen)


class _Reached(Exception):
    """Nothing after this layer needs to run."""


def _hessian(
    model: nn.Module, layer: nn.Module, batches: Sequence[Any], run: Callable[[nn.Module, Any], Any]
) -> Tensor:
    """X^T X in float64 of what enters `layer` at its first call in each batch, [in, in]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)

    def gather(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        total.add_((x.mT.float() @ x.float()).double())
        raise _Reached

    handle = layer.register_forward_pre_hook(gather)
    try:
        for batch in batches:
            try:
                run(model, batch)
            except _Reached:
                continue
    finally:
        handle.remove()
    return total
