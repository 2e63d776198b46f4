"""The order of samples is a function of the seed and the step: not of ranks, workers, attempts or what ran before."""

import random
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import QUIET, WIDTH, Small, loader, samples, train
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
)

from shoestring.callbacks.sampling.global_batches import GlobalBatches
from shoestring.callbacks.sampling.seeding import SeededSamples, is_deterministic, seeded
from shoestring.trainer import Budget

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


def batches(
    size=37,
    *,
    micro=2,
    accumulate=1,
    rank=0,
    world=1,
    seed=0,
    at=0,
    drop_last=False,
    base=None,
    keyed=False,
    sizes=None,
):
    base = RandomSampler(range(size)) if base is None else base
    made = GlobalBatches(
        base, micro=micro, accumulate=accumulate, rank=rank, world=world, seed=seed, position=lambda: at,
        drop_last=drop_last, keyed=keyed,
    )  # fmt: skip
    made.sizes = sizes
    return made


def globally(size, micro, accumulate, world, **options):
    """Global batches of an epoch as the ranks together see them: a Counter of samples a step."""
    cut = {"micro": micro, "accumulate": accumulate, "world": world}
    ranks = [list(batches(size, rank=rank, **cut, **options)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    steps = range(0, len(ranks[0]), accumulate)
    return [Counter(i for rank in ranks for part in rank[s : s + accumulate] for i in part) for s in steps]


# (micro, accumulate, world), eight samples a step
CUTS = st.sampled_from(
    [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2), (2, 1, 4), (1, 8, 1), (1, 2, 4), (1, 1, 8)]
)


@given(size=st.integers(1, 70), cut=CUTS, other=CUTS, seed=st.integers(0, 9), at=st.integers(0, 30), drop=st.booleans())
def test_global_batches_are_the_same_however_they_are_cut(size, cut, other, seed, at, drop):
    one, two = (globally(size, *c, seed=seed, at=at, drop_last=drop) for c in (cut, other))
    assert one == two
    assert all(sum(batch.values()) == 8 for batch in one)


@given(size=st.integers(1, 70), cut=CUTS, epoch=st.integers(0, 3), drop=st.booleans())
def test_every_sample_comes_once_an_epoch_but_for_the_last_batch_being_filled_up(size, cut, epoch, drop):
    steps = batches(size, micro=8, drop_last=drop).steps_per_epoch
    counts = sum(globally(size, *cut, at=epoch * steps, drop_last=drop), Counter())
    if drop and size >= 8:
        assert steps == size // 8 and set(counts.values()) == {1} and counts.total() == size // 8 * 8
    else:
        assert steps == -(-size // 8) and set(counts) == set(range(size))
        assert counts.total() == steps * 8 and max(counts.values()) - min(counts.values()) <= 1  # padding is even


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9), st.booleans())
def test_resuming_at_any_step_gives_the_tail_of_the_whole(size, accumulate, world, at, keyed):
    options = {"accumulate": accumulate, "world": world, "rank": world - 1, "keyed": keyed}
    steps = batches(size, **options).steps_per_epoch
    epoch, within = divmod(at, steps)
    whole = list(batches(size, at=epoch * steps, **options))
    assert list(batches(size, at=at, **options)) == whole[within * accumulate :]


def test_epochs_and_seeds_differ_and_nothing_else_matters():
    first = list(batches(at=0))
    torch.manual_seed(99)
    torch.rand(7)
    assert list(batches(at=0)) == first
    assert list(batches(at=0, seed=1)) != first
    assert list(batches(at=batches().steps_per_epoch)) != first


class Nested(BatchSampler):
    """A batch sampler of the user's own: batches of neighbours in length, say."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomSampler(range(20), generator=torch.Generator().manual_seed(5)),
        lambda: WeightedRandomSampler(torch.arange(1.0, 21.0), 20),
        lambda: WeightedRandomSampler(torch.arange(1.0, 21.0), 20, generator=torch.Generator()),
        lambda: Nested(RandomSampler(range(20)), 3, False),
        lambda: Nested(RandomSampler(range(20), generator=torch.Generator()), 3, False),
        lambda: DistributedSampler(range(20), num_replicas=1, rank=0, shuffle=True),
    ],
    ids=["own-generator", "weighted", "weighted-own", "batch-sampler", "batch-sampler-own", "set-epoch"],
)
def test_a_users_random_sampler_repeats_its_epochs_and_leaves_the_global_generators_alone(make):
    used = make()
    for _ in range(3):
        list(used)  # a generator with a past
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first, again = (list(batches(base=base, at=0)) for base in (make(), used))
    assert first == again
    assert list(batches(base=used, at=batches(base=used).steps_per_epoch)) != first
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()
    assert (state[2] == np.random.get_state()[1]).all()


def test_seeding_is_for_the_block_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(KeyError), seeded(5):
        inside = torch.rand(1), random.random(), np.random.rand()
        raise KeyError
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    with seeded(5):
        assert inside == (torch.rand(1), random.random(), np.random.rand())


class Augmented(Dataset):
    """Noise from all three generators, as augmentations draw it."""

    def __init__(self, size=24):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        noise = torch.rand(WIDTH) + random.random() + float(np.random.rand())
        return noise, index


def test_what_is_read_twice_alike_needs_no_seed():
    assert is_deterministic(samples()) and is_deterministic(Subset(Subset(samples(), [1]), [0]))
    assert not is_deterministic(Augmented()) and not is_deterministic(Subset(Augmented(), [0]))
    assert not is_deterministic(ConcatDataset([Augmented()]))
    own = Augmented()
    own.deterministic = True
    assert is_deterministic(own)


def test_augmentation_is_a_function_of_seed_epoch_and_sample():
    def read(workers, at=0, accumulate=1, state=None):
        order = batches(24, micro=4 // accumulate, accumulate=accumulate, at=at, keyed=True)
        torch.manual_seed(workers + at + 1)
        before = torch.get_rng_state()
        generator = torch.Generator().manual_seed(1)
        data = DataLoader(SeededSamples(Augmented()), batch_sampler=order, num_workers=workers, generator=generator)
        by_index = {int(i): x for noise, index in data for x, i in zip(noise, index, strict=True)}
        assert torch.equal(before, torch.get_rng_state())
        return by_index

    whole, later = read(0), read(2, at=3, accumulate=2)
    assert len(whole) == 24 and len(later) == 12
    assert all(torch.equal(whole[index], noise) for index, noise in later.items())
    second = read(0, at=6)  # the next epoch
    assert not any(torch.equal(whole[index], second[index]) for index in whole)


# -- in runs ---------------------------------------------------------------------------------------------------------
class Seen(Small):
    """Remembers what it was given: (noise sum, index) of every sample of every step."""

    def training_step(self, batch, batch_idx):
        self.seen.append([(round(float(x.sum()), 5), int(i)) for x, i in zip(*batch, strict=True)])
        return super().training_step(batch[:1], batch_idx)


class Crash(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 8:
            raise RuntimeError("crashed")


class Stream(IterableDataset):
    """Twenty samples an epoch, in the only order there is; without `sized`, nobody knows how many."""

    def __init__(self, sized=False):
        if sized:
            self.__class__ = SizedStream

    def __iter__(self):
        return iter(samples(20))


class SizedStream(Stream):
    def __len__(self):
        return 20


class Batches:
    """Five batches, from whatever it is."""

    def __iter__(self):
        return (samples()[i : i + 4] for i in range(0, 20, 4))

    def __len__(self):
        return 5


LOADERS = {
    "shuffled": lambda: loader(20),
    "augmented": lambda: DataLoader(Augmented(20), 4, shuffle=True),
    "augmented by workers": lambda: DataLoader(Augmented(20), 4, shuffle=True, num_workers=1),
    "weighted": lambda: DataLoader(samples(20), 4, sampler=WeightedRandomSampler(torch.arange(1.0, 21.0), 20)),
    "distributed": lambda: DataLoader(samples(20), 4, sampler=DistributedSampler(samples(20), 1, 0, seed=3)),
    "own batches": lambda: DataLoader(samples(20), batch_sampler=Nested(RandomSampler(range(20)), 4, True)),
    "stream": lambda: DataLoader(Stream(), 4),
    "sized stream": lambda: DataLoader(Stream(sized=True), 4),
    "no DataLoader": lambda: Batches(),
}


@pytest.mark.filterwarnings("ignore:.*has `__len__` defined")
@pytest.mark.parametrize("name", LOADERS)
def test_an_interrupted_run_goes_on_with_the_very_next_sample(tmp_path, name):
    """Five steps an epoch, crashed in the second one at step 8 and resumed from step 6."""
    make, limit = LOADERS[name], {"max_epochs": 3} if "stream" in name else {"budget": Budget(steps=13)}
    whole, broken, resumed = Seen(), Seen(), Seen()
    train(tmp_path / "whole", module=whole, data=make(), **limit)
    with pytest.raises(RuntimeError, match="crashed"):
        train(tmp_path / "run", module=broken, data=make(), callbacks=[Crash()], checkpoint_every="3 steps", **limit)
    trainer = train(tmp_path / "run", module=resumed, data=make(), **limit)
    assert trainer.monitor.resumed_from == 6
    assert broken.seen == whole.seen[:8]
    assert resumed.seen == whole.seen[6:]
    assert len(whole.seen) == (15 if "stream" in name else 13)
    assert torch.equal(whole.net.weight, resumed.net.weight)
    if name in ("shuffled", "augmented", "distributed"):
        for epoch in (whole.seen[:5], whole.seen[5:10]):
            assert sorted(index for batch in epoch for _, index in batch) == list(range(20))
        assert whole.seen[:5] != whole.seen[5:10]


def test_a_run_with_another_seed_sees_another_order(tmp_path):
    one, two = Seen(), Seen()
    train(tmp_path / "a", Budget(steps=5), module=one, data=loader(20))
    train(tmp_path / "b", Budget(steps=5), module=two, data=loader(20), seed=1)
    assert one.seen != two.seen
    assert sorted(chain.from_iterable(one.seen)) == sorted(chain.from_iterable(two.seen))


# -- smaller global batches, on the clock ------------------------------------------------------------------------------
def growing(step):
    """Half of the full batch in even steps, from step 6 on all of it; multiples of what every cut can share out."""
    return 8 if step >= 6 or step % 2 else 4


SMALL_CUTS = st.sampled_from([(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2)])


@given(size=st.integers(1, 70), cut=SMALL_CUTS, other=SMALL_CUTS, at=st.integers(0, 20), drop=st.booleans())
def test_global_batches_of_changing_sizes_are_the_same_however_they_are_cut(size, cut, other, at, drop):
    one, two = (globally(size, *c, at=at, drop_last=drop, sizes=growing) for c in (cut, other))
    assert one == two
    whole = batches(size, micro=8, at=at, drop_last=drop, sizes=growing)
    assert len(one) == whole.steps_per_epoch - whole.place(at).step
    assert [sum(step.values()) for step in one] == [growing(at + i) for i in range(len(one))]


@given(size=st.integers(1, 70), at=st.integers(0, 20), drop=st.booleans())
def test_changing_sizes_use_every_sample_once_an_epoch_and_resume_where_they_were(size, at, drop):
    whole = batches(size, micro=8, drop_last=drop, sizes=growing)
    steps, epochs, position = [], [], 0
    while position <= at:
        epoch = list(batches(size, micro=8, drop_last=drop, sizes=growing, at=position))
        epochs.append(epoch)
        steps += epoch
        position += len(epoch)
    resumed = list(batches(size, micro=8, drop_last=drop, sizes=growing, at=at))
    assert steps[at:] == resumed
    assert whole.place(at).epoch == len(epochs) - 1
    for epoch in epochs:
        used = Counter(i for batch in epoch for i in batch)
        if not drop:
            assert used.keys() == set(range(size))
            assert sum(used.values()) - size < 8, "more than the last batch was filled up"
        elif len(epoch) > 1:
            assert max(used.values()) == 1 and size - len(used) < 8


def test_sizes_that_change_nothing_leave_the_order_alone():
    assert list(batches(at=3)) == list(batches(at=3, sizes=lambda step: 2))


# -- which samples a batch holds ---------------------------------------------------------------------------------------
@given(size=st.integers(1, 50), at=st.integers(0, 60), ahead=st.integers(0, 7))
def test_what_was_drawn_is_known_until_it_has_been_trained_on(size, at, ahead):
    """Loader workers draw ahead; Lightning counts micro-batches within the epoch."""
    clock = [at]
    order = batches(size, micro=2, accumulate=2)
    order.position, order.remembers = lambda: clock[0], True
    first = order.place(at).step * 2
    draw, drawn = iter(order), []
    for index in range(len(order) - first):
        while len(drawn) <= min(index + ahead, len(order) - first - 1):
            drawn.append(next(draw))
        assert list(order.drawn(first + index).samples) == drawn[index]
        clock[0] = at + (index + 1) // 2
    assert len(order._under_way) <= 2 * (ahead // 2 + 3)
