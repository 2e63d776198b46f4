"""Two ranks of zero3 whose optimizer state is in host memory or on a drive: RUN_DIR DRIVE|- [KILL_AT]."""

import os
import signal
import sys
import warnings

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import shoestring.trainer.run.zero as zero
from shoestring.trainer import Budget, Trainer

warnings.filterwarnings("ignore")
zero.NVME_GROUP = 300_000  # two groups that are written, of 1 MiB and more a rank; biases and the last layer stay


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        linear = torch.nn.Linear
        self.net = torch.nn.Sequential(linear(512, 1536), torch.nn.ReLU(), linear(1536, 512), linear(512, 8))

    def training_step(self, batch, index):
        return self.net(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Kill(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, index) -> None:
        if len(sys.argv) > 3 and trainer.global_step == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    drive = None if sys.argv[2] == "-" else sys.argv[2]
    samples = torch.randn(52, 512, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        Budget(steps=7), strategy="zero3", devices=2, accelerator="cpu", offload="optimizer", nvme=drive,
        run_dir=sys.argv[1], ledger=False, checkpoint_every="2 steps", callbacks=[Kill()], gradient_clip_val=0.5,
        accumulate_grad_batches=2, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.strategy.config["zero_optimization"]["sub_group_size"] = zero.NVME_GROUP  # in memory too
    trainer.fit(Net(), DataLoader(TensorDataset(samples), batch_size=4))  # windows of an epoch: 2, 2, 2 and 1


if __name__ == "__main__":
    main()
