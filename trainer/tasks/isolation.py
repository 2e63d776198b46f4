"""Do packed documents attend to each other, and tokens to later ones? Ask the model itself.

transformers keeps them apart by restarting `position_ids`, but only without a cache and without an attention mask,
and some architectures never do (OPT builds a mask of its own, Bloom and Mamba ignore positions). A leak raises no
error and costs quality silently, so the first batch of a run asks: change document A, look at B's logits. A model that
sees the token it is to predict (an encoder, such as BERT, as it is) learns nothing and shows the best of losses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...callbacks.forward.isolated_step import evaluating
from ..data.errors import TaskError
from .positions import first_position

LONGEST = 32  # tokens probed: the mask's form does not depend on the length
# of A's own change. Apart, B's change is exactly 0 or rounding; together, it is of A's order
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class Change(NamedTuple):
    """A share of a change of logits that should be 0, and what rounding may make of it."""

    share: float
    allowed: float


def leak(model: torch.nn.Module, ids: torch.Tensor, *, isolate: bool = True) -> Change:
    """Return how much the logits of document B change when document A, before it in the block, is changed.

    ids [T]: the two documents, half each. Returns max |change in B| / max |change in A|: 0 where they are apart. One
    forward of two rows, in evaluation mode, without gradients or random numbers. isolate: restart the positions at B
    (False shows what a leak looks like).
    """
    half = len(ids) // 2
    rows = torch.stack([ids, ids])
    rows[1, :half] = _others(model, ids[:half])
    position_ids = torch.arange(len(ids), device=ids.device)
    if isolate:
        position_ids = torch.where(position_ids < half, position_ids, position_ids - half)
    position_ids += first_position(model)
    with torch.no_grad(), evaluating(model):
        logits = model(input_ids=rows, position_ids=position_ids.expand(2, -1), use_cache=False).logits
    change = (logits[0].float() - logits[1].float()).abs().amax(-1)
    return Change(float(change[half:].max() / change[:half].max()), TOLERANCES[logits.dtype])


def lookahead(model: torch.nn.Module, ids: torch.Tensor) -> Change:
    """Return how much the logits of a text's first half change with its second half: 0 where no token sees later ones.

    ids [T]. As `leak`, relative to the change of the second half's own logits.
    """
    half = len(ids) // 2
    rows = torch.stack([ids, ids])
    rows[1, half:] = _others(model, ids[half:])
    with torch.no_grad(), evaluating(model):
        logits = model(input_ids=rows).logits
    change = (logits[0].float() - logits[1].float()).abs().amax(-1)
    return Change(float(change[:half].max() / change[half:].max()), TOLERANCES[logits.dtype])


def _others(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Other tokens than these."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator, union-attr]
    return (ids + 1) % vocabulary


def check_causal(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Raise `TaskError` where `lookahead` finds more than rounding. ids [T]: a row of a real batch."""
    measured = lookahead(model, ids[:LONGEST] if len(ids) > 1 else ids.repeat(2))
    if not measured.share <= measured.allowed:
        raise TaskError(
            f"model.task: causal-lm needs a model whose tokens see only those before them, and in this {_kind(model)} "
            f"model they see later ones ({measured.share:.2g} of the effect a token has on itself, 0 expected). Leave "
            "model.config.is_decoder out, or use another model."
        )


def _kind(model: torch.nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def check_isolation(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Raise `TaskError` where `leak` finds more than rounding. ids [T]: a row of a real batch."""
    measured = leak(model, ids[:LONGEST])
    # written so that NaN, too, fails
    if not measured.share <= measured.allowed:
        raise TaskError(
            f"data.pack: documents packed into one block attend to each other in this {_kind(model)} model "
            f"(leak {measured.share:.2g} of the effect a document has on itself, 0 expected). Set data.pack: false, or "
            "accept it with data.args: {pack_isolation: false}."
        )
