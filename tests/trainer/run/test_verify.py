"""`shoestring verify`: it finds faults of many kinds, names where they are, and finds none where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import planted_faults
import pytest
import shipped
import torch
import verifying_ranks
from planted_faults import Texts
from processes import succeed

from shoestring.recipes import Recipe, load_recipe, recipe_from, shipped_recipes
from shoestring.trainer.planning.planner import plan
from shoestring.trainer.run.verify import variants
from shoestring.trainer.run.verify.compare import Difference, compare
from shoestring.trainer.run.verify.documents import apart
from shoestring.trainer.run.verify.dropout import SampleDropout
from shoestring.trainer.run.verify.verify import CannotVerify, verify
from shoestring.trainer.run.verify.witness import Seen

pytestmark = pytest.mark.filterwarnings("ignore")


def recipe(packed: bool, *techniques: str, model: dict[str, Any] | None = None, batch: int = 4) -> Recipe:
    """A recipe of the smallest model, with one fault or none."""
    return recipe_from({
        "model": {"task": "planted_faults:Reader", "args": model or {}},
        "data": {"source": "planted_faults:texts", "args": {"packed": packed}, "batch_size": batch},
        "techniques": [f"planted_faults:{name}" for name in techniques], "budget": {"steps": 1000},
    }, "reader", allow_code=True)  # fmt: skip


def first(verdict: dict[str, Any]) -> tuple[str, str, int]:
    """Axis, kind and step of the first difference."""
    variant = next(v for v in verdict["variants"] if v["status"] == "differs")
    return variant["axis"], variant["first"]["kind"], variant["first"]["step"]


def statuses(verdict: dict[str, Any]) -> dict[str, str]:
    return {variant["variant"]: variant["status"] for variant in verdict["variants"]}


# -- faults that one rank shows ----------------------------------------------------------------------------------------
# what is planted -> (its recipe, the axis, what differs first, in which step)
ON_ONE_RANK = {
    "loss averaged per micro-batch": (recipe(False, model={"weighs": False}), ("accumulation", "loss", 1)),
    "mask lost in packing": (recipe(True, model={"isolates": False}), ("packing", "loss", 1)),
    "dropout not by sample": (recipe(True, model={"dropout": "own"}), ("accumulation", "loss", 1)),
    "dropout not seeded": (recipe(True, model={"dropout": "unseeded"}), ("repetition", "loss", 1)),
    "last partial window dropped": (recipe(True, "DropsPartialWindow"), ("accumulation", "loss", 3)),
    "local samples only": (recipe(False, "ShortestHere"), ("accumulation", "loss", 1)),
}


@pytest.mark.parametrize("fault", ON_ONE_RANK)
def test_a_planted_fault_is_found_and_named(fault: str) -> None:
    faulty, where = ON_ONE_RANK[fault]
    verdict = verify(faulty, ranks=1)
    assert verdict is not None
    assert first(verdict.as_dict()) == where
    assert verdict.problems[0].startswith(f"{where[0]}: ")
    assert f"the loss of step {where[2]} is off by" in verdict.problems[0]


@pytest.mark.parametrize("packed", [True, False])
def test_nothing_is_found_where_there_is_no_fault(packed: bool) -> None:
    verdict = verify(recipe(packed), ranks=1)
    assert verdict is not None and verdict.problems == []
    axes = [outcome.variant.axis for outcome in verdict.outcomes]
    assert axes == ["repetition", "accumulation", *(["packing"] if packed else [])]
    assert all(outcome.status == "equal" for outcome in verdict.outcomes)
    assert {d.kind for d in verdict.outcomes[1].largest} == {"initial", "loss", "gradient", "weight", "final"}
    assert verdict.notes == ["dropout masks are drawn for each sample here, so that every split has the same"]


# -- faults that several ranks show ------------------------------------------------------------------------------------
ON_RANKS = {
    "none": (recipe(False), None),
    "gradient reduced twice": (recipe(False, "ReducesTwice"), ("ranks", "gradient", 1)),
    "average of the wrong shard": (recipe(False, "AveragesFirstShard"), ("sharding", "state", 4)),
    "reduction in bf16": (recipe(False, "ReducesInBf16"), ("ranks", "gradient", 1)),
}


ACCUMULATED = [f"{strategy}, 2 ranks, 2 accumulated" for strategy in ("ddp", "zero2")]
ONLY = {
    "gradient reduced twice": ["ddp, 2 ranks"],
    "average of the wrong shard": ACCUMULATED,
    "reduction in bf16": ["ddp, 2 ranks"],
}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Verdicts of two ranks."""
    folder = tmp_path_factory.mktemp("verify")
    recipes = {name: recipe for name, (recipe, _) in ON_RANKS.items()}
    succeed(verifying_ranks.main, recipes, folder, folder, ONLY, world=2, folder=folder, timeout=600)
    return json.loads((folder / "verdict.json").read_text())


@pytest.mark.parametrize("fault", ON_RANKS)
def test_a_fault_between_ranks_is_found_and_named(fault: str, on_ranks: dict[str, Any]) -> None:
    where, verdict = ON_RANKS[fault][1], on_ranks[fault]
    if where is None:
        assert verdict["problems"] == []
        strategies = {variant["strategy"] for variant in verdict["variants"]}
        assert strategies == {"ddp", "zero1", "zero2", "zero3"}
        assert set(statuses(verdict).values()) == {"equal"}
    else:
        assert first(verdict) == where
        assert not verdict["equal"] and len(verdict["problems"]) == 1


def test_the_message_names_the_runs_the_tensor_and_how_far_it_is_off(on_ranks: dict[str, Any]) -> None:
    assert on_ranks["gradient reduced twice"]["problems"][0].startswith(
        "ranks: ddp, 2 ranks is not reference: the gradient of words.weight in step 1 is off by 1 of its size; allowed"
    )
    assert on_ranks["average of the wrong shard"]["problems"][0].startswith(
        "sharding: zero2, 2 ranks, 2 accumulated is not ddp, 2 ranks, 2 accumulated: averages_first_shard's ema of "
    )


# -- shipped recipes ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shipped.leave_models(folder)
    return folder


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_the_same_however_a_batch_is_cut(
    name: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    verdict = verify(shipped.small(name), ranks=1)
    assert verdict is not None and verdict.problems == []
    packing = {"packing"} if shipped.small(name).model.task == "causal-lm" else set()
    assert {o.variant.axis for o in verdict.outcomes if o.status == "equal"} == {"repetition", "accumulation", *packing}


# -- the parts ---------------------------------------------------------------------------------------------------------
def seen(**changes: Any) -> Seen:
    kinds = ("initial", "gradient", "weight", "final")
    values = {"a": torch.arange(1.0, 5.0), "b": torch.tensor([1e-6, -1e-6])}
    tensors = {kind: {name: value * times for name, value in values.items()} for times, kind in enumerate(kinds, 1)}
    tensors["state"] = {"masks's mask of a": torch.arange(200) > 100}
    for kind, named in changes.items():
        tensors[kind] = {**tensors[kind], **named}
    return Seen(losses=[2.0, 1.0], tensors=tensors)


def different(**changes: Any) -> list[Difference]:
    return [difference for difference in compare(seen(**changes), seen(), "fp32") if difference.differs]


def test_equal_runs_have_no_difference() -> None:
    assert different() == []
    assert [d.kind for d in compare(seen(), seen(), "fp32")][:4] == ["initial", "initial", "loss", "gradient"]


@pytest.mark.parametrize("value", [
    torch.tensor([2.0, 4.0, 6.0, 8.1]), torch.ones(3), torch.tensor([2.0, 4.0, 6.0, float("nan")]),
])  # fmt: skip
def test_a_tensor_that_is_off_cut_otherwise_or_not_finite_differs(value: torch.Tensor) -> None:
    (difference,) = different(gradient={"a": value})
    assert (difference.kind, difference.step, difference.name) == ("gradient", 1, "a")


def test_weights_are_measured_by_what_training_has_changed() -> None:
    changed = seen().tensors["weight"]["a"] - seen().tensors["initial"]["a"]
    assert different(weight={"a": seen().tensors["weight"]["a"] + 1e-3 * changed}) == []
    (difference,) = different(weight={"a": seen().tensors["weight"]["a"] + 0.1 * changed})
    assert difference.off == pytest.approx(0.1)


def test_what_gets_no_gradient_but_rounding_is_compared_before_training_alone() -> None:
    ones, noise = torch.tensor([1.0, 1.0]), torch.tensor([2e-6, 1e-6])
    assert different(gradient={"b": noise}, weight={"b": ones}, final={"b": ones}) == []
    assert [d.name for d in different(gradient={"b": noise}, initial={"b": ones})] == ["b"]
    assert [d.kind for d in different(weight={"b": ones}, final={"b": ones})] == ["weight", "final"]
    assert [d.kind for d in different(gradient={"b": ones}, weight={"b": ones})] == ["gradient", "weight"]


def test_a_gradient_next_to_nothing_is_rounding_though_two_runs_round_alike_in_their_first_step() -> None:
    """A key's bias, which softmax cancels: the next steps round otherwise."""
    tiny = {"b": torch.tensor([1e-9, 1e-9])}
    moved = seen(gradient=tiny, weight={"b": torch.tensor([1.0, 1.0])})
    assert [d for d in compare(moved, seen(gradient=tiny), "fp32") if d.differs] == []
    unused = {"b": torch.zeros(2)}
    moved = seen(gradient=unused, weight={"b": torch.tensor([1.0, 1.0])})
    assert [d.name for d in compare(moved, seen(gradient=unused), "fp32") if d.differs] == ["b"]


def test_one_decision_in_a_hundred_may_fall_otherwise() -> None:
    mask = seen().tensors["state"]["masks's mask of a"]
    few, many = mask.clone(), mask.clone()
    few[:2], many[:3] = True, True
    assert different(state={"masks's mask of a": few}) == []
    assert [d.name for d in different(state={"masks's mask of a": many})] == ["masks's mask of a"]


def test_documents_apart_have_the_targets_of_their_packed_rows() -> None:
    samples = [Texts(packed=True)[index] for index in range(4)]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    rows = apart({**batch, "sample_weights": torch.arange(4.0)}, batch["position_ids"])
    assert rows["input_ids"].shape[0] == 12 and "position_ids" not in rows
    pairs = [(int(a), int(b)) for row in batch["labels"] for a, b in pairwise(row)]
    targets = [
        (int(a), int(b))
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
        for a, b in zip(ids[:-1], labels[1:], strict=True) if b != -100
    ]  # fmt: skip
    assert targets == pairs
    assert rows["sample_weights"].tolist() == [float(row) for row in range(4) for _ in range(3)]


@pytest.mark.parametrize("known", [True, False])
def test_a_samples_dropout_depends_neither_on_its_batch_nor_on_its_padding(known: bool) -> None:
    rows = torch.tensor([[5, 6, 7, 0, 0], [1, 2, 3, 4, 5], [9, 9, 9, 9, 0]])

    def masks(first: int, last: int, length: int = 5) -> torch.Tensor:
        dropout = SampleDropout(seed=0, on=True)
        with dropout.in_force(), torch.random.fork_rng():
            dropout.begin({"input_ids": rows[first:last, :length]}, 3, range(first, last) if known else ())
            torch.nn.functional.dropout(torch.ones(last - first, 2), 0.5)
            return torch.nn.Dropout(0.5)(torch.ones(last - first, length, 16))

    whole = masks(0, 3)
    assert torch.equal(whole[1:], masks(1, 3))
    if known:  # by content, padding is a part of it
        assert torch.equal(whole[0, :3], masks(0, 1, length=3)[0])
    assert 0.3 < float((whole == 0).float().mean()) < 0.7 and not torch.equal(whole[0], whole[1])
    assert torch.nn.functional.dropout.__module__ == "torch.nn.functional"


def test_every_legal_way_is_run_and_the_planned_one_among_them() -> None:
    made = plan(load_recipe("digits", ["strategy={name: zero2, devices: 2, offload: optimizer}", "data.batch_size=24",
                                       "data.micro_batch_size=3"]))  # fmt: skip
    ways = variants.together(made, 2)
    assert [(v.strategy, v.micro, v.accumulate, v.offload) for v in ways] == [
        ("ddp", 12, 1, "none"), ("ddp", 6, 2, "none"), ("zero1", 6, 2, "none"), ("zero2", 6, 2, "none"),
        ("zero3", 6, 2, "none"), ("ddp", 3, 4, "none"), ("zero2", 3, 4, "optimizer"),
    ]  # fmt: skip
    assert {v.against for v in ways if v.axis == "sharding"} <= {v.name for v in ways if v.axis == "ranks"}
    assert len({v.name for v in ways}) == len(ways)
    first = variants.reference(made.recipe)
    assert (first.micro, first.accumulate, first.ranks, first.strategy) == (24, 1, 1, "single")


def test_a_batch_that_does_not_divide_is_refused_with_ranks_that_do() -> None:
    with pytest.raises(CannotVerify, match=r"data.batch_size 9 does not divide among 2 ranks\. Use --ranks 3"):
        verify(recipe(True, batch=9), ranks=2)


# -- the command -------------------------------------------------------------------------------------------------------
def test_the_command_starts_its_ranks_and_fails_where_they_differ(tmp_path: Path) -> None:
    (tmp_path / "faults.py").write_text(Path(planted_faults.__file__).read_text())
    (tmp_path / "own.yaml").write_text(
        "model: {task: 'faults:Reader'}\ndata: {source: 'faults:texts', batch_size: 4}\nbudget: {hours: 1}\n"
        "techniques: ['faults:ReducesTwice']\n"
    )
    words = ("verify", "own.yaml", "--ranks", "2", "--steps", "1", "--allow-code", "--json")
    command = [sys.executable, "-m", "shoestring.trainer.cli", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    verdict = json.loads(done.stdout)
    assert first(verdict) == ("ranks", "gradient", 1)
    assert {v["strategy"]: v["status"] for v in verdict["variants"]} == {
        "single": "equal", "ddp": "differs", "zero1": "equal", "zero2": "equal", "zero3": "equal",
    }  # fmt: skip
    assert "error: ranks: ddp, 2 ranks is not reference: the gradient of words.weight in step 1" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["faults.py", "own.yaml"]
