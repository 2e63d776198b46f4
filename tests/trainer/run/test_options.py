"""Everything `pl.Trainer` takes works in ours: flag by flag, against a plain `pl.Trainer`."""

from datetime import timedelta
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from pytorch_lightning.callbacks.progress import TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.environments import LightningEnvironment
from small import Crash, Small, samples, train
from torch.utils.data import DataLoader

from shoestring.trainer import Budget, Trainer
from shoestring.trainer.run.options import LightningOptions

pytestmark = [pytest.mark.filterwarnings("ignore")]

FLAGS = {
    "accelerator": ["cpu"], "precision": ["bf16-mixed", "64-true", 32], "plugins": [lambda: [LightningEnvironment()]],
    "sync_batchnorm": [True], "deterministic": [True], "benchmark": [False], "inference_mode": [False],
    "detect_anomaly": [True], "max_epochs": [1, 3], "min_epochs": [1], "max_steps": [3, 7], "min_steps": [2],
    "max_time": ["00:01:00:00", {"hours": 1}, timedelta(hours=1)], "fast_dev_run": [True, 3],
    "overfit_batches": [1, 0.5],
    "accumulate_grad_batches": [5], "gradient_clip_val": [0.1], "gradient_clip_algorithm": ["value"],
    "limit_train_batches": [0, 2, 0.6], "use_distributed_sampler": [False], "reload_dataloaders_every_n_epochs": [1],
    "limit_val_batches": [0, 1, 0.5], "limit_test_batches": [1], "limit_predict_batches": [1],
    "val_check_interval": [2, 0.4], "check_val_every_n_epoch": [2], "num_sanity_val_steps": [0, 2],
    "callbacks": [
        lambda: TQDMProgressBar(), lambda: [EarlyStopping("val_loss", patience=0, mode="max")],
        lambda: [Timer(timedelta(hours=1))],
    ],
    "logger": [lambda: CSVLogger("logs"), True], "log_every_n_steps": [1], "profiler": ["simple"],
    "enable_checkpointing": [True], "enable_progress_bar": [True], "enable_model_summary": [True],
    "enable_autolog_hparams": [False], "default_root_dir": ["."], "model_registry": ["none"], "barebones": [True],
}  # fmt: skip
CASES = [(flag, value) for flag, values in FLAGS.items() for value in values]
QUIET_FLAGS = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


@pytest.fixture(autouse=True)
def settings_of_the_process():
    """Lightning sets `deterministic` for the whole process and leaves it: the next test starts as this one did."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def test_every_flag_is_tried():
    assert FLAGS.keys() == LightningOptions.__annotations__.keys()


class Watched(Small):
    """Notes its batches, its evaluations and its rates."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def training_step(self, batch, batch_idx):
        self.notes.append(("train", self.trainer.current_epoch, batch[1].tolist()))
        return self.net(batch[0].to(self.net.weight.dtype)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.notes.append(("validate", batch[1].tolist()))
        loss = self.net(batch[0].to(self.net.weight.dtype)).square().mean()
        if not self.trainer.barebones:
            self.log("val_loss", loss)

    def test_step(self, batch, batch_idx):
        self.notes.append(("test", batch[1].tolist()))

    def predict_step(self, batch, batch_idx):
        self.notes.append(("predict", batch[1].tolist()))


def watched(trainer):
    module, held_out = Watched(), DataLoader(samples(8), 4)
    trainer.fit(module, DataLoader(samples(20), 4), held_out)
    trainer.test(module, held_out, verbose=False)
    trainer.predict(module, held_out)
    return module


@pytest.mark.parametrize(("flag", "value"), CASES, ids=lambda item: repr(item)[:40] if not callable(item) else "made")
def test_a_flag_does_what_it_does_in_lightnings_trainer(tmp_path, monkeypatch, flag, value):
    monkeypatch.chdir(tmp_path)
    options = {"max_epochs": 2, "accelerator": "cpu", "num_sanity_val_steps": 0}
    if flag == "gradient_clip_algorithm":
        options["gradient_clip_val"] = 0.1

    def given():
        return {**options, flag: value() if callable(value) else value}

    quiet = {} if flag in ("barebones", "callbacks") else dict.fromkeys(QUIET_FLAGS, False)
    plain = watched(pl.Trainer(devices=1, **{**quiet, **given()}))
    trainer = Trainer(run_dir=Path("run"), ledger=False, **given())
    trainer.monitor.totals.peak_flops = 1e9
    ours = watched(trainer)
    assert ours.notes == plain.notes
    assert ours.trainer.global_step == plain.trainer.global_step == trainer.monitor.account.clock.step
    torch.testing.assert_close(ours.net.weight, plain.net.weight)


# -- callbacks of Lightning's own -----------------------------------------------------------------------------------
def test_lightnings_checkpoints_are_kept_beside_ours(tmp_path):
    keep = ModelCheckpoint(tmp_path / "own", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    callbacks = [keep, LearningRateMonitor()]
    trainer = train(tmp_path / "run", Budget(steps=4), callbacks=callbacks, logger=CSVLogger(tmp_path))
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    assert trainer.summary["steps"] == 4 and (tmp_path / "run" / "checkpoints" / "000000004").is_dir()


def test_a_second_fit_goes_on_with_the_same_trainer(tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(samples(20), 4)

        def val_dataloader(self):
            return DataLoader(samples(8), 4)

    trainer = Trainer(max_epochs=1, run_dir=tmp_path, ledger=False, accelerator="cpu")
    trainer.monitor.totals.peak_flops = 1e9
    module = Watched()
    trainer.fit(module, datamodule=Data())
    first = dict(trainer.summary)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=Data())
    assert [epoch for kind, *epoch in module.notes if kind == "train"] == [
        [epoch, [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]] for epoch in range(3) for i in range(5)
    ]
    assert (first["steps"], trainer.summary["steps"], trainer.summary["samples"]) == (5, 15, 60)
    assert first["seconds"] < trainer.summary["seconds"] and trainer.summary["stopped_by"] == "max_epochs"


@pytest.mark.parametrize(
    ("budget", "options", "says"),
    [
        (None, {"max_epochs": 2}, "max_epochs"),
        (None, {"max_epochs": -1, "max_steps": 4}, "max_steps"),
        (Budget(steps=4), {"max_epochs": 2}, "steps"),
        (Budget(epochs=2), {}, "epochs"),
        (None, {"max_epochs": 9, "callbacks": [EarlyStopping("val_loss", patience=0, mode="max")]}, "EarlyStopping"),
        (Budget(steps=1e6), {"callbacks": [Timer(timedelta(seconds=0.1))]}, "Timer"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_the_summary_names_what_ended_the_run(tmp_path, budget, options, says):
    trainer = train(tmp_path, budget, data=DataLoader(samples(20), 4), validation=DataLoader(samples(8), 4), **options)
    assert trainer.summary["stopped_by"] == says


# -- manual optimization ----------------------------------------------------------------------------------------------
class Manual(Small):
    """Steps `times` in each batch, or once in `every` of them."""

    def __init__(self, times=1, every=1):
        super().__init__()
        self.automatic_optimization = False
        self.times, self.every = times, every

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0:
            for _ in range(self.times):
                self.optimizers().step()
            self.optimizers().zero_grad()


@pytest.mark.parametrize(("times", "every", "steps"), [(2, 1, 20), (1, 2, 4), (1, 1, 10)])
def test_manual_optimization_is_counted_in_steps(tmp_path, times, every, steps):
    """Two epochs of five batches; where they step every second batch, the fifth is left over."""
    module = Manual(times, every)
    trainer = train(tmp_path / "epochs", module=module, data=DataLoader(samples(20), 4), max_epochs=2)
    clock = trainer.monitor.account.clock
    assert len(module.seen) == 10
    assert trainer.global_step == clock.step == trainer.summary["steps"] == steps
    resumed = Manual(times, every)
    options = {"data": DataLoader(samples(20), 4), "max_epochs": 2, "checkpoint_every": "1 step"}
    with pytest.raises(RuntimeError, match="crashed"):
        train(tmp_path / "run", module=Manual(times, every), callbacks=[Crash(8)], **options)
    train(tmp_path / "run", module=resumed, **options)
    assert module.seen[-len(resumed.seen) :] == resumed.seen and len(resumed.seen) in (2, 3)
    if every == 1:  # gradients that wait for a step are not in a checkpoint
        assert torch.equal(module.net.weight, resumed.net.weight)
    module = Manual(times, every)
    trainer = train(tmp_path / "steps", Budget(steps=4), module=module, data=DataLoader(samples(20), 4))
    assert trainer.summary["steps"] == 4 and len(module.seen) == {2: 2, 1: 4}[times] * every + (every == 2)
