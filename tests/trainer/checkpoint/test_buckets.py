"""The first step of an attempt sums gradients as every later one does: what a resumed run depends on."""

import json

import bucket_ranks
import pytest
from processes import succeed


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """model -> elements of the gradient that later steps sum otherwise than the first one, on the same batch."""
    folder = tmp_path_factory.mktemp("buckets")
    succeed(bucket_ranks.main, folder, world=bucket_ranks.WORLD, folder=folder)
    reports = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(bucket_ranks.WORLD)]
    assert all(report == reports[0] for report in reports)
    return reports[0]


def test_ddp_by_itself_changes_the_order_after_its_first_step(changed):
    assert min(changed["plain"]) > 1000


@pytest.mark.parametrize("model", ["settled", "unused"])
def test_the_order_is_settled_before_the_first_step(model, changed):
    assert changed[model] == [0] * (bucket_ranks.STEPS - 1)
