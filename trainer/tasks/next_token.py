"""The cross entropy of next tokens, without the logits of all positions at once.

Logits are [B, T, V]: with a vocabulary of 128k they are by far the largest tensor of a training, and cross entropy
holds several of their size. In chunks, the model gives hidden states [B, T, H], and its output layer sees some rows at
a time: each chunk's logits are dropped after they have given their loss, and computed again in its backward, which
costs the output layer's forward once more. Torch's `linear_cross_entropy` does so with a plain weight; here the output
layer is called as the module that it is, so adapters, quantized weights and weights that ZeRO-3 gathers work alike.

Source of the idea: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, arXiv 2411.09009.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ...callbacks.forward.isolated_step import evaluating
from ...callbacks.forward.model_calls import is_watched
from ..data.errors import TaskError
from ..data.token_store import IGNORED
from .chunks import CHUNK, LARGE, Chunked

PROBED = 16  # tokens on which both ways are compared
TOLERANCE = 1e-4  # of the largest logit; with less than float32, of its own precision
LOW_TOLERANCE = 2e-2


class NextTokenLoss:
    """Sums the cross entropy of a batch, in nats.

    Whether a model's logits are what its output layer makes of its decoder's hidden states is asked of the model
    itself, at the first batch: some scale or cap them afterwards.

    Args:
        chunked: True, False, or "auto": where the logits of a batch would be large. Where something watches what the
            model returns, as distillation does, it is called as it is.
    """

    def __init__(self, chunked: Chunked = "auto") -> None:
        self.chunked = chunked
        self._possible: bool | None = None

    def __call__(self, model: Any, given: Mapping[str, Tensor], weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(sum of the losses [], number of targets []) of a batch; `weights` [B] are factors of its rows' losses.

        model: a causal language model of transformers, maybe with adapters. given: what it is called with, and `labels`
        [B, T]. A batch without a target has a loss of 0.
        """
        labels = given["labels"][:, 1:]
        inputs = {name: value for name, value in given.items() if name != "labels"}
        targets = (labels != IGNORED).sum()
        if getattr(model.config, "output_router_logits", False) and weights is None:
            loss = model(**given).loss  # with a term for its routers
            return torch.where(targets > 0, loss * targets, 0.0), targets
        rows = _most_rows(model, inputs["input_ids"])
        if self._in_chunks(model, inputs["input_ids"], rows):
            decoder, head = _parts(model)
            hidden = decoder(**inputs)[0][:, :-1]
            return _in_parts(head, -(-rows * _vocabulary(model) // CHUNK), hidden, labels, weights), targets
        logits = model(**inputs).logits[:, :-1]
        return _loss(logits.flatten(0, 1), labels.flatten(), _by_row(weights, labels)), targets

    def by_token(self, model: Any, given: Mapping[str, Tensor]) -> Tensor:
        """The loss of each target [B, T - 1], 0 where there is none; as of a call, with the same model and `given`."""
        labels = given["labels"][:, 1:]
        inputs = {name: value for name, value in given.items() if name != "labels"}
        rows = _most_rows(model, inputs["input_ids"])
        if self._in_chunks(model, inputs["input_ids"], rows):
            decoder, head = _parts(model)
            hidden = decoder(**inputs)[0][:, :-1]
            losses = torch.cat(list(_parts_of(_each, head, -(-rows * _vocabulary(model) // CHUNK), hidden, labels)))
        else:
            losses = _each(model(**inputs).logits[:, :-1].flatten(0, 1), labels.flatten())
        return losses.view_as(labels)

    def _in_chunks(self, model: Any, ids: Tensor, rows: int) -> bool:
        if not self.chunked or is_watched(model):
            return False
        if self.chunked == "auto" and rows * _vocabulary(model) <= LARGE:
            return False
        if self._possible is None:
            self._possible = _agree(model, ids[:1, :PROBED])
            if self.chunked is True and not self._possible:
                raise TaskError(
                    f"model.chunked_loss: this {model.config.model_type} model does more to its logits than its output "
                    "layer, so they cannot be computed in chunks. Set it to auto or false."
                )
        return self._possible


def _agree(model: Any, ids: Tensor) -> bool:
    """Whether both ways give the same logits for a few tokens [1, t]."""
    decoder, head = _parts(model)
    if decoder is None or head is None:
        return False
    with torch.no_grad(), evaluating(model):
        logits, hidden = model(input_ids=ids).logits, decoder(input_ids=ids)[0]
        other = head(hidden) if hidden.ndim == 3 else hidden
    if other.shape != logits.shape:
        return False
    tolerance = TOLERANCE if logits.dtype == other.dtype == torch.float32 else LOW_TOLERANCE
    return bool((other - logits).abs().max() <= tolerance * logits.abs().max())


def _most_rows(model: Any, ids: Tensor) -> int:
    """Rows of logits of the rank that has the most, where ranks gather the output layer together, as ZeRO-3 does.

    They then have to call it equally often, and padded batches differ in length.
    """
    rows, head = ids.numel(), _parts(model)[1]
    if head is None or not any(hasattr(p, "ds_id") for p in head.parameters()):
        return rows
    most = torch.tensor(rows, device=ids.device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def _in_parts(head: Any, parts: int, hidden: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of losses [] of hidden states [B, T, H] that meet the output layer in so many parts."""
    total = torch.zeros((), device=hidden.device)
    for part in _parts_of(_loss, head, parts, hidden, labels, _by_row(weights, labels)):
        total = total + part
    return total


def _parts_of(
    of_logits: Callable[..., Tensor], head: Any, parts: int, hidden: Tensor, labels: Tensor, *others: Tensor | None
) -> Iterator[Tensor]:
    """What is made of the logits, labels and others of some rows at a time, in so many parts, empty ones too."""

    def of_rows(rows: Tensor | None, *beside: Tensor | None) -> Tensor:
        return of_logits(head(rows), *beside)

    rows, flat = hidden.flatten(0, 1), labels.flatten()
    size = -(-len(rows) // parts)
    for number in range(parts):
        part = slice(number * size, (number + 1) * size)
        some = (rows[part], flat[part], *(None if other is None else other[part] for other in others))
        yield checkpoint(of_rows, *some, use_reentrant=False) if rows.requires_grad else of_rows(*some)


def _parts(model: Any) -> tuple[Any, Any]:
    """A model's decoder and output layer; None where it does not tell."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        decoder, head = model.get_decoder(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None, None
    return (None, None) if decoder is model else (decoder, head)


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _by_row(weights: Tensor | None, labels: Tensor) -> Tensor | None:
    """Weights [B] of rows as those of their positions [B * T]."""
    return None if weights is None else weights[:, None].expand_as(labels).flatten()


def _loss(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of cross entropies [] of logits [N, V] and labels [N]."""
    if weights is None:
        return cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return (_each(logits, labels) * weights).sum()


def _each(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropies [N] of logits [N, V] and labels [N]."""
    return cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
