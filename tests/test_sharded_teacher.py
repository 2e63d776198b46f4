"""Teachers under two ranks: cut by an engine of their own, and copied from a student that is itself cut."""

import json

import pytest
import teaching
from processes import succeed

pytestmark = pytest.mark.filterwarnings("ignore")
STRATEGIES = ("ddp", "zero3")


@pytest.fixture(scope="module", params=STRATEGIES)
def ran(request, tmp_path_factory):
    """What each of two ranks saw in its runs."""
    folder = tmp_path_factory.mktemp(request.param)
    succeed(teaching.main, request.param, folder, world=2, folder=folder, timeout=150)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_each_rank_holds_half_of_a_sharded_teacher(ran):
    for report in ran:
        assert report["replicated"]["held"] == report["replicated"]["of"]
        assert report["sharded"]["of"] == report["replicated"]["of"]
        assert report["sharded"]["held"] / report["sharded"]["of"] == pytest.approx(0.5, abs=0.03)
        assert report["sharded"]["teachers_in_student"] == 0


def test_a_sharded_teacher_teaches_the_same(ran):
    for report in ran:
        assert len(report["sharded"]["losses"]) == 12
        assert report["sharded"]["losses"] == pytest.approx(report["replicated"]["losses"], rel=1e-6)
        assert report["sharded"]["losses"] != report["early"]["losses"], "this teacher says something of its own"
    assert not any("teacher" in name or "first" in name for name in ran[0]["sharded"]["names"])


def test_initial_is_gathered_from_a_student_that_is_cut(ran):
    """Layers made in `configure_model` are in pieces before any technique sees them."""
    for report in ran:
        assert report["late"]["teacher"] == report["early"]["teacher"]
        assert report["late"]["losses"] == pytest.approx(report["early"]["losses"], abs=1e-6)
