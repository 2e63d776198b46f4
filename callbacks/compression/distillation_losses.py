"""What distillation minimizes: tensors of a student and of a teacher in, a scalar out.

Every loss is a mean over samples (or over the positions that a mask keeps), in float32, and 0 where both agree. None
has parameters of its own, so widths may differ only where the docstring says so.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, mse_loss, normalize


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """T^2 * KL(teacher || student) of logits [N, C] softened by `temperature`: Hinton et al., arXiv 1503.02531 §2.

    The factor keeps gradients as large as at T = 1. In nats; the mean over the positions that `mask` [N] keeps, 0 where
    there are none.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ")
    log_student = log_softmax(student.float() / temperature, -1)
    wanted = log_softmax(teacher.float() / temperature, -1)
    each = temperature**2 * kl_div(log_student, wanted, reduction="none", log_target=True).sum(-1)
    if mask is None:
        return each.sum() / max(1, len(each))
    return (each * mask).sum() / mask.sum().clamp(min=1)


def top_logits(logits: Tensor, k: int) -> Tensor:
    """Numbers of the `k` largest logits [N, k] of [N, C], largest first."""
    return logits.topk(min(k, logits.shape[-1]), dim=-1).indices


def lump(logits: Tensor, kept: Tensor, temperature: float) -> Tensor:
    """Logits [N, k + 1] of the classes `kept` [N, k] and, as one more class, of all others [N, C] together.

    At `temperature` the new class has exactly the others' joint probability, so the divergence of two lumped
    distributions bounds that of the whole ones from below and vanishes where they agree. With k = C there is no other.
    """
    logits = logits.float()
    top = logits.gather(-1, kept)
    if kept.shape[-1] == logits.shape[-1]:
        return top
    others = logits.scatter(-1, kept, float("-inf"))
    tail = temperature * torch.logsumexp(others / temperature, -1, keepdim=True)
    return torch.cat([top, tail], -1)


def rounded(logits: Tensor) -> Tensor:
    """Logits [N, C] as float16, their largest moved to 0 where float16 is finest: what a cache stores."""
    logits = logits.float()
    return (logits - logits.amax(-1, keepdim=True)).clamp(min=torch.finfo(torch.float16).min).half()


def target_mask(labels: Tensor, *, shift: bool, ignored: int = -100) -> Tensor:
    """Which positions of [B, T] predict something, bool.

    shift: position t predicts label t + 1, as in Hugging Face causal models; the last then predicts nothing.
    """
    kept = labels != ignored
    if not shift:
        return kept
    return torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], 1)


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return how differently two layers relate the samples of a batch: arXiv 1907.09682 eq. 4.

    The mean squared difference of the row-normalized [B, B] Gram matrices of the activations [B, …], flattened. Widths
    may differ. One sample relates to nothing and gives 0.
    """
    return mse_loss(_gram(student), _gram(teacher))


def _gram(activations: Tensor) -> Tensor:
    flat = activations.float().flatten(1)
    return normalize(flat @ flat.T, dim=1)


def hidden_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of hidden states [B, …, D]; where shapes differ, `similarity_loss` over the batch."""
    if student.shape == teacher.shape:
        return mse_loss(student.float(), teacher.float())
    if len(student) != len(teacher):
        raise ValueError(f"hidden states of {len(student)} and {len(teacher)} samples cannot be matched")
    return similarity_loss(student, teacher)


def spatial_attention(features: Tensor) -> Tensor:
    """Return where a convolution layer looks: sums of squares over channels, unit vectors [B, H * W] of [B, C, H, W].

    arXiv 1612.03928 §3.1.
    """
    return normalize(features.float().square().sum(1).flatten(1), dim=1)


def spatial_attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of the attention maps of [B, C, H, W] and [B, C', H, W]: arXiv 1612.03928 eq. 2."""
    if student.shape[2:] != teacher.shape[2:]:
        raise ValueError(f"maps of {tuple(student.shape[2:])} and {tuple(teacher.shape[2:])} cannot be compared")
    return (spatial_attention(student) - spatial_attention(teacher)).square().sum(1).mean()


def self_attention_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of attention distributions [B, heads, T, T], mean over heads and queries.

    MiniLM, arXiv 2002.10957 eq. 6; where the numbers of heads differ, of their means over the heads. mask [B, T]: the
    queries that count.
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    log_student, wanted = student.float().clamp(min=tiny).log(), teacher.float()
    each = (torch.xlogy(wanted, wanted) - wanted * log_student).sum(-1).mean(1)
    return each.mean() if mask is None else (each * mask).sum() / mask.sum().clamp(min=1)


def layer_pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Which of the teacher's layers each of the student's imitates: evenly spread, the last the last.

    `layer_pairs(2, 6)` is `[(0, 2), (1, 5)]`.
    """
    return [(i, -(-(i + 1) * teacher // student) - 1) for i in range(student)]
