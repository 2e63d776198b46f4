"""A run that no longer moves ends, and says which rank stands where."""

import traceback

import hanging
import pytest
from processes import last_words, run

from shoestring.callbacks.accounting.clock import BadDuration
from shoestring.trainer.ledger import read
from shoestring.trainer.monitor.hang import limit, standing, verdict


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_is_never_read(workers, tmp_path):
    codes = run(hanging.train, tmp_path, "sample", 1, workers, world=1, folder=tmp_path, timeout=40)
    said = last_words(tmp_path, lines=200)
    assert codes == [1], said
    assert "the run has not moved for" in said and "rank 0 waits for its next batch" in said
    assert workers or "in __getitem__" in said
    (row,) = [row.fields for row in read(tmp_path / "run" / "events") if row.fields.get("event") == "hang"]
    assert "dataloader.py" in row["stack"]


def test_a_rank_that_is_stopped_is_named(tmp_path):
    codes = run(hanging.train, tmp_path, "rank", 2, world=2, folder=tmp_path, timeout=60)
    said = last_words(tmp_path, lines=200)
    assert codes[0] == 1 and codes[1] != 0, said
    assert said.count("rank 1 does not answer: its process is stopped or gone") == 1, said


def test_a_rank_that_others_wait_for_is_named():
    rows = {
        0: {"waits_for": "a collective, for another rank (x.py:1 in step)", "stack": "zero", "step": 4},
        1: {"waits_for": "its next batch (data.py:7 in read)", "stack": "one", "step": 4},
    }
    said = verdict(rows, 2, 4, 130.0)
    assert "rank 1 waits for its next batch (data.py:7 in read), after its step 4" in said and "rank 0" not in said


def test_a_stack_is_read_from_its_inner_end():
    def frame(path: str, name: str) -> traceback.FrameSummary:
        return traceback.FrameSummary(path, 3, name, lookup_line=False, line="")

    mine, torch = frame("/home/me/train.py", "step"), "/v/site-packages/torch"
    comm = frame(f"{torch}/distributed/distributed_c10d.py", "all_reduce")
    loader = frame(f"{torch}/utils/data/dataloader.py", "__next__")
    assert standing([mine, comm]).waits_for == "a collective, for another rank (train.py:3 in step)"
    assert standing([mine, loader]).waits_for == "its next batch (train.py:3 in step)"
    assert standing([loader, mine]).waits_for == "its next batch (train.py:3 in step)"
    assert standing([mine]).waits_for == "code (train.py:3 in step)"


def test_the_limit_is_a_time():
    assert (limit("auto"), limit("off"), limit("10 min")) == (None, float("inf"), 600)
    with pytest.raises(BadDuration, match="auto, off, or a time"):
        limit("10 steps")
