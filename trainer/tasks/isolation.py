"""Do packed documents attend to each other? Ask the model itself.

transformers keeps them apart by restarting `position_ids`, but only without a cache and without an attention mask,
and some architectures never do (OPT builds a mask of its own, Bloom and Mamba ignore positions). A leak raises no
error and costs quality silently, so the first batch of a run asks: change document A, look at B's logits.
"""

from __future__ import annotations

import torch

from ...callbacks.forward.isolated_step import evaluating
from .errors import TaskError

LONGEST = 32  # tokens probed: the mask's form does not depend on the length
TOLERANCE = 1e-4  # of A's own change. Apart, B's change is exactly 0 or rounding; together, it is of A's order


def leak(model: torch.nn.Module, ids: torch.Tensor, *, isolate: bool = True) -> float:
    """Return how much the logits of document B change when document A, before it in the block, is changed.

    ids [T]: the two documents, half each. Returns max |change in B| / max |change in A|: 0 where they are apart. One
    forward of two rows, in evaluation mode, without gradients or random numbers. isolate: restart the positions at B
    (False shows what a leak looks like).
    """
    half = len(ids) // 2
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator, union-attr]
    other = ids.clone()
    other[:half] = (ids[:half] + 1) % vocabulary
    position_ids = torch.arange(len(ids), device=ids.device)
    if isolate:
        position_ids = torch.where(position_ids < half, position_ids, position_ids - half)
    with torch.no_grad(), evaluating(model):
        rows = torch.stack([ids, other])
        logits = model(input_ids=rows, position_ids=position_ids.expand(2, -1), use_cache=False).logits
    change = (logits[0].float() - logits[1].float()).abs().amax(-1)
    return float(change[half:].max() / change[:half].max())


def check_isolation(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Raise `TaskError` where `leak` finds more than rounding. ids [T]: a row of a real batch."""
    measured = leak(model, ids[:LONGEST])
    # written so that NaN, too, fails
    if not measured <= TOLERANCE:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise TaskError(
            f"data.pack: documents packed into one block attend to each other in this {kind} model "
            f"(leak {measured:.2g} of the effect a document has on itself, 0 expected). Set data.pack: false, or "
            "accept it with data.args: {pack_isolation: false}."
        )
