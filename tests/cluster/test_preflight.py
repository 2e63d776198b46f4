"""Pre-flight: what is concluded from reports, by hand and at random; and real nodes (processes) that are checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import preflight_ranks
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflight_ranks import fly, verdict
from processes import last_words, run
from toy import fingerprint

from shoestring.cluster.config.sections import PreflightSpec
from shoestring.cluster.node import ranks
from shoestring.cluster.preflight.verdict import (
    NodeReport,
    absent,
    better,
    faults,
    names_of,
    rematch,
    ring,
    shortage,
    slow_devices,
    slow_links,
    slow_nodes,
    table,
)
from shoestring.trainer.checkpoint.weights import load_weights

pytestmark = pytest.mark.filterwarnings("ignore")
GIB = 2**30
LIMITS = PreflightSpec.model_validate({"disk": "10 GiB", "memory": "4 GiB", "clock_skew": "2 s"})


def report(node: int = 0, **values: Any) -> NodeReport:
    return NodeReport(node=node, name=f"n{node}", **{"disk": 20 * GIB, "memory": 8 * GIB, **values})


# -- one node ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, []),
        ({"disk": 10 * GIB, "memory": 4 * GIB, "skew": -2.0}, []),
        ({"disk": 10 * GIB - 1}, ["disk: 10.00 GiB, wanted 10.00 GiB (preflight.disk)"]),
        ({"memory": GIB}, ["memory: 1.00 GiB, wanted 4.00 GiB (preflight.memory)"]),
        ({"disk": None, "memory": None}, []),
        ({"skew": -2.5}, ["clock: -2.50 s from node 0's, allowed 2 s (preflight.clock_skew)"]),
        ({"skew": 2.5, "skew_error": 0.6}, []),
        ({"problems": ("names: no",), "disk": 0}, ["names: no", "disk: 0.00 GiB, wanted 10.00 GiB (preflight.disk)"]),
    ],
)
def test_a_node_by_itself(values: dict[str, Any], said: list[str]) -> None:
    assert faults(report(**values), LIMITS) == said


def test_a_full_disk_that_all_share_is_no_nodes_fault() -> None:
    assert shortage([report(0, disk=GIB), report(1, disk=2 * GIB)], LIMITS).startswith("2.00 GiB at most are free")
    assert shortage([report(0, disk=GIB), report(1)], LIMITS) == ""
    assert shortage([report(0, disk=GIB), report(1, disk=None)], LIMITS) == ""


def test_a_device_is_compared_with_all_devices_of_the_job() -> None:
    assert slow_devices({0: [100e9, 90e9], 1: [110e9, 100e9]}, 0.5) == {}
    assert slow_devices({}, 0.5) == {}
    (node, said), *others = slow_devices({0: [100e9, 100e9], 1: [45e9, 100e9], 2: [100e9, 100e9]}, 0.5).items()
    assert (node, others) == (1, [])
    assert said == (
        "matmul: device 0 does 45 GFLOP/s, 45% of the median 100; wanted 50% (preflight.matmul)"
    )  # fmt: skip
    assert slow_devices({0: [100e9], 1: [1e9]}, 0.0) == {}, "0 is no check"
    assert set(slow_devices({0: [100.0], 1: [30.0]}, 0.5)) == {1}, "the median of two is 65"
    assert slow_devices({0: [100.0], 1: [40.0]}, 0.5) == {}, "the median of two is 70"


# -- pairs -------------------------------------------------------------------------------------------------------------
@given(st.integers(0, 40))
def test_every_node_meets_both_its_neighbours_and_never_two_at_once(count: int) -> None:
    rounds = ring(range(count))
    for pairs in rounds:
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)
    met = {node: {a + b - node for pairs in rounds for a, b in pairs if node in (a, b)} for node in range(count)}
    assert all(len(others) == (2 if count > 2 else count - 1) for others in met.values())
    assert len(rounds) <= (3 if count % 2 else 2)


@given(st.integers(3, 20), st.data())
def test_one_slow_node_is_named_among_any_number(count: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, count - 1))
    usual, slow = st.floats(0.8e9, 1.2e9), st.floats(0, 0.19e9)
    pairs = {p: data.draw(slow if bad in p else usual) for pairs in ring(range(count)) for p in pairs}
    assert slow_nodes(pairs, 0.25) == {bad}
    assert slow_links(pairs, 0.25, {bad}) == []


@given(st.integers(7, 20), st.data())
def test_a_node_between_two_slow_ones_is_cleared_by_another_pair(count: int, data: st.DataObject) -> None:
    middle = data.draw(st.integers(0, count - 1))
    bad = {(middle - 1) % count, (middle + 1) % count}

    def measured(pairs: list[tuple[int, int]]) -> dict[tuple[int, int], float]:
        return {pair: 0.1e9 if bad & set(pair) else 1e9 for pair in pairs}

    pairs = measured([pair for pairs in ring(range(count)) for pair in pairs])
    suspects = slow_nodes(pairs, 0.25)
    assert suspects == {middle, *bad}
    pairs |= measured(rematch(suspects, set(range(count)) - suspects))
    assert slow_nodes(pairs, 0.25) == bad


def test_a_slow_link_blames_nobody() -> None:
    pairs = {(0, 1): 1e9, (1, 2): 0.1e9, (2, 3): 1e9, (3, 0): 1e9}
    assert better(pairs) == {0: 1e9, 1: 1e9, 2: 1e9, 3: 1e9}
    assert slow_nodes(pairs, 0.25) == set()
    assert slow_links(pairs, 0.25, set()) == [(1, 2)]


def test_two_nodes_blame_neither_and_a_broken_pair_counts_even_unchecked() -> None:
    assert slow_nodes({(0, 1): 1.0}, 0.25) == set()
    assert slow_nodes({(0, 1): 0.0, (1, 2): 0.0, (2, 0): 1e9}, 0.0) == {1}


# -- who is missing ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("nodes", "reported", "alive", "bad"),
    [
        (3, {0, 1}, set(), {2}),
        (3, {0}, {0, 1, 2}, {0}),  # the others live, and none can reach it
        (3, {0}, {0}, {1, 2}),  # they never started
        (4, {0}, {0, 1}, {1, 2, 3}),
        (4, {0, 1}, {0, 1, 2, 3}, {2, 3}),
        (2, {0}, {0, 1}, {1}),
    ],
)
def test_who_is_missing(nodes: int, reported: set[int], alive: set[int], bad: set[int]) -> None:
    assert absent(nodes, reported, alive) == bad


def test_who_is_silent_is_named_by_the_engines_list() -> None:
    assert names_of(3, ("a", "b", "c"), {0: "a", 1: "b"}) == {0: "a", 1: "b", 2: "c"}
    assert names_of(3, ("a", "b", "c"), {0: "b", 1: "a"})[2] == "c"
    assert names_of(3, ("a", "b", "c"), {0: "c", 1: "a"})[2] == "b", "the engine's order is another"
    assert names_of(2, (), {0: "a"}) == {0: "a", 1: "node-1"}


def test_the_table_gives_a_line_a_node() -> None:
    rows = [
        {"name": "n1", "faults": [], "matmul": [2e12, 1e12], "bandwidth": 5e8, "disk": 3 * GIB, "memory": None,
         "skew": 0.25},
        {"name": "node2", "faults": ["has not reported within 3 s"]},
    ]  # fmt: skip
    assert table(rows, 1.25).splitlines() == [
        "[shoestring] pre-flight of 2 nodes: 1.2 s",
        "  node   matmul         all-reduce  disk   memory  clock   verdict",
        "  n1     1e+03 GFLOP/s  500 MB/s    3 GiB  -       0.25 s  ok",
        "  node2  -              -           -      -       -       BAD: has not reported within 3 s",
    ]


# -- real nodes --------------------------------------------------------------------------------------------------------
def test_three_healthy_nodes_pass_and_nothing_has_changed(tmp_path: Path) -> None:
    codes, job_dir, said = fly(tmp_path, 3)
    assert codes == [0, 0, 0], said
    outcome = verdict(job_dir)
    assert outcome["bad"] == [] and outcome["seconds"] > 0
    assert [row["name"] for row in outcome["nodes"]] == ["n1", "n2", "n3"]
    for row in outcome["nodes"]:
        assert row["disk"] > 0 and row["memory"] > 0 and row["bandwidth"] > 0 and len(row["matmul"]) == 1
    assert "[shoestring] pre-flight of 3 nodes" in (tmp_path / "rank-0.log").read_text()
    assert "pre-flight" not in (tmp_path / "rank-1.log").read_text()
    seen = [json.loads((job_dir / f"seen-{rank}.json").read_text()) for rank in range(3)]
    assert all(one["same"] for one in seen)
    assert [len(one["rows"]) for one in seen] == [4, 0, 0]
    assert {row["window"] for row in seen[0]["rows"]} == {"preflight"}
    assert not list(job_dir.parent.parent.glob(".preflight*")), "nothing is left behind"


def test_tasks_that_measure_nothing_wait_for_the_verdict(tmp_path: Path) -> None:
    """Two nodes of two tasks; and one task alone, which needs nobody."""
    codes, job_dir, said = fly(tmp_path / "four", 2, devices=2)
    assert codes == [0] * 4, said
    assert [row["name"] for row in verdict(job_dir)["nodes"]] == ["n1", "n2"]
    codes, job_dir, said = fly(tmp_path / "one", 1)
    assert codes == [0] and verdict(job_dir)["bad"] == [], said


@pytest.mark.parametrize(
    ("nodes", "options", "bad", "why"),
    [
        (2, {"SHOESTRING_FAIL_PREFLIGHT": "n2,n7"}, ["n2"], "fails on purpose"),
        (3, {"SHOESTRING_FAIL_PREFLIGHT": "n1"}, ["n1"], "fails on purpose"),
        (2, {"ahead": {1: 60}}, ["n2"], "clock: +60.00 s from"),
        (2, {"limits": {"memory": 2**60}}, ["n1", "n2"], "memory: "),
        (3, {"limits": {"timeout": "3 s"}, "missing": (2,)}, ["n3"], "has not reported within 3 s"),
        (3, {"limits": {"timeout": "1 s"}, "missing": (0,)}, ["n1"], "cannot be reached"),
    ],
    ids=["drill", "drill of the first", "clock", "memory", "never came", "the first never came"],
)
def test_a_bad_node_is_named_and_everybody_ends_with_86(
    nodes: int, options: dict[str, Any], bad: list[str], why: str, tmp_path: Path
) -> None:
    codes, job_dir, said = fly(tmp_path, nodes, **options)
    gone = options.get("missing", ())
    assert [code for rank, code in enumerate(codes) if rank not in gone] == [86] * (nodes - len(gone)), said
    outcome = verdict(job_dir)
    assert outcome["bad"] == bad
    (row, *_) = [row for row in outcome["nodes"] if row["name"] == bad[0]]
    assert why in row["faults"][0]
    records = ranks.read(job_dir, 0)
    assert all(record.code == 86 and bad[0] in record.error for record in records if record.rank not in gone), records


def test_a_full_disk_ends_the_job_and_blames_nobody(tmp_path: Path) -> None:
    codes, job_dir, said = fly(tmp_path, 2, limits={"disk": 2**60})
    assert codes == [1, 1] and "at most are free on each node where the run is stored" in said
    assert not (job_dir / "attempts" / "0" / "preflight.json").exists()


def test_training_ends_bit_for_bit_as_without(tmp_path: Path) -> None:
    codes, job_dir, said = fly(tmp_path / "checked", 2, train=tmp_path / "checked")
    assert codes == [0, 0] and len(verdict(job_dir)["nodes"]) == 2, said
    codes = run(preflight_ranks.plain_training, tmp_path / "plain", world=2, folder=tmp_path / "plain")
    assert codes == [0, 0], last_words(tmp_path / "plain")
    ends = [load_weights(tmp_path / name / "run" / "final") for name in ("checked", "plain")]
    assert fingerprint(ends[0]) == fingerprint(ends[1])
