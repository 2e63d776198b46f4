"""Teachers under two ranks: cut by an engine of their own, copied from a student that is cut, and cached for all."""

import json
from functools import cache

import pytest
import teaching
from processes import succeed

pytestmark = pytest.mark.filterwarnings("ignore")
STRATEGIES = ("ddp", "zero3")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """strategy -> what each of two ranks saw in its runs."""

    @cache
    def train(strategy):
        folder = tmp_path_factory.mktemp(strategy)
        succeed(teaching.main, strategy, folder, world=2, folder=folder, timeout=200)
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]

    return train


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_rank_holds_half_of_a_sharded_teacher(strategy, ran):
    for report in ran(strategy):
        assert report["replicated"]["held"] == report["replicated"]["of"]
        assert report["sharded"]["of"] == report["replicated"]["of"]
        assert report["sharded"]["held"] / report["sharded"]["of"] == pytest.approx(0.5, abs=0.03)
        assert report["sharded"]["teachers_in_student"] == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sharded_teacher_teaches_the_same(strategy, ran):
    for report in ran(strategy):
        assert len(report["sharded"]["losses"]) == 12
        assert report["sharded"]["losses"] == pytest.approx(report["replicated"]["losses"], rel=1e-6)
        assert report["sharded"]["losses"] != report["early"]["losses"], "this teacher says something of its own"
    assert not any("teacher" in name or "first" in name for name in ran(strategy)[0]["sharded"]["names"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_initial_is_gathered_from_a_student_that_is_cut(strategy, ran):
    """Layers made in `configure_model` are in pieces before any technique sees them."""
    for report in ran(strategy):
        assert report["late"]["teacher"] == report["early"]["teacher"]
        assert report["late"]["losses"] == pytest.approx(report["early"]["losses"], abs=1e-6)


@pytest.mark.parametrize("run", ["early", "hidden", "cached"])
def test_the_loss_does_not_depend_on_the_sharding(run, ran):
    """Block outputs are taken where gathered weights have been let go, and their gradients fetch them again."""
    for one, other in zip(ran("ddp"), ran("zero3"), strict=True):
        assert one[run]["losses"] == pytest.approx(other[run]["losses"], abs=2e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_in_the_second_epoch_ranks_read_what_the_others_computed(strategy, ran):
    for report in ran(strategy):
        assert len(report["cached"]["losses"]) == 2 * teaching.EPOCH
        assert report["cached"]["forwards"] == teaching.EPOCH
