"""What may change between two attempts of one run, and what is refused rather than guessed."""

import json
import subprocess
import sys
import time

import pytest
import pytorch_lightning as pl
import torch
from small import QUIET, WIDTH, Small, loader, rate, train

from shoestring.callbacks.accounting.clock import BadDuration, Spend
from shoestring.recipes import recipe_from
from shoestring.trainer import Budget, Trainer
from shoestring.trainer.checkpoint.format import DamagedCheckpoint, steps
from shoestring.trainer.checkpoint.saver import CannotResume
from shoestring.trainer.checkpoint.state import AnotherModel
from shoestring.trainer.ledger import Journal, RunBusy, RunIdentity, journal, lock, read
from shoestring.trainer.monitor.records import UNSEEN_SECONDS, AnotherRun, Records

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Stop(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("stopped")


def begun(folder, at=6, **options):
    """A run of twelve steps, stopped at step `at` with a checkpoint of it."""
    with pytest.raises(RuntimeError, match="stopped"):
        train(folder, Budget(steps=12), callbacks=[Stop(at)], checkpoint_every="1 step", **options)


def rows(folder, event):
    return [r.fields for r in read(folder / "events") if r.kind == "event" and r.fields.get("event") == event]


# -- the same run ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [Budget(steps=7), Budget(samples=30), Budget(hours=0.4 / 3600)], ids=repr)
def test_a_finished_run_given_again_does_nothing_and_says_the_same(tmp_path, budget):
    options = {"validation": loader(8, shuffle=False)}
    first = train(tmp_path, budget, module=Small(0.01), **options)
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and "events" not in p.parts}
    module = Small()
    again = train(tmp_path, budget, module=module, **options)
    assert again.summary == {**first.summary, "resumed_from": first.summary["steps"]}
    assert module.seen == [] and rate(again) == 0.0
    assert torch.equal(module.net.weight, first.lightning_module.net.weight)
    after = {p: p.stat().st_mtime_ns for p in kept if p.name != "summary.json"}
    assert after == {p: t for p, t in kept.items() if p in after}
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == first.summary["steps"]


def test_raising_the_budget_goes_on_as_if_it_had_been_the_budget_from_the_start(tmp_path):
    """The schedule is stretched: at step 6 of 12 the rate is half the peak again, and the end is at the floor."""
    train(tmp_path, Budget(steps=6), module=Small(lr=0.1))
    seen = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(optimizer.param_groups[0]["lr"])

    trainer = train(tmp_path, Budget(steps=12), module=Small(lr=0.1), callbacks=[Rates()])
    assert trainer.summary["resumed_from"] == 6 and trainer.summary["steps"] == 12
    assert seen == pytest.approx([0.1 * (1 - (s + 0.5) / 12) for s in range(6, 12)])
    assert rate(trainer) == 0.0
    assert rows(tmp_path, "replan")[-1] == {"event": "replan", "step": 6, "last": 12, "progress": 0.5}


@pytest.mark.parametrize(
    ("first", "then", "between"),
    [
        ({"samples": 24}, {"samples": 50}, (12, 12)),
        ({"steps": 6}, {"samples": 50}, (12, 12)),
        ({"hours": 0.4 / 3600}, {"hours": 0.9 / 3600}, (14, 60)),
        ({"hours": 0.4 / 3600}, {"hours": 1.0, "samples": 200}, (50, 50)),
        ({"steps": 6}, {"steps": 3}, (6, 6)),
    ],
    ids=repr,
)
def test_a_budget_may_change_in_amount_and_kind(tmp_path, first, then, between):
    before = train(tmp_path, Budget(**first), module=Small(0.015))
    after = train(tmp_path, Budget(**then), module=Small(0.015))
    assert between[0] <= after.summary["steps"] <= between[1]
    assert after.summary["steps"] >= before.summary["steps"] and rate(after) == 0.0
    assert after.summary["seconds"] >= before.summary["seconds"]


def test_more_epochs_go_on_too(tmp_path):
    train(tmp_path, max_epochs=1)
    trainer = train(tmp_path, max_epochs=2)
    assert (trainer.summary["resumed_from"], trainer.summary["steps"]) == (16, 32)


def test_the_same_global_batch_may_be_cut_otherwise(tmp_path):
    """Four samples at once, or two by two: the same samples a step, and the same weights up to rounding."""
    whole = Small()
    train(tmp_path / "whole", Budget(steps=12), module=whole)
    begun(tmp_path / "run")
    module = Small()
    trainer = train(tmp_path / "run", Budget(steps=12), module=module, data=loader(batch=2), accumulate_grad_batches=2)
    assert (trainer.summary["resumed_from"], trainer.summary["samples"]) == (6, 48)
    assert [sorted(a + b) for a, b in zip(module.seen[::2], module.seen[1::2], strict=True)] == [
        sorted(batch) for batch in whole.seen[6:]
    ]
    assert torch.allclose(whole.net.weight, module.net.weight, rtol=1e-5, atol=1e-7)


# -- another run -----------------------------------------------------------------------------------------------------
def test_another_batch_size_is_refused_with_both_numbers(tmp_path):
    begun(tmp_path)
    with pytest.raises(CannotResume, match=r"has 4 samples a step, and this loader makes 8\. Choose batch size x"):
        train(tmp_path, Budget(steps=12), data=loader(batch=8))
    assert steps(tmp_path / "checkpoints")[-1] == 6
    assert train(tmp_path, Budget(steps=12)).summary["resumed_from"] == 6  # and nothing is lost by it


def test_another_seed_is_refused(tmp_path):
    begun(tmp_path)
    with pytest.raises(CannotResume, match=r"has seed=0, and this one 1\. Choose another run directory"):
        train(tmp_path, Budget(steps=12), seed=1)


class Other(Small):
    def __init__(self, width, name="net"):
        super().__init__()
        del self.net
        self.name = name
        setattr(self, name, torch.nn.Linear(WIDTH, width, bias=False))

    def training_step(self, batch, batch_idx):
        return getattr(self, self.name)(batch[0]).square().mean()


@pytest.mark.parametrize(
    ("width", "name", "says"),
    [
        (2, "net", r"net\.weight has shape \(2, 8\), but in the checkpoint \(1, 8\)"),
        (1, "head", r"the checkpoint has no head\.weight\. It is of another model"),
    ],
)
def test_another_model_is_refused_by_name(tmp_path, width, name, says):
    begun(tmp_path)
    with pytest.raises(AnotherModel, match=says):
        train(tmp_path, Budget(steps=12), module=Other(width, name))


RECIPE = {
    "name": "one",
    "model": {"task": "image-classification", "config": {"kind": "mlp"}},
    "data": {"source": "digits", "batch_size": 4},
    "budget": {"steps": 12},
    "optimizer": {"lr": 0.01},
}


def with_recipe(folder, changes, at=None):
    """Our small run under the name of a recipe, whose sections are what is compared."""
    recipe = recipe_from({**RECIPE, **changes})
    callbacks = [] if at is None else [Stop(at)]
    records = Records(folder, name=recipe.name, recipe=recipe, ledger=False)
    return recipe, lambda: train(
        folder, Budget(steps=12), records=records, callbacks=callbacks, checkpoint_every="1 step"
    )


def test_another_recipe_is_refused_naming_both_and_what_differs(tmp_path):
    first, go = with_recipe(tmp_path, {}, at=6)
    with pytest.raises(RuntimeError, match="stopped"):
        go()
    second, go = with_recipe(tmp_path, {"optimizer": {"lr": 0.02}, "seed": 3, "name": "two"})
    with pytest.raises(AnotherRun) as error:
        go()
    for part in (str(tmp_path), "one", first.hash, "two", second.hash, "optimizer, seed", "another run directory"):
        assert part in str(error.value)
    assert RunIdentity.load(tmp_path).recipe_hash == first.hash
    assert len(rows(tmp_path, "start")) == 1 and not rows(tmp_path, "resume")


def test_the_same_recipe_may_change_what_it_spends_where_it_runs_and_what_it_tells(tmp_path):
    _, go = with_recipe(tmp_path, {}, at=6)
    with pytest.raises(RuntimeError, match="stopped"):
        go()
    changes = {"budget": {"steps": 20}, "name": "renamed", "tracking": {"log_every": 5}, "checkpoint": {"keep": 1}}
    second, go = with_recipe(tmp_path, changes)
    assert go().summary["resumed_from"] == 6
    assert RunIdentity.load(tmp_path).recipe_hash != second.hash  # a run stays what it was begun as


# -- refusing to guess -----------------------------------------------------------------------------------------------
def test_two_processes_on_one_run_directory_are_one_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    begun(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from shoestring.trainer.ledger import Journal;"
        "journal = Journal(Path(sys.argv[1]), rank=0, attempt=9); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "events"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunBusy, match=rf"is being written by process {other.pid} .*choose another run directory"):
            train(tmp_path, Budget(steps=12))
    finally:
        other.kill()
        other.communicate()
    assert train(tmp_path, Budget(steps=12)).summary["resumed_from"] == 6  # its lock died with it


def test_a_damaged_only_checkpoint_is_an_error_never_a_silent_restart(tmp_path):
    begun(tmp_path, at=1)
    checkpoints = tmp_path / "checkpoints"
    assert steps(checkpoints) == [1]
    path = checkpoints / "000000001" / "state.pt"
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):  # nor at the second try
        with pytest.raises(
            DamagedCheckpoint, match=r"no intact checkpoint is left:\n.*state\.pt has \d+ bytes instead"
        ):
            train(tmp_path, Budget(steps=12))
    assert steps(checkpoints) == [1] and not (tmp_path / "final").exists()


def test_starting_over_where_a_run_is_and_resuming_where_none_is_are_refused(tmp_path):
    with pytest.raises(CannotResume, match="has no checkpoint to resume from"):
        train(tmp_path, Budget(steps=12), resume="must")
    begun(tmp_path, resume=False)
    with pytest.raises(CannotResume, match="holds a run: resume it, or choose another run directory"):
        train(tmp_path, Budget(steps=12), resume=False)
    assert train(tmp_path, Budget(steps=12), resume="must").summary["resumed_from"] == 6


@pytest.mark.parametrize("every", ["0 steps", "0 s", "0%"])
def test_an_interval_of_nothing_is_refused(tmp_path, every):
    with pytest.raises(BadDuration, match=f"'{every}' is not an interval; give a positive duration"):
        train(tmp_path, Budget(steps=2), checkpoint_every=every)


def test_validating_by_itself_is_no_part_of_the_run(tmp_path):
    """Before a fit, and after it: nothing is recorded or counted, and it works as in any trainer."""
    data = loader(8, shuffle=False)
    trainer = Trainer(Budget(steps=4), run_dir=tmp_path, ledger=False, accelerator="cpu")
    trainer.monitor.totals.peak_flops = 1e9
    module = Small()
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, loader(), data)
    summary = dict(trainer.summary)
    (after,) = trainer.validate(module, data, verbose=False)
    assert after["val_loss"] == summary["metrics"]["val_loss"] < before["val_loss"]
    assert (
        trainer.summary == summary
        and trainer.monitor.account.spending.windows.seconds["evaluation"] == summary["windows"]["evaluation"]
    )


# -- what a killed attempt has cost ------------------------------------------------------------------------------------
@pytest.fixture
def journals(tmp_path, monkeypatch):
    """Writes attempts as the trainer does; without an end they look like attempts that were killed."""
    monkeypatch.setattr(journal, "ALIVE_EVERY", 0.1)

    def write(attempt, *rows, silence=0.0):
        opened = Journal(tmp_path / "events", rank=0, attempt=attempt, fsync_every=0.05)
        for kind, fields in rows:
            opened.write(kind, **fields)
        time.sleep(silence)
        opened.close()

    return write


def spent(folder, attempt):
    records = Records(folder)
    records._attempt = attempt
    return records.spent(Spend(seconds=4.0, usd=2.0, kwh=1.0, tokens=77))


def step(seconds, **fields):
    return ("step", {"step": 3, "seconds": seconds, "device_seconds": seconds, "usd": seconds / 2, **fields})


START, STOP = ("event", {"event": "start"}), ("event", {"event": "error", "seconds": 12.0, "usd": 6.0})


def test_time_money_and_energy_after_the_checkpoint_stay_spent(tmp_path, journals):
    assert spent(tmp_path, 0).seconds == 4.0  # nothing is known of any attempt
    journals(0, START, step(10.0), STOP)
    total = spent(tmp_path, 1)
    assert (total.seconds, total.usd, total.kwh, total.tokens) == (12.0, 6.0, 1.0, 77)


def test_a_killed_attempt_is_charged_until_it_was_last_seen(tmp_path, journals):
    """In the middle of a long step or evaluation no row is written but that the process lives."""
    journals(0, START, step(10.0), silence=0.6)
    total = spent(tmp_path, 1)
    assert 10.3 + UNSEEN_SECONDS < total.seconds < 10.8 + UNSEEN_SECONDS
    assert total.usd == pytest.approx(total.seconds / 2)


def test_attempts_that_died_before_they_recorded_a_total_are_charged_for_their_lives(tmp_path, journals):
    journals(0, START, step(10.0), STOP)
    time.sleep(0.3)  # nobody works in between
    journals(1, ("event", {"event": "checkpoint_damaged"}), silence=0.4)
    journals(2, ("event", {"event": "checkpoint_damaged"}), silence=0.4)
    total = spent(tmp_path, 3)
    assert 12.0 + 2 * UNSEEN_SECONDS + 0.4 < total.seconds < 12.0 + 2 * UNSEEN_SECONDS + 0.9
    assert spent(tmp_path, 1).seconds == 12.0  # and its own rows are not an attempt's own past
