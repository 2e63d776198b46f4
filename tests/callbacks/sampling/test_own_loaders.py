"""Loaders, samplers and limits that a user brings stay what they are, as in a plain `pl.Trainer`."""

import json
import logging

import pytest
import pytorch_lightning as pl
import torch
from own_loaders import fit_all
from processes import run as run_ranks
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from small import QUIET, Crash, Small, samples, train
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler, SequentialSampler

from shoestring.trainer import Budget

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET] + [
    pytest.mark.filterwarnings("ignore:You requested to overfit")
]


def plainly(data, **options):
    """What the same trainer of Lightning's own shows the module."""
    module, quiet = Small(), ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer = pl.Trainer(accelerator="cpu", devices=1, **dict.fromkeys(quiet, False), **options)
    trainer.fit(module, data)
    return module.seen


class Backwards(Sampler):
    """An order of the user's own."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(range(self.size - 1, -1, -1))


class Rare(DistributedSampler):
    """Shares out among ranks, and prefers two samples; another order every epoch."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        weights = torch.ones(len(self.dataset))
        weights[:2] = 10.0
        return iter(torch.multinomial(weights, self.num_samples, True, generator=generator).tolist())


class ByRank(Backwards):
    """No subclass of torch's, but aware of ranks."""

    num_replicas, rank = 1, 0


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield from range(20)


class OwnConstructor(DataLoader):
    def __init__(self, data):
        super().__init__(data, batch_size=4, shuffle=True)


class Doubled(DataLoader):
    def __iter__(self):
        for features, index in super().__iter__():
            yield features, index + self.offset


def doubled():
    made = Doubled(samples(20), 4)
    made.offset = 100
    return made


OWN = {
    "a sampler that balances": (
        lambda: DataLoader(samples(20), 4, sampler=Rare(samples(20), 1, 0)), "Rare shares it out",
    ),
    "a sampler that knows ranks": (lambda: DataLoader(samples(20), 4, sampler=ByRank(20)), "ByRank shares it out"),
    "batches that know ranks": (
        lambda: DataLoader(samples(20), batch_sampler=BatchSampler(ByRank(20), 4, False)), "ByRank shares it out",
    ),
    "a loader's own iteration": (doubled, "Doubled is a loader class"),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_what_has_an_order_of_its_own_keeps_it_and_one_line_says_so(tmp_path, caplog, name):
    make, says = OWN[name]
    module = Small()
    with caplog.at_level(logging.WARNING, "shoestring"):
        train(tmp_path, module=module, data=make(), max_epochs=2)
    assert module.seen == plainly(make(), max_epochs=2) and len(module.seen) == 10
    assert [r.message for r in caplog.records if "keeps its own order" in r.message] == [
        next(r.message for r in caplog.records if says in r.message)
    ]


@pytest.mark.parametrize(
    "make", [*(make for make, _ in OWN.values()), lambda: OwnConstructor(samples(20))], ids=[*OWN, "shuffled"]
)
def test_what_keeps_its_order_resumes_in_mid_epoch(tmp_path, make):
    whole, broken, resumed = Small(), Small(), Small()
    train(tmp_path / "whole", Budget(steps=13), module=whole, data=make())
    with pytest.raises(RuntimeError, match="crashed"):
        train(
            tmp_path / "run", Budget(steps=13), module=broken, data=make(), callbacks=[Crash(8)],
            checkpoint_every="3 steps",
        )  # fmt: skip
    trainer = train(tmp_path / "run", Budget(steps=13), module=resumed, data=make())
    assert trainer.monitor.resumed_from == 6
    assert broken.seen == whole.seen[:8] and resumed.seen == whole.seen[6:]
    assert torch.equal(whole.net.weight, resumed.net.weight)


def test_a_sampler_without_end_stays_and_the_budget_ends_the_run(tmp_path):
    module = Small()
    train(tmp_path, Budget(steps=7), module=module, data=DataLoader(samples(20), 4, sampler=Endless()))
    assert module.seen == [list(range(s % 5 * 4, s % 5 * 4 + 4)) for s in range(7)]


def test_without_lightnings_sampler_the_loaders_are_the_users_own(tmp_path, caplog):
    module = Small()
    train(tmp_path, module=module, data=DataLoader(samples(8), 4), max_epochs=1, use_distributed_sampler=False)
    assert module.seen == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert "use_distributed_sampler=False" in caplog.text


# -- how much of the data ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("limit", "batches"),
    [({"limit_train_batches": 3}, 3), ({"limit_train_batches": 0.4}, 2), ({"overfit_batches": 1}, 1), ({}, 5)],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_limits_reach_the_order_and_the_clock(tmp_path, limit, batches, accumulate):
    """Three epochs of so many batches each, annealed at their end, and resumed amid the second one."""
    steps = -(-batches // accumulate)
    options = {"max_epochs": 3, "accumulate_grad_batches": accumulate, **limit}
    whole, broken, resumed = Small(), Small(), Small()
    data = lambda: DataLoader(samples(20), 4, sampler=Backwards(20))  # noqa: E731
    trainer = train(tmp_path / "whole", module=whole, data=data(), **options)
    clock = trainer.monitor.account.clock
    assert (trainer.summary["steps"], clock.horizon, clock.progress) == (3 * steps, 3 * steps, 1.0)
    assert trainer.summary["stopped_by"] == "max_epochs"
    if accumulate == 1:
        assert whole.seen == plainly(data(), **options)
    assert len(whole.seen) == 3 * (batches if limit else steps * accumulate)
    with pytest.raises(RuntimeError, match="crashed"):
        train(
            tmp_path / "run", module=broken, data=data(), callbacks=[Crash(len(whole.seen) // 3 + batches // 2)],
            checkpoint_every="1 step", **options,
        )  # fmt: skip
    train(tmp_path / "run", module=resumed, data=data(), **options)
    assert resumed.seen and whole.seen[-len(resumed.seen) :] == resumed.seen
    assert torch.equal(whole.net.weight, resumed.net.weight)


class Growing(pl.LightningDataModule):
    """Other samples every epoch, as `reload_dataloaders_every_n_epochs` is for."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def train_dataloader(self):
        epoch = self.trainer.current_epoch
        self.epochs.append(epoch)
        size = 8 if epoch < 2 else 12
        return DataLoader(torch.utils.data.Subset(samples(50), range(10 * epoch, 10 * epoch + size)), 4)


def test_reloaded_loaders_are_read_and_resumed(tmp_path):
    options = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1}
    whole, broken, resumed, data = Small(), Small(), Small(), Growing()
    trainer = train(tmp_path / "whole", module=whole, data=data, **options)
    assert data.epochs == [0, 1, 2, 3]
    assert [batch[0] for batch in whole.seen] == [0, 4, 10, 14, 20, 24, 28, 30, 34, 38]
    assert trainer.monitor.account.clock.progress == 1.0 and trainer.summary["steps"] == 10
    with pytest.raises(RuntimeError, match="crashed"):
        train(
            tmp_path / "run", module=broken, data=Growing(), callbacks=[Crash(6)], checkpoint_every="1 step", **options
        )
    train(tmp_path / "run", module=resumed, data=Growing(), **options)
    assert whole.seen[6:] == resumed.seen and torch.equal(whole.net.weight, resumed.net.weight)


class SkipsRest(Small):
    """Leaves every epoch after its second batch."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


def test_an_epoch_that_the_module_leaves_is_followed_by_a_whole_one(tmp_path):
    module = SkipsRest()
    train(tmp_path, module=module, data=DataLoader(samples(20), 4), max_epochs=3)
    assert [batch[0] for batch in module.seen] == [0, 4, 0, 4, 0, 4]


# -- accumulation that changes ----------------------------------------------------------------------------------------
def test_accumulation_by_epoch_keeps_epochs_whole_and_anneals(tmp_path):
    """Five batches an epoch: five steps, then three a time; resumed in an epoch of longer windows."""
    options = lambda: {"max_epochs": 3, "checkpoint_every": "1 step"}  # noqa: E731
    every = lambda: GradientAccumulationScheduler({0: 1, 1: 2})  # noqa: E731
    data = lambda: DataLoader(samples(20), 4, sampler=SequentialSampler(range(20)))  # noqa: E731
    whole, broken, resumed = Small(), Small(), Small()
    trainer = train(tmp_path / "whole", module=whole, data=data(), callbacks=[every()], **options())
    clock = trainer.monitor.account.clock
    assert (trainer.summary["steps"], clock.horizon, clock.progress, trainer.global_step) == (11, 11, 1.0, 11)
    assert whole.seen == plainly(data(), max_epochs=3)
    with pytest.raises(RuntimeError, match="crashed"):
        train(tmp_path / "run", module=broken, data=data(), callbacks=[every(), Crash(8)], **options())
    trainer = train(tmp_path / "run", module=resumed, data=data(), callbacks=[every()], **options())
    assert trainer.monitor.resumed_from == 6 and resumed.seen == whole.seen[7:]
    assert torch.equal(whole.net.weight, resumed.net.weight)


# -- on ranks ---------------------------------------------------------------------------------------------------------
def test_ranks_share_out_what_is_not_shared_out_yet_and_nothing_else(tmp_path):
    """In training by whoever knows how; `test` and `predict` after it count every sample once."""
    assert run_ranks(fit_all, tmp_path, world=2, folder=tmp_path) == [0, 0]
    zero, one = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    for name in zero:
        if name != "lightning":
            assert sorted(zero[name]["train"] + one[name]["train"]) == list(range(16)), name
        for stage in ("test", "predict"):
            assert sorted(zero[name][stage] + one[name][stage]) == list(range(8)), (name, stage)
    assert zero["subclass"]["train"] == list(range(14, -1, -2)) and one["subclass"]["train"] == list(range(15, 0, -2))
    assert zero["ranks"]["train"] == list(range(0, 16, 2))
    assert sorted(zero["lightning"]["train"]) == sorted(zero["loader"]["train"])  # shuffled by Lightning's own sampler
