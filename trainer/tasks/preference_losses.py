"""The losses over preferences: log-probabilities in, one loss a pair or an answer out.

A log-probability is that of all tokens of an answer together, and its ratio the difference to the reference's. The same
quantities in each paper's words: `chosen` is y_w, `rejected` y_l, and beta of `ipo` is the paper's tau.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimization, arXiv 2305.18290; smoothed as in its authors' conservative DPO.

    Args:
        chosen: Log ratios of the chosen answers [B].
        rejected: Those of the rejected ones [B].
        beta: How steep it is; rewards are log ratios times beta.
        label_smoothing: The share of pairs that are the wrong way round.

    Returns:
        The loss of each pair [B].
    """
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Identity preference optimization, arXiv 2310.12036, eq. 17: [B] from mean log ratios of a token [B].

    Means over the tokens of each answer, as its authors have confirmed to TRL's.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """The odds ratio's part of ORPO, arXiv 2403.07691: [B] from mean log-probabilities of a token [B].

    The other part is the cross entropy of the chosen documents, over all their tokens.
    """
    return -beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def simpo(
    chosen: Tensor, rejected: Tensor, *, beta: float, margin: float, label_smoothing: float = 0.0
) -> Tensor:  # fmt: skip
    """SimPO, arXiv 2405.14734: [B] from mean log-probabilities of a token [B]. margin: its gamma."""
    return _smoothed(beta * (chosen - rejected) - margin, label_smoothing)


def kto(
    ratios: Tensor, wanted: Tensor, divergence: Tensor, *, beta: float, desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """Kahneman-Tversky optimization, arXiv 2402.01306, eq. 7.

    Args:
        ratios: Log ratios of single answers [B].
        wanted: Whether each is wanted [B].
        divergence: How far the model is from its reference: the mean log ratio of answers to other prompts, not below
            0, through which no gradient goes [].
        beta: How steep it is.
        desirable_weight: Of wanted answers.
        undesirable_weight: Of the others.

    Returns:
        The loss of each answer [B].
    """
    ahead = beta * (ratios - divergence)
    losses = 1 - torch.sigmoid(torch.where(wanted, ahead, -ahead))
    return losses * torch.where(wanted, desirable_weight, undesirable_weight)


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The negative log-likelihood that the chosen one of each pair of rewards [B] wins (Bradley and Terry 1952)."""
    return -logsigmoid(chosen - rejected)


def _smoothed(ahead: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(ahead) - smoothing * logsigmoid(-ahead)


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean), exact where p is near 1 or 0 (Mächler, log1mexp)."""
    near = mean > -0.6931472
    less = torch.where(near, mean, -1.0)  # each branch has finite gradients where the other one is taken
    far = torch.where(near, -1.0, mean)
    return mean - torch.where(near, torch.log(-torch.expm1(less)), torch.log1p(-torch.exp(far)))
