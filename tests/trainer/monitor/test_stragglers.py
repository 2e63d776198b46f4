"""Straggler detection: its arithmetic, and real ranks of which one is slow."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import straggling
from processes import succeed
from toy import loader, toy

from shoestring.trainer import Trainer
from shoestring.trainer.ledger import read
from shoestring.trainer.monitor.stragglers import GROWTH, LEAST, Stragglers, Streaks, next_window, slow_ranks

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("busy", "seconds", "slow"),
    [
        ([1.0, 1.0, 1.0], 10.0, {}),
        ([1.0, 1.0, 1.31], 1.5, {2: 1.31}),
        ([1.0, 1.0, 1.3], 1.5, {}),
        ([1.0, 2.0, 1.0], 21.0, {}),  # it costs the others less than a twentieth of their time
        ([1.0, 2.0, 1.0], 19.0, {1: 2.0}),
        ([1.0, 3.0], 4.0, {1: 1.5}),  # the median of two is in the middle
        ([1.0, 1.5], 2.0, {}),
        ([0.0, 0.0, 0.0], 1.0, {}),
        ([5.0, 1.0, 1.0, 7.0], 10.0, {0: 5 / 3, 3: 7 / 3}),
    ],
)
def test_who_is_slow(busy: list[float], seconds: float, slow: dict[int, float]) -> None:
    assert slow_ranks(busy, seconds) == pytest.approx(slow)


def test_two_windows_running_make_a_straggler_and_one_without_ends_it() -> None:
    streaks = Streaks()
    changes = [streaks.update(slow) for slow in ([2], [], [2], [2], [2, 0], [0], [], [1])]
    assert changes == [([], []), ([], []), ([], []), ([2], []), ([], []), ([0], [2]), ([], [0]), ([], [])]


def test_windows_last_as_long_as_set_by_the_speed_of_the_last_one() -> None:
    assert next_window(100, 10.0, 30.0) == 300
    assert next_window(100, 1.0, 30.0) == 100 * GROWTH
    assert next_window(100, 100.0, 30.0) == 30
    assert next_window(100, 1000.0, 30.0) == LEAST
    assert next_window(16, 0.0, 30.0) == 16 * GROWTH


def events(folder: Path) -> list[dict]:
    """Of every rank: only the first may tell."""
    rows = read(folder / "run" / "events")
    return [dict(row.fields) for row in rows if str(row.fields.get("event")).startswith("straggler")]


def train(folder: Path, world: int, **options: object) -> list[dict]:
    succeed(partial(straggling.train, folder, world, **options), world=world, folder=folder)
    return events(folder)


def test_nobody_is_slow(tmp_path: Path) -> None:
    assert train(tmp_path, 3) == []


def test_a_rank_that_computes_slowly_is_named_and_said_to_be_over(tmp_path: Path) -> None:
    """The first rank: the others wait for its buffers in their forward passes, which must not count for them."""
    first, last = train(tmp_path, 3, computing=(0, 0.06, range(40)), steps=84)
    assert (first["event"], first["rank"], first["step"]) == ("straggler", 0, 3 * LEAST)
    assert first["ratio"] > 1.3 and first["host"] and first["window_steps"] == LEAST
    assert first["own_seconds_a_step"] > 0.12 and first["own_seconds_a_step"] > 1.3 * first["median_seconds_a_step"]
    assert (last["event"], last["rank"], last["step"]) == ("straggler_over", 0, 5 * LEAST)


def test_a_rank_that_reads_slowly_is_named(tmp_path: Path) -> None:
    (event,) = train(tmp_path, 2, reader=1)
    assert (event["event"], event["rank"], event["step"]) == ("straggler", 1, 3 * LEAST)


def test_one_rank_has_no_part_in_it(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", run_dir=tmp_path / "run", ledger=False, max_steps=2, max_epochs=-1)
    assert not [callback for callback in trainer.callbacks if isinstance(callback, Stragglers)]
    model = toy()
    trainer.fit(model, loader())
    assert trainer.monitor.each_step is None and not model._forward_pre_hooks
