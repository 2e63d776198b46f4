"""Reward models, and what is reported of rewards: summed over batches and ranks, then divided."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...callbacks.forward.training_step import SAMPLE_WEIGHTS
from .module import Batch, TaskModule
from .preference_losses import bradley_terry

METRICS = ("val_accuracy", "val_margin", "val_chosen_reward", "val_rejected_reward")


def sums_of(losses: Tensor, rewards: Tensor) -> tuple[Tensor, ...]:
    """What `metrics_of` takes, of a batch. losses [B]. rewards [B, 2]: of the chosen and the rejected answers."""
    chosen, rejected = rewards.unbind(1)
    return losses.sum(), losses.new_tensor(len(losses)), (chosen > rejected).sum(), chosen.sum(), rejected.sum()


def metrics_of(sums: Sequence[Tensor]) -> dict[str, Tensor]:
    """`val_loss`, and of the pairs the share in the right order, the mean margin, and the mean rewards."""
    loss, count, right, chosen, rejected = sums
    values = (right / count, (chosen - rejected) / count, chosen / count, rejected / count)
    return {"val_loss": loss / count, **dict(zip(METRICS, values, strict=True))}


class RewardModel(TaskModule):
    """One number a document, the chosen one's above the rejected one's: Bradley and Terry's model of pairs.

    A classifier of one class gives it, at the last token where it reads from left to right. Batches are of
    `Preferences` in pairs: `input_ids` and `attention_mask` [B, 2, T]. Logs what `metrics_of` says, exact over all
    pairs and ranks.

    Source: Christiano et al., arXiv 1706.03741; for language models Stiennon et al., arXiv 2009.01325.
    """

    def forward(self, batch: Batch) -> Tensor:
        """Rewards [B, 2] in float32."""
        given = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
        return self.model(**given).logits.float().view(-1, 2)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss of the pairs, in nats []."""
        losses, weights = bradley_terry(*self(batch).unbind(1)), batch.get(SAMPLE_WEIGHTS)
        return losses.mean() if weights is None else (losses * weights).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add this batch's summed losses and rewards."""
        rewards = self(batch)
        self.add(*sums_of(bradley_terry(*rewards.unbind(1)), rewards))

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` and what the rewards are, equal on all ranks."""
        self.log_all(metrics_of(self.totals(5).unbind()))
