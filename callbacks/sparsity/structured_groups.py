"""Which channels, neurons and heads depend on one another, how important each is, and which of them to keep.

What must be cut together (a layer's outputs, the norms after it, the inputs of the layers that read it) is found by
torch-pruning's dependency graph (arXiv 2301.12900) in one traced forward.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import ShoestringError
from ..parameters.cut import Cut
from .structured_check import CannotTrace, bounded_groups, check_cut, restored

INSTALL = "pip install 'shoestring[compress]'"
# the names under which attention layers keep their projections, and what they keep about heads
PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "num_key_value_heads")
HEAD_WIDTHS = ("all_head_size", "inner_dim")
MIXES = ("softmax", "bmm", "scaleddotproduct", "attention")  # operations in which channels meet


class NothingToCut(ShoestringError):
    """No group of channels, neurons or heads that could be cut."""


def torch_pruning() -> Any:
    """The package, or how to get it."""
    try:
        import torch_pruning as package
    except ImportError:
        raise ShoestringError(f"structured_pruning needs the package torch-pruning: {INSTALL}") from None
    return package


@dataclass(frozen=True)
class Member:
    """A parameter in a group: `index[i]` along `dim` belongs to channel `channel[i]` of the group."""

    name: str
    dim: int
    index: Tensor
    channel: Tensor


@dataclass(frozen=True)
class Group:
    """Channels that can only be cut from all members at once; `unit` neighbours make one head, or one channel."""

    root: nn.Module
    trigger: Any
    channels: int
    unit: int
    members: tuple[Member, ...]
    attention: str | None = None  # the module that counts the heads


# -- what to keep, given numbers -----------------------------------------------------------------------------------
def importance(members: Sequence[Member], channels: int, scores: Mapping[str, Tensor]) -> Tensor:
    """Sum of the scores of everything that goes with each channel, [channels]. Parameters without a score count 0.

    With the squares of the weights as scores it is the squared norm of the group (magnitude); with (weight x
    gradient) squared it is the first-order Taylor saliency of arXiv 1906.10771.
    """
    total = torch.zeros(channels, dtype=torch.float64)
    for member in members:
        if (score := scores.get(member.name)) is not None:
            other = [d for d in range(score.ndim) if d != member.dim]
            each = score.detach().to("cpu", torch.float64)
            each = each.sum(other) if other else each
            total.index_add_(0, member.channel, each[member.index])
    return total


def width(channels: int, ratio: float, round_to: int) -> int:
    """Return how many of `channels` stay: (1 - ratio) of them, to the nearest multiple of `round_to` if any."""
    wanted = max(1.0, channels * (1 - ratio))
    if channels < round_to or not ratio:
        return max(1, round(wanted))
    return min(channels, max(round_to, int(wanted / round_to + 0.5) * round_to))


def keep(scores: Tensor, ratio: float, *, unit: int = 1, round_to: int = 1) -> Tensor:
    """Indices of the channels to keep, ascending: those of highest score, of equal ones the first.

    `scores` [channels]; `unit` neighbours stay or go together by their sum (a head), and are not rounded.
    """
    each = scores.view(-1, unit).sum(1)
    count = width(len(each), ratio, round_to if unit == 1 else 1)
    chosen = each.argsort(descending=True, stable=True)[:count].sort().values
    return (chosen[:, None] * unit + torch.arange(unit)).view(-1)


# -- the groups of a model -----------------------------------------------------------------------------------------
def groups(module: nn.Module, forward: Callable[[], Any], skip: Sequence[str] = ()) -> tuple[Any, list[Group]]:
    """The dependency graph of `module` and the groups in it that can be cut.

    `forward()` runs the module once and returns its loss or outputs. Left whole are: what reaches the loss itself,
    residual streams of embeddings, of bare parameters and between layer norms, attention of unknown make, and whatever
    touches a parameter whose name matches a pattern in `skip`.
    """
    package = torch_pruning()
    training = {part: part.training for part in module.modules()}
    try:
        graph = package.DependencyGraph().build_dependency(
            module, example_inputs=None, forward_fn=lambda *_: forward(), verbose=False
        )
        heads = _heads(module)
        candidates = [_group(package, graph, items, heads, skip) for items in bounded_groups(graph, module)]
    except Exception as error:
        raise CannotTrace(
            f"structured_pruning cannot follow this model's forward: {type(error).__name__}: {error}"
        ) from error
    finally:
        for part, mode in training.items():
            part.training = mode
    return graph, [group for group in candidates if group is not None]


def _heads(module: nn.Module) -> dict[nn.Module, tuple[str, int]]:
    """Projection layer -> (name of its attention module, channels of a head), where all heads are alike."""
    heads: dict[nn.Module, tuple[str, int]] = {}
    for name, part in module.named_modules():
        for names in PROJECTIONS:
            layers = [getattr(part, each, None) for each in names]
            count = next((getattr(part, key) for key in HEAD_COUNTS if isinstance(getattr(part, key, None), int)), None)
            if count and all(isinstance(layer, nn.Linear) for layer in layers):
                widths = {layer.out_features for layer in layers}  # type: ignore[union-attr]
                if len(widths) == 1 and not (whole := widths.pop()) % count:
                    heads.update((layer, (name, whole // count)) for layer in layers)  # type: ignore[misc]
    return heads


def _group(package: Any, graph: Any, items: Any, heads: Mapping[nn.Module, tuple[str, int]], skip: Any) -> Group | None:
    """One of torch-pruning's groups in our terms; None if it must stay whole."""
    kinds, names = package.ops.OPTYPE, graph._module2name
    members: list[Member] = []
    attention: tuple[str, int] | None = None
    mixes = consumed = normed = False
    writers = set()
    for item in items:
        target, handler, part = item.dep.target, item.dep.handler, item.dep.target.module
        if target.type in (kinds.OUTPUT, kinds.PARAMETER, kinds.EMBED, kinds.MHA, kinds.LSTM, kinds.CUSTOMIZED):
            return None
        operation = str(getattr(part, "_grad_fn", "")) + str(target.name)
        mixes = mixes or (target.type == kinds.ELEMENTWISE and any(word in operation.lower() for word in MIXES))
        if not isinstance(part, nn.Module) or part not in names:
            continue
        if target.type == kinds.GN or (getattr(part, "groups", 1) > 1 and target.type == kinds.CONV):
            return None  # channels stay in their groups
        inwards = graph.is_in_channel_pruning_fn(handler) and not graph.is_out_channel_pruning_fn(handler)
        consumed = consumed or inwards
        normed = normed or target.type == kinds.LN
        if not inwards and target.type in (kinds.LINEAR, kinds.CONV):
            writers.add(part)
        attention = attention or (None if inwards else heads.get(part))
        members += _members(part, names[part], inwards, item)
    if any(fnmatch.fnmatch(member.name, pattern) for member in members for pattern in skip):
        return None
    stream = normed and len(writers) > 1  # what several layers add to may have been added to an input
    if not consumed or stream or (mixes and attention is None):
        return None
    root = items[0].dep
    channels, unit = len(items[0].idxs), attention[1] if attention else 1
    return Group(root.target.module, root.handler, channels, unit, tuple(members), attention and attention[0])


def _members(part: nn.Module, name: str, inwards: bool, item: Any) -> Iterator[Member]:
    index, channel = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
    dim = int(inwards) if not getattr(part, "transposed", False) else int(not inwards)
    for key, p in part.named_parameters(recurse=False):
        if key == "weight" or (key == "bias" and not inwards):
            yield Member(f"{name}.{key}" if name else key, dim if p.ndim > 1 else 0, index, channel)


# -- from groups to a cut ------------------------------------------------------------------------------------------
def choose(
    module: nn.Module,
    forward: Callable[[], Any],
    scores: Mapping[str, Tensor],
    *,
    ratio: float,
    round_to: int = 16,
    skip: Sequence[str] = (),
) -> Cut:
    """Cut the `ratio` of least important channels, neurons and heads of every group. Leaves `module` as it is.

    `scores`: parameter name -> a score for every element. Raises `NothingToCut` where nothing can go, and `CannotTrace`
    where the cut model would compute something else than the whole one with those channels set to zero.
    """
    graph, prunable = groups(module, forward, skip)
    if not prunable:
        raise NothingToCut(f"structured_pruning finds no channels, neurons or heads to cut with skip={list(skip)}")
    try:
        cut = _cut(module, graph, prunable, scores, ratio, round_to)
    except (IndexError, RuntimeError) as error:
        raise CannotTrace(
            f"structured_pruning cannot follow which channels go together: {type(error).__name__}: {error}. A layer "
            "splits, pools or reorders channels: name the parameters around it in `skip`."
        ) from error
    check_cut(module, forward, cut)
    return cut


def _cut(
    module: nn.Module, graph: Any, prunable: Sequence[Group], scores: Mapping[str, Tensor], ratio: float, round_to: int
) -> Cut:
    gone: list[tuple[Group, list[int]]] = []
    counts: dict[str, dict[str, int]] = {}
    parts = dict(module.named_modules())
    for group in prunable:
        kept = keep(importance(group.members, group.channels, scores), ratio, unit=group.unit, round_to=round_to)
        rest = sorted(set(range(group.channels)) - set(kept.tolist()))
        if rest:
            gone.append((group, rest))
            if group.attention is not None:
                counts[group.attention] = _counts(parts[group.attention], len(kept) // group.unit, len(kept))
    with _numbered(module) as shapes:
        for group, rest in gone:
            graph.get_pruning_group(group.root, group.trigger, rest).prune()
        kept_now, sizes = _read(module, shapes)
    for name, changed in counts.items():
        sizes.setdefault(name, {}).update(changed)
    return Cut(kept_now, sizes)


def _counts(attention: nn.Module, heads: int, channels: int) -> dict[str, int]:
    counts = {key: heads for key in HEAD_COUNTS if isinstance(getattr(attention, key, None), int)}
    return counts | {key: channels for key in HEAD_WIDTHS if isinstance(getattr(attention, key, None), int)}


@contextmanager
def _numbered(module: nn.Module) -> Iterator[dict[str, torch.Size]]:
    """Every element of every parameter and buffer is its own number inside the block: cutting shows which ones stay.

    On the way out the module has its tensors, attributes and sizes back. Yields the full shapes by name.
    """
    buffers = {id(b): _numbers(b) for b in module.buffers()}
    shapes = {name: t.shape for name, t in (*module.named_parameters(), *module.named_buffers())}
    with restored(module):
        for p in module.parameters():
            p.data = _numbers(p.data)
        for part in module.modules():
            part._buffers.update({key: buffers[id(b)] for key, b in part._buffers.items() if b is not None})
        yield shapes


def _numbers(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)  # exact up to 2^53


def _read(module: nn.Module, shapes: Mapping[str, torch.Size]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(what is kept of every tensor that was cut, the sizes its layers now have), from a numbered module."""
    kept: dict[str, Any] = {}
    layers: set[str] = set()
    for name, numbers in (*module.named_parameters(), *module.named_buffers()):
        if numbers.shape == shapes[name]:
            continue
        layers.add(name.rpartition(".")[0])
        places = torch.unravel_index(numbers.detach().reshape(-1).long(), shapes[name])
        masks = []
        for dim, place in enumerate(places):
            mask = torch.zeros(shapes[name][dim], dtype=torch.bool)
            mask[place] = True
            if not mask.all():
                masks.append((dim, mask))
        kept[name] = tuple(masks)
    sizes = {}
    for name, part in module.named_modules():
        if name in layers:
            plain = {k: v for k, v in vars(part).items() if not k.startswith("_") and k != "training"}
            sizes[name] = {k: v for k, v in plain.items() if type(v) is int or (k == "normalized_shape")}
    return kept, sizes
