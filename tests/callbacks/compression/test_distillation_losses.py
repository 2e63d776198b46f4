"""What distillation minimizes, against numbers worked out by hand."""

from math import log

import pytest
import torch

from shoestring.callbacks.compression import distillation_losses as losses


def test_kd_loss_by_hand():
    """Teacher logits (2 log 3, 0) at T = 2 are (3/4, 1/4); the student's are (1/2, 1/2)."""
    teacher, student = torch.tensor([[2 * log(3.0), 0.0]]), torch.zeros(1, 2, requires_grad=True)
    loss = losses.kd_loss(student, teacher, 2.0)
    assert loss.item() == pytest.approx(4 * (0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5)), rel=1e-6)
    loss.backward()  # T (q - p): arXiv 1503.02531 eq. 2 times T^2
    assert student.grad[0].tolist() == pytest.approx([2 * (0.5 - 0.75), 2 * (0.5 - 0.25)], rel=1e-6)
    assert losses.kd_loss(teacher + 5, teacher, 2.0).item() == pytest.approx(0, abs=1e-6), "logits are relative"


def test_kd_loss_is_a_mean_over_the_positions_kept():
    teacher, student = torch.tensor([[2 * log(3.0), 0.0], [9.0, 1.0], [0.0, 0.0]]), torch.zeros(3, 2)
    one = losses.kd_loss(student[:1], teacher[:1], 2.0)
    assert losses.kd_loss(student, teacher, 2.0, torch.tensor([True, False, True])).item() == pytest.approx(one / 2)
    assert losses.kd_loss(student, teacher, 2.0, torch.zeros(3, dtype=torch.bool)).item() == 0
    assert losses.kd_loss(student[:0], teacher[:0], 2.0).item() == 0
    with pytest.raises(ValueError, match=r"student logits \(3, 2\) and teacher logits \(1, 2\) differ"):
        losses.kd_loss(student, teacher[:1])


def test_lumping_by_hand():
    """Of probabilities (1/2, 1/4, 1/8, 1/8) the two likeliest stay and the rest is one class of 1/4."""
    logits = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]]).log()
    kept = losses.top_logits(logits, 2)
    assert kept.tolist() == [[0, 1]]
    assert losses.lump(logits, kept, 1.0).exp()[0].tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4])
    assert losses.lump(logits, kept, 3.0).div(3).softmax(-1)[0, :2].tolist() == pytest.approx(
        logits.div(3).softmax(-1)[0, :2].tolist()
    ), "the same at every temperature"
    everything = losses.top_logits(logits, 9)
    assert losses.lump(logits, everything, 1.0).shape == (1, 4), "nothing is left over"


def test_lumped_divergence_is_a_lower_bound_that_all_classes_reach():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(50, 20, generator=draw) for _ in range(2))
    kl = []
    for k in (1, 5, 19, 20):
        kept = losses.top_logits(teacher, k)
        kl.append(losses.kd_loss(losses.lump(student, kept, 2.0), losses.lump(teacher, kept, 2.0), 2.0).item())
    # one left over is a class by itself
    assert kl[0] < kl[1] < kl[2] == pytest.approx(kl[3], rel=1e-6)
    assert kl[3] == pytest.approx(losses.kd_loss(student, teacher, 2.0).item(), rel=1e-6)


def test_rounding_is_finest_at_the_largest():
    values = losses.rounded(torch.tensor([[1000.0, 999.9, -1e6]]))
    assert values.dtype == torch.float16 and values[0, 0] == 0
    assert values[0, 1].item() == pytest.approx(-0.1, abs=1e-4) and values[0].isfinite().all()


def test_positions_that_predict_something():
    labels = torch.tensor([[5, 6, -100, 7], [5, -100, -100, -100]])
    assert losses.target_mask(labels, shift=True).tolist() == [[True, False, True, False], [False] * 4]
    assert losses.target_mask(labels, shift=False).tolist() == [[True, True, False, True], [True, False, False, False]]


def test_similarities_by_hand():
    """Rows (3, 4) and (0, 2): Gram [[25, 8], [8, 4]], its rows divided by sqrt(689) and sqrt(80)."""
    one, other = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.eye(2, 3)
    rows = [[25 / 689**0.5, 8 / 689**0.5], [8 / 80**0.5, 4 / 80**0.5]]
    wanted = sum((rows[i][j] - (i == j)) ** 2 for i in range(2) for j in range(2)) / 4
    assert losses.similarity_loss(one, other).item() == pytest.approx(wanted, rel=1e-6)
    assert losses.hidden_loss(one, other).item() == pytest.approx(wanted, rel=1e-6), "widths differ"
    assert losses.hidden_loss(one, one + 2).item() == pytest.approx(4)
    assert losses.similarity_loss(one, 7 * one).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="2 and 3 samples"):
        losses.hidden_loss(one, torch.ones(3, 2))


def test_attention_maps_by_hand():
    """Two channels over two places: sums of squares (25, 0) and (0, 9) point elsewhere."""
    student, teacher = torch.zeros(1, 2, 1, 2), torch.zeros(1, 3, 1, 2)
    student[0, :, 0, 0], teacher[0, 0, 0, 1] = torch.tensor([3.0, 4.0]), 3.0
    assert losses.spatial_attention(student).tolist() == [[1.0, 0.0]]
    assert losses.spatial_attention_loss(student, teacher).item() == pytest.approx(2)
    with pytest.raises(ValueError, match="cannot be compared"):
        losses.spatial_attention_loss(student, torch.zeros(1, 1, 2, 2))


def test_attention_distributions_by_hand():
    teacher = torch.tensor([[0.75, 0.25], [1.0, 0.0]]).expand(1, 2, 2, 2)
    student = torch.full((1, 2, 2, 2), 0.5)
    first, second = 0.75 * log(1.5) + 0.25 * log(0.5), log(2)
    assert losses.self_attention_loss(student, teacher).item() == pytest.approx((first + second) / 2, rel=1e-6)
    only = losses.self_attention_loss(student, teacher, torch.tensor([[1, 0]]))
    assert only.item() == pytest.approx(first, rel=1e-6)
    assert losses.self_attention_loss(student[:, :1], teacher).item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_layers_are_spread_evenly():
    assert losses.layer_pairs(2, 6) == [(0, 2), (1, 5)]
    assert losses.layer_pairs(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert losses.layer_pairs(4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]
