"""What a technique makes of gradients on their way between ranks."""

from __future__ import annotations

import json
import warnings

import pytest
import pytorch_lightning as pl
import torch
from processes import succeed
from toy import ACCUMULATE, STEPS, fingerprint, held_out, loader, toy

from shoestring.callbacks import Card, Technique
from shoestring.callbacks.contract import IncompatibleTechniques
from shoestring.callbacks.parameters.communication import mean_over_ranks, set_reduction
from shoestring.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Narrow(Technique, pl.Callback):
    """Sends gradients as `dtype`; float32 is what DDP does itself."""

    card = Card(name="narrow", does="sends fewer bytes", writes={"communication"})

    def __init__(self, *, dtype: str = "bfloat16") -> None:
        self.dtype = dtype

    def setup(self, trainer, pl_module, stage) -> None:
        self.sent = 0

    def on_train_start(self, trainer, pl_module) -> None:
        self.acts = set_reduction(trainer, self._reduce, self.card.name)

    def _reduce(self, bucket):
        gradient = bucket.buffer()
        sent = gradient if self.dtype == "float32" else gradient.to(getattr(torch, self.dtype))
        self.sent += sent.numel() * sent.element_size()
        reduced = mean_over_ranks(bucket, sent)
        return reduced.then(lambda done: done.value().to(gradient.dtype))


def fit(folder, *techniques, world=1, strategy="auto"):
    module = toy()
    trainer = Trainer(
        techniques=techniques, run_dir=folder, ledger=False, accelerator="cpu", accumulate_grad_batches=ACCUMULATE,
        num_sanity_val_steps=0, max_steps=STEPS, max_epochs=-1, strategy=strategy, devices=world,
    )  # fmt: skip
    trainer.fit(module, loader(world), held_out())
    return module


def rank(folder) -> None:
    warnings.simplefilter("ignore")
    results = {"absent": fingerprint(fit(folder / "absent", world=2, strategy="ddp").state_dict())}
    for dtype in ("float32", "bfloat16"):
        technique = Narrow(dtype=dtype)
        module = fit(folder / dtype, technique, world=2, strategy="ddp")
        results[dtype] = {"weights": fingerprint(module.state_dict()), "sent": technique.sent, "acts": technique.acts}
    try:
        fit(folder / "zero", Narrow(), world=2, strategy="zero1")
    except IncompatibleTechniques as error:
        results["zero"] = str(error)
    (folder / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    succeed(rank, folder, world=2, folder=folder)
    return [json.loads((folder / f"rank-{number}.json").read_text()) for number in range(2)]


def test_it_makes_the_mean_that_all_ranks_use(ranks):
    one, other = ranks
    assert one == other
    assert one["float32"]["weights"] == one["absent"], "DDP's own mean, bit for bit"
    assert one["bfloat16"]["weights"] != one["absent"]
    parameters = sum(p.numel() for p in toy().parameters() if p.requires_grad)
    assert one["float32"]["sent"] == 4 * parameters * STEPS, "once a step, not once a micro-batch"
    assert one["bfloat16"]["sent"] * 2 == one["float32"]["sent"]


def test_where_nothing_is_communicated_it_does_not_act(tmp_path, ranks):
    technique = Narrow()
    fit(tmp_path, technique)
    assert not technique.acts and not technique.sent


def test_zero_has_no_such_hook(ranks):
    assert "narrow changes gradients as they are communicated, which only ddp allows" in ranks[0]["zero"]
