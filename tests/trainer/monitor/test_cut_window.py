"""The last accumulation window of an epoch counts its micro-batches in full; nothing of it reaches the next epoch."""

import pytest
import pytorch_lightning as pl
import torch
from small import QUIET, train
from torch.utils.data import DataLoader, IterableDataset

from shoestring.callbacks import LRSchedule

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET] + [
    pytest.mark.filterwarnings("ignore:.*deepspeed"), pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning"),
]  # fmt: skip


class Stream(IterableDataset):
    """1 to 5, in micro-batches of one."""

    def __iter__(self):
        return iter(torch.arange(1.0, 6.0)[:, None])


class Slope(pl.LightningModule):
    """Its gradient is the batch itself."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.weights = []

    def training_step(self, batch, batch_idx):
        return (self.weight * batch).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.weights.append(float(self.weight))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


# the weight after each micro-batch of two epochs: a window's step is the mean of its batches
TWO = [0.0, -1.5, -1.5, -5.0, -10.0, -10.0, -11.5, -11.5, -15.0, -20.0]
THREE = [0.0, 0.0, -2.0, -2.0, -6.5, -6.5, -6.5, -8.5, -8.5, -13.0]


@pytest.mark.parametrize("strategy", ["single", "zero2"])
@pytest.mark.parametrize(("accumulate", "weights"), [(2, TWO), (3, THREE)])
def test_a_window_that_an_epoch_cuts_short_is_the_mean_of_what_it_has(tmp_path, strategy, accumulate, weights):
    module = Slope()
    trainer = train(
        tmp_path, module=module, data=DataLoader(Stream(), batch_size=1), techniques=[LRSchedule(shape="constant")],
        max_epochs=2, accumulate_grad_batches=accumulate, strategy=strategy, log_every=1,
    )  # fmt: skip
    assert module.weights == pytest.approx(weights)
    assert trainer.global_step == trainer.summary["steps"] == 2 * -(-5 // accumulate)
