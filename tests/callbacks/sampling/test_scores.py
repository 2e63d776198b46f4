"""A number for each sample: written where it is trained on, read as a whole, kept by checkpoints."""

from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import succeed
from toy import ACCUMULATE, SAMPLES, STEPS, Explode, Exploded, Words, held_out, loader, toy

from shoestring.callbacks import Card, Technique
from shoestring.callbacks.sampling.samples import install_sampler
from shoestring.callbacks.sampling.scores import SampleScores
from shoestring.trainer import Trainer
from shoestring.trainer.checkpoint.state import OtherData

pytestmark = pytest.mark.filterwarnings("ignore")
NEVER = -1.0


class FirstToken(Technique, pl.Callback):
    """Notes the step in which a sample was trained on last, plus its label in the fraction."""

    card = Card(name="first_token", does="keeps a number for each sample", reads={"samples"}, writes={"samples"})

    def setup(self, trainer, pl_module, stage) -> None:
        self.scores = SampleScores(NEVER)

    def tables(self) -> dict[str, SampleScores]:
        return {"last": self.scores} if hasattr(self, "scores") else {}

    def on_fit_start(self, trainer, pl_module) -> None:
        self._order = install_sampler(trainer, getattr(trainer, "seed", 0))
        self._order.remembers = True
        self.scores.open(len(trainer.fit_loop._data_source.instance.dataset))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        drawn = self._order.drawn(batch_idx)
        assert list(drawn.samples) == batch["index"].tolist(), "the rows are those that were drawn"
        self.scores.record(drawn.samples, trainer.global_step + batch["labels"] / 2)

    def on_train_end(self, trainer, pl_module) -> None:
        self.final = self.scores.whole().tolist()


def fit(folder, *callbacks, world=1, workers=0, size=SAMPLES, strategy="auto", cut=None) -> list[float]:
    technique = FirstToken()
    trainer = Trainer(
        techniques=[technique], run_dir=folder / "run", ledger=False, accelerator="cpu", checkpoint_every="2 steps",
        accumulate_grad_batches=ACCUMULATE, num_sanity_val_steps=0, callbacks=list(callbacks), max_steps=STEPS,
        max_epochs=-1, strategy=strategy, devices=world,
    )  # fmt: skip
    trainer.fit(toy(), loader(cut or world, words={"size": size, "noise": 0.0}, num_workers=workers), held_out())
    return technique.final


def rank(folder, strategy, world, crash, out) -> None:
    try:
        scores = fit(folder, *([Explode(crash)] if crash else []), world=world, strategy=strategy)
    except Exploded:
        return
    (folder / out).write_text(json.dumps(scores))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[float]:
    return fit(tmp_path_factory.mktemp("whole"))


def test_every_sample_has_its_own_number(whole):
    labels = [float(Words(noise=0.0)[i]["labels"]) / 2 for i in range(SAMPLES)]
    assert all(number % 1 == label for number, label in zip(whole, labels, strict=True))
    assert sorted(int(number) for number in whole).count(STEPS - 1) == 8, "the last step's"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_has_the_same_numbers(workers, whole, tmp_path):
    for crash in (3, 10):  # in the first and in the second epoch
        with pytest.raises(Exploded):
            fit(tmp_path, Explode(crash), workers=workers)
    assert fit(tmp_path, workers=workers) == whole


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_ranks_have_the_same_numbers_and_resume_on_another_number_of_them(strategy, whole, tmp_path):
    for crash in (5, None):
        succeed(rank, tmp_path, strategy, 2, crash, "two", world=2, folder=tmp_path)
    assert json.loads((tmp_path / "two").read_text()) == whole
    succeed(rank, tmp_path / "moved", strategy, 2, 5, "two", world=2, folder=tmp_path)
    assert fit(tmp_path / "moved", cut=2) == whole, "of as many samples, which one rank then accumulates"


def test_a_plain_trainer_keeps_them_in_its_own_checkpoints(tmp_path):
    def train(steps, ckpt_path=None):
        technique = FirstToken()
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, callbacks=[technique],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(toy(), loader(words={"noise": 0.0}), held_out(), ckpt_path=ckpt_path, weights_only=True)
        return technique.final, trainer

    scores, trainer = train(6)
    trainer.save_checkpoint(tmp_path / "six.ckpt")
    later, _ = train(7, tmp_path / "six.ckpt")
    changed = [i for i in range(SAMPLES) if scores[i] != later[i]]
    assert len(changed) <= 4 and all(int(later[i]) == 6 for i in changed)


def test_numbers_of_other_data_are_refused(tmp_path):
    with pytest.raises(Exploded):
        fit(tmp_path, Explode(3))
    with pytest.raises(OtherData, match="first_token kept 72 samples, and the data has 80"):
        fit(tmp_path, size=80)


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.floats(width=32, allow_nan=False)), min_size=1)))
def test_the_last_call_counts(calls):
    scores, expected = SampleScores(), [0.0] * 10
    scores.open(10)
    for call in calls:
        scores.record([index for index, _ in call], torch.tensor([value for _, value in call]))
        for index, value in call:
            expected[index] = value
    assert scores.whole().tolist() == expected
