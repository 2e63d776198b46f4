"""What a run's time, batches and energy are measured by."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoestring.callbacks.accounting.energy import SteadyEnergy
from shoestring.callbacks.accounting.meter import (
    EvaluationTimer,
    Windows,
    batch_size,
    communication_bytes,
    peak_bytes,
)


def test_windows_add_up_to_the_whole():
    began = time.perf_counter()
    windows = Windows()
    for name, seconds in [("train", 0.02), ("evaluation", 0.01), ("train", 0.01)]:
        windows.enter(name)
        time.sleep(seconds)
        assert windows.spent(name) >= seconds  # the open one too
    assert windows.spent("checkpoint") == 0
    whole = windows.total()
    windows.enter("other")
    assert sum(windows.seconds.values()) == pytest.approx(whole, abs=5e-3)
    assert 0.04 <= whole <= time.perf_counter() - began
    assert windows.seconds["train"] >= 0.03 and set(windows.seconds) == {"startup", "train", "evaluation"}


IDS = torch.zeros(3, 7, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        ({"input_ids": IDS, "labels": IDS}, (3, 21, (3, 7))),
        ({"pixels": torch.zeros(4, 2, 2), "label": torch.zeros(4)}, (4, 0, (4, 2, 2))),
        ((torch.zeros(5, 2), torch.zeros(5)), (5, 0, (5, 2))),
        (["name", {"x": torch.zeros(6, 1)}], (6, 0, (6, 1))),
        (torch.zeros(8), (8, 0, (8,))),
        (torch.zeros(()), (1, 0, ())),
        (({"input_ids": IDS}, 1), (3, 21, (3, 7))),
        ("text", (0, 0, ())),
        (None, (0, 0, ())),
    ],
    ids=str,
)
def test_samples_and_positions_of_a_batch(batch, sizes):
    assert batch_size(batch) == (*sizes, None)


def test_the_mask_of_a_batch_is_one_of_its_positions():
    mask = torch.ones_like(IDS)
    assert batch_size([{"input_ids": IDS, "attention_mask": mask}])[3] is mask
    assert batch_size({"input_ids": IDS, "attention_mask": torch.ones(3, 1, 7, 7)})[3] is None


def test_an_evaluation_that_ran_in_part_says_what_a_whole_one_takes():
    """Two of ten batches: one second of start, then 0.1 s each as the second took."""
    timer = EvaluationTimer()
    timer.end(5.0, 10)
    assert timer.seconds == 0  # none has run
    timer._times = [0.0, 1.0, 1.1]
    timer.end(1.2, 10)
    assert timer.seconds == pytest.approx(1.2 + 8 * 0.1) and timer.batches == 2
    timer._times = [0.0, 0.1, 0.2]
    timer.end(0.2, 2)  # a whole one, which was faster: half way there, for it may have been a freak
    assert timer.seconds == pytest.approx((2.0 + 0.2) / 2)
    timer.begin(0.0)
    assert timer.batches == 0


@given(st.sampled_from(["ddp", "zero1", "zero2", "zero3", "fsdp2"]), st.integers(1, 10**9), st.integers(1, 8))
def test_communication_follows_the_zero_paper(strategy, parameters, accumulate):
    """ZeRO-3 gathers twice and scatters once a micro-batch, as FSDP2 does; one rank sends nothing."""
    sent = communication_bytes(strategy, parameters, 2, 4, accumulate)
    like = "zero3" if strategy == "fsdp2" else strategy
    times = {"ddp": 2, "zero1": 2, "zero2": accumulate + 1, "zero3": 3 * accumulate}[like]
    assert sent == pytest.approx(times * parameters * 2 * 3 / 4)
    scattered = {"ddp": 2, "zero1": 1, "zero2": accumulate, "zero3": accumulate}[like]
    in_float32 = communication_bytes(strategy, parameters, 2, 4, accumulate, 4)
    assert in_float32 - sent == pytest.approx(scattered * parameters * 2 * 3 / 4)
    assert communication_bytes(strategy, parameters, 2, 1, accumulate) == 0
    assert communication_bytes("single", parameters, 2, 4, accumulate) == 0


def test_a_process_has_held_some_memory():
    assert peak_bytes(torch.device("cpu")) > 1 << 20


class Counter:
    """A meter of 50 W that counts how often it is read."""

    def __init__(self):
        self.reads, self.now = 0, 0.0

    def read(self):
        self.reads += 1
        return 50.0 * self.now, "rapl"


def test_energy_is_steady_between_rare_readings():
    meter = Counter()
    energy = SteadyEnergy(meter, 2.0)
    for step in range(1, 10_001):
        meter.now = step / 100
        assert energy.at(2.0 + meter.now) == pytest.approx(50 * meter.now)
    assert energy.source == "rapl" and meter.reads < 200  # once a second, and more often only at the start
    before = meter.reads
    meter.now += 0.001
    assert energy.at(2.0 + meter.now, exact=True) == pytest.approx(50 * meter.now) and meter.reads == before + 1
