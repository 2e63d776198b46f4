"""The driver of `make chaos` finds what it looks for, and a schedule can be run again."""

import chaos
import pytest
import torch
from faults import PLACES, Fault
from toy import Toy

KILLED = Fault("SIGKILL", "backward", 13, (0,))


class Forgetful(Toy):
    """Draws from a generator that nobody saves, as a user's module may."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(3)

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (1 + torch.rand((), generator=self.own))


def forgetful() -> Toy:
    torch.manual_seed(7)
    return Forgetful()


def train_forgetful(*given: object) -> None:
    chaos.train(*given, make=forgetful)


@pytest.mark.parametrize(("train", "good"), [(chaos.train, True), (train_forgetful, False)])
def test_a_killed_run_is_good_only_where_nothing_is_forgotten(train, good, tmp_path):
    given = chaos.Schedule(0, "single", (), (KILLED,), (None,))
    references, struck = chaos.References(tmp_path, train), []
    if good:
        assert chaos.endure(given, tmp_path / "0", references, struck) == 2
    else:
        with pytest.raises(chaos.NotGood, match="others than those of the undisturbed run"):
            chaos.endure(given, tmp_path / "0", references, struck)
    assert struck == ["SIGKILL", "at backward"]


def test_a_schedule_is_drawn_from_its_seed_and_number():
    drawn = [chaos.schedule(5, number) for number in range(300)]
    assert drawn == [chaos.schedule(5, number) for number in range(300)] != [chaos.schedule(6, n) for n in range(300)]
    assert {fault.place for one in drawn for fault in one.faults} == set(PLACES)
    assert {one.strategy for one in drawn} == set(chaos.WORLDS)


def test_asked_to_stop_by_the_sums_of_the_step_that_is_saved(tmp_path):
    """What is written while training goes on is waited for: only what is published is called saved."""
    fault = Fault("full disk", "batch", 16, (1,), "SIGTERM")
    given = chaos.Schedule(0, "zero2", (), (fault,), (None,))
    assert chaos.endure(given, tmp_path / "0", chaos.References(tmp_path, chaos.train), []) == 2
