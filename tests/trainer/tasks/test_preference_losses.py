"""The losses over preferences: the papers' formulas, and TRL's own code on the same log-probabilities."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring.recipes.preference_schema import PreferenceSpec
from shoestring.recipes.schema import OptimizerSpec
from shoestring.trainer.data.token_store import IGNORED
from shoestring.trainer.tasks import preference_losses as losses
from shoestring.trainer.tasks.preference import PairwisePreference

pytestmark = pytest.mark.filterwarnings("ignore")
B, T = 6, 9


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(value: Tensor, wanted: Any) -> None:
    assert float(value) == pytest.approx(float(wanted), abs=1e-6, rel=1e-6)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_papers_formulas_by_hand() -> None:
    # log ratios of an answer, chosen 0.5 and rejected -1: the model has moved by 1.5 in the right direction
    chosen, rejected = tensor([0.5]), tensor([-1.0])
    assert_near(losses.dpo(chosen, rejected, beta=0.1)[0], -math.log(sigmoid(0.15)))
    smoothed = -0.9 * math.log(sigmoid(0.15)) - 0.1 * math.log(sigmoid(-0.15))
    assert_near(losses.dpo(chosen, rejected, beta=0.1, label_smoothing=0.1)[0], smoothed)
    assert_near(losses.ipo(chosen, rejected, beta=0.1)[0], (1.5 - 5) ** 2)
    # mean log-probabilities of a token: p = 0.8 and 0.25, on both sides of where log1mexp changes its form
    chosen, rejected = tensor([0.8]).log(), tensor([0.25]).log()
    odds = (0.8 / 0.2) / (0.25 / 0.75)
    assert_near(losses.orpo(chosen, rejected, beta=0.3)[0], -0.3 * math.log(sigmoid(math.log(odds))))
    assert_near(
        losses.simpo(chosen, rejected, beta=2.0, margin=0.5)[0], -math.log(sigmoid(2 * math.log(0.8 / 0.25) - 0.5))
    )
    ratios, wanted = tensor([0.5, -1.0]), tensor([True, False])
    loss = losses.kto(ratios, wanted, tensor(0.2), beta=0.1, desirable_weight=2.0, undesirable_weight=3.0)
    assert_near(loss[0], 2 * (1 - sigmoid(0.1 * (0.5 - 0.2))))
    assert_near(loss[1], 3 * (1 - sigmoid(0.1 * (0.2 + 1.0))))
    assert_near(losses.bradley_terry(tensor([2.0]), tensor([0.5]))[0], -math.log(sigmoid(1.5)))


def test_odds_have_gradients_wherever_a_probability_lies() -> None:
    means = tensor([-1e-5, -0.5, -0.6931472, -5.0, -80.0], requires_grad=True)
    losses.orpo(means, means.detach().roll(1), beta=1.0).sum().backward()
    assert means.grad is not None and torch.isfinite(means.grad).all() and (means.grad < 0).all()


# -- TRL ---------------------------------------------------------------------------------------------------------------
class Itself:
    """What TRL asks accelerate for, of one process."""

    device = torch.device("cpu")

    def gather(self, value: Any) -> Any:
        return value

    gather_for_metrics = gather


def theirs(**settings: Any) -> SimpleNamespace:
    """What a trainer of TRL's holds that its loss asks for."""
    return SimpleNamespace(
        accelerator=Itself(), model=SimpleNamespace(training=True), aux_loss_enabled=False, _total_train_tokens=0,
        _tp_size=1, _metrics=defaultdict(lambda: defaultdict(list)), precompute_ref_logps=True, ld_alpha=None,
        f_divergence_type="reverse_kl", loss_weights=[1.0], use_weighting=False, calculate_KL=True, loss_type="kto",
        is_encoder_decoder=False, padding_value=0, label_smoothing=0.0, alpha=0.0, **settings,
    )  # fmt: skip


def said(log_probabilities: Tensor) -> Any:
    """A model that gives these log-probabilities of tokens, as TRL's fused output layer does."""
    zeros = torch.zeros_like(log_probabilities)
    out = SimpleNamespace(log_probs=log_probabilities, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **_: out


@pytest.fixture(scope="module")
def tokens() -> dict[str, Tensor]:
    """Log-probabilities of the tokens of answers [2B, T - 1], 0 elsewhere, and where answers are."""
    mask = torch.zeros(2 * B, T, dtype=torch.long)
    for row in range(2 * B):
        mask[row, 2 + row % 3 : T - row % 4] = 1
    each = -drawn(2 * B, T - 1).abs() * mask[:, 1:]
    return {"each": each, "mask": mask, "sums": each.sum(1), "count": mask[:, 1:].sum(1), "reference": drawn(2 * B) - 3}


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_and_ipo_are_trls(loss: str, tokens: dict[str, Tensor]) -> None:
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    ids, reference = torch.ones(2 * B, T, dtype=torch.long), tokens["reference"]
    batch = {
        "input_ids": ids, "attention_mask": ids, "completion_mask": tokens["mask"],
        "ref_chosen_logps": reference[:B], "ref_rejected_logps": reference[B:],
    }  # fmt: skip
    wanted = trainer._compute_loss(theirs(beta=0.1, loss_types=[loss]), said(tokens["each"]), batch, False)
    ratios = tokens["sums"] - reference
    if loss == "ipo":
        ours = losses.ipo(*(ratios / tokens["count"]).chunk(2), beta=0.1)
    else:
        ours = losses.dpo(*ratios.chunk(2), beta=0.1)
    assert_near(ours.mean(), wanted)


def test_kto_is_trls(tokens: dict[str, Tensor]) -> None:
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    settings = theirs(beta=0.1, desirable_weight=1.5, undesirable_weight=0.7)
    ids, label, apart = torch.ones(2 * B, T, dtype=torch.long), torch.arange(2 * B) % 3 == 0, drawn(2 * B, seed=2)
    settings._compute_kl_logps = lambda model, batch: tokens["sums"] + 1 + apart
    batch = {
        "input_ids": ids, "attention_mask": ids, "completion_mask": tokens["mask"], "label": label,
        "ref_logps": tokens["reference"], "ref_KL_logps": tokens["sums"],
    }  # fmt: skip
    wanted = trainer._compute_loss(settings, said(tokens["each"]), batch, False)
    divergence = (1 + apart).mean().clamp(min=0)
    assert divergence > 0
    ratios = tokens["sums"] - tokens["reference"]
    ours = losses.kto(ratios, label, divergence, beta=0.1, desirable_weight=1.5, undesirable_weight=0.7)
    assert_near(ours.mean(), wanted)


def test_simpo_and_smoothed_dpo_are_trls(tokens: dict[str, Tensor]) -> None:
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    settings = theirs(beta=2.0, simpo_gamma=0.8)
    settings.loss_type, settings.label_smoothing = "simpo", 0.1
    means = (tokens["sums"] / tokens["count"]).chunk(2)
    ours = losses.simpo(*means, beta=2.0, margin=0.8, label_smoothing=0.1)
    assert torch.allclose(ours, trainer.cpo_loss(settings, *means)[0], atol=1e-6)
    settings.loss_type = "sigmoid"
    assert torch.allclose(
        losses.dpo(*means, beta=2.0, label_smoothing=0.1), trainer.cpo_loss(settings, *means)[0], atol=1e-6
    )


def test_orpo_is_trls_with_its_cross_entropy() -> None:
    """From token numbers to the loss, through the same real model."""
    trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_attention_heads=2, **shape))
    module = PairwisePreference(model, OptimizerSpec(), PreferenceSpec(loss="orpo", beta=0.2))
    ids = torch.randint(1, 50, (B, 2, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(B, 2, T, dtype=torch.long)
    for row in range(B):
        mask[row, 0, T - row % 3 :] = mask[row, 1, T - row % 4 :] = 0
    labels = torch.where(mask.bool() & (torch.arange(T) >= 3), ids, IGNORED)
    ours = module.training_step({"input_ids": ids, "labels": labels, "attention_mask": mask}, 0)
    settings = theirs(beta=0.2)
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(settings, name, getattr(trainer, name))
    for name in ("concatenated_forward", "odds_ratio_loss"):
        setattr(settings, name, getattr(trainer, name).__get__(settings))
    batch = {
        f"{kind}_{name}": value[:, which]
        for which, kind in enumerate(("chosen", "rejected"))
        for name, value in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
    }
    assert_near(ours, trainer.get_batch_loss_metrics(settings, model, batch)[0])
