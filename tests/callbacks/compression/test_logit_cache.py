"""Teacher logits on disk: found again, never wrong, never half, and no reason to run the teacher twice."""

import pytest
import pytorch_lightning as pl
import torch
from fits import Language, fit, llama
from torch.utils.data import DataLoader
from toy import Explode, Exploded, fingerprint, held_out, loader, toy

from shoestring.callbacks import Distillation
from shoestring.callbacks.compression.logit_cache import LogitCache, lengths_of, sample_keys
from shoestring.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore")
EPOCH = 18  # micro-batches of four of 72 samples


def record(seed, n=3, columns=4, k=3):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, columns, generator=draw).half(), torch.randint(0, 1 << 20, (n, k), generator=draw)


def key(number):
    return number.to_bytes(16, "big")


# -- the files ---------------------------------------------------------------------------------------------------------
def test_what_was_put_is_read_by_all(tmp_path):
    one, other = LogitCache(tmp_path), LogitCache(tmp_path)
    for i in range(20):
        one.put(key(i), *record(i, n=i))
    assert other.get(key(3)) is None
    other.refresh()
    one.put(key(20), *record(20))
    for cache in (one, other, LogitCache(tmp_path)):
        for i in range(20):
            values, kept = cache.get(key(i))
            assert torch.equal(values, record(i, n=i)[0]) and torch.equal(kept, record(i, n=i)[1])
    assert other.get(key(20)) is None, "told only when asked"
    other.refresh()
    assert torch.equal(other.get(key(20))[0], record(20)[0]) and len(other) == 21


def test_a_record_cut_off_by_a_crash_is_absent_and_the_others_are_not(tmp_path):
    cache = LogitCache(tmp_path)
    for i in range(3):
        cache.put(key(i), *record(i))
    cache.close()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for lost in range(1, len(whole) // 3 + 1):
        path.write_bytes(whole[:-lost])
        again = LogitCache(tmp_path)
        assert len(again) == 2 and again.get(key(2)) is None
        assert torch.equal(again.get(key(1))[0], record(1)[0])
        again.close()


def test_a_flipped_bit_is_never_served(tmp_path):
    cache = LogitCache(tmp_path)
    for i in range(3):
        cache.put(key(i), *record(i))
    cache.close()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    missed = 0
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 16
        path.write_bytes(damaged)
        again = LogitCache(tmp_path)
        for i in range(3):
            served = again.get(key(i))
            missed += served is None
            if served is not None:
                assert torch.equal(served[0], record(i)[0]) and torch.equal(served[1], record(i)[1])
        again.close()
    assert missed >= len(whole) // 7


def test_keys_follow_content_and_not_padding():
    ids = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    short = [("input_ids", ids[:1, :4])]
    padded = sample_keys([("input_ids", ids)], [3, 5], 5)
    assert sample_keys(short, [3], 4) == padded[:1]
    assert padded[0] != padded[1] and sample_keys(short, None, 4) != padded[:1]
    assert sample_keys([("labels", ids[:1, :4])], [3], 4) != padded[:1]
    assert lengths_of(ids > 0) == [3, 5]


# -- in a fit ----------------------------------------------------------------------------------------------------------
def forwards(tmp_path, epochs, data=None, **settings):
    """How often the teacher ran in every epoch, the losses, and the final weights."""
    technique = Distillation(teacher_dtype="float32", cache=str(tmp_path / "cache"), **settings)
    counts = []

    class Count(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            counts.append(technique._teacher.forwards - sum(counts))

    module = toy(dropout=0.0)
    data = data or loader(words={"noise": 0.0}, generator=torch.Generator().manual_seed(5))
    losses = fit(module, technique, Count(), steps=-1, max_epochs=epochs, data=data)
    return counts, losses, fingerprint(module.state_dict())


def test_the_second_epoch_needs_no_teacher(tmp_path):
    counts, losses, weights = forwards(tmp_path, 3, teacher=toy(dropout=0.0), top_k=3)
    assert counts == [EPOCH, 0, 0]
    again, repeated, same = forwards(tmp_path, 3, teacher=toy(dropout=0.0), top_k=3)
    assert again == [0, 0, 0], "nor does another run"
    assert same == weights and repeated == losses, "what was read is what was computed"
    assert forwards(tmp_path, 1, teacher=toy(dropout=0.0), top_k=2)[0] == [EPOCH], "other settings, other logits"
    assert forwards(tmp_path, 1, teacher=toy(dropout=0.0), temperature=4.0)[0] == [EPOCH]
    other = toy()
    with torch.no_grad():
        other.head.bias += 1
    assert forwards(tmp_path, 1, teacher=other, top_k=3)[0] == [EPOCH], "another teacher, other logits"


def test_without_a_cache_everything_is_computed_and_the_loss_the_same_up_to_rounding(tmp_path):
    torch.manual_seed(1)
    kept = forwards(tmp_path, 1, teacher=toy(dropout=0.0))[1]
    data = loader(words={"noise": 0.0}, generator=torch.Generator().manual_seed(5))
    plain = Distillation(teacher=toy(dropout=0.0), teacher_dtype="float32")
    computed = fit(toy(dropout=0.0), plain, steps=36, data=data)
    assert plain.teacher_forwards == 36
    assert computed[:EPOCH] == pytest.approx(kept, rel=1e-3)


def test_samples_that_change_are_other_samples(tmp_path):
    """Dropped tokens differ from epoch to epoch, and so do logits: the same number would give the wrong ones."""
    data = loader(generator=torch.Generator().manual_seed(5))
    assert forwards(tmp_path, 2, data=data, teacher=toy())[0] == [EPOCH, EPOCH]


def test_padded_sequences_are_read_in_other_batches(tmp_path):
    def data(order):
        draw = torch.Generator().manual_seed(2)
        rows = [torch.randint(1, 32, (n,), generator=draw) for n in (8, 3, 5, 6)]
        pad = torch.nn.utils.rnn.pad_sequence

        def collate(batch):
            return {"input_ids": pad(batch, True, 0), "labels": pad(batch, True, -100)}

        return DataLoader([rows[i] for i in order], batch_size=2, collate_fn=collate)

    def run(order):
        technique = Distillation(teacher=llama(3), teacher_dtype="float32", cache=str(tmp_path), top_k=4)
        losses = fit(Language(llama()), technique, data=data(order), steps=2)
        return technique.teacher_forwards, losses

    first, losses = run([0, 1, 2, 3])
    again, same = run([0, 1, 2, 3])
    assert (first, again) == (2, 0) and same == losses
    assert run([3, 0, 1, 2])[0] == 0, "padded to other lengths"


@pytest.mark.parametrize("cached", [True, False])
def test_resumes_bit_for_bit(cached, tmp_path):
    """Crashed in the first epoch; the second reads what either attempt has computed."""

    def run(name, steps, *callbacks, cache):
        settings = {"cache": str(tmp_path / cache)} if cached else {}
        technique = Distillation(teacher_dtype="float32", weight=5.0, top_k=3, **settings)
        trainer = Trainer(
            techniques=[technique], strategy="single", run_dir=tmp_path / name, ledger=False, accelerator="cpu",
            max_steps=steps, max_epochs=-1, checkpoint_every="4 steps", accumulate_grad_batches=2,
            callbacks=list(callbacks), num_sanity_val_steps=0,
        )  # fmt: skip
        module = toy()
        trainer.fit(module, loader(words={"noise": 0.0}), held_out())
        return fingerprint(module.state_dict()), trainer.summary["resumed_from"], technique.teacher_forwards

    whole, _, all_forwards = run("whole", 14, cache="one")
    with pytest.raises(Exploded):
        run("broken", 14, Explode(6), cache="two")
    resumed, step, forwards = run("broken", 14, cache="two")
    assert step == 4 and resumed == whole
    assert all_forwards == (EPOCH if cached else 28)
    assert forwards < all_forwards
