"""Preference tuning from rows to weights: what is learnt, against which reference, however a batch is cut."""

from __future__ import annotations

import json
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import preference_ranks
import preferred
import pytest
import torch
from fits import llama
from processes import succeed
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from shoestring.callbacks.accounting.budget import ImpossibleBudget
from shoestring.recipes.adapters import KINDS
from shoestring.recipes.schema import AdapterSpec
from shoestring.trainer import Report, fit, plan
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.export.trained import open_run
from shoestring.trainer.run.verify.verify import verify
from shoestring.trainer.tasks import build_task
from shoestring.trainer.tasks.lora import add_adapter
from shoestring.trainer.tasks.preference import PairwisePreference
from shoestring.trainer.tasks.reference import FILE, frozen_reference

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preferred")


def learnt(folder: Path, loss: str, **options: Any) -> Report:
    report = fit(plan(preferred.recipe(folder, loss, **options)), run_dir=folder / loss)
    assert report is not None
    return report


@pytest.fixture(scope="module")
def dpo(folder: Path) -> Report:
    return learnt(folder, "dpo", evaluation={"every": "5 steps"}, checkpoint={"best": "max val_margin"})


def test_preferences_are_learnt(dpo: Report) -> None:
    lines = [json.loads(line) for path in (dpo.run_dir / "events").glob("*.jsonl") for line in path.open()]
    margins = [line["val_margin"] for line in lines if "val_margin" in line]
    assert margins[-1] > margins[0] > 0 and margins[-1] > 1
    metrics = dpo.summary["metrics"]
    assert metrics["val_accuracy"] > 0.9 and metrics["val_loss"] < 0.6931
    assert metrics["val_margin"] == pytest.approx(metrics["val_chosen_reward"] - metrics["val_rejected_reward"])
    assert (dpo.run_dir / "best").exists()
    with np.load(dpo.run_dir / FILE) as kept:
        assert kept["train"].shape == (128, 2) and kept["validation"].shape == (32, 2)


@pytest.mark.parametrize("loss", ["ipo", "orpo", "simpo", "kto"])
def test_every_loss_prefers_what_is_preferred(loss: str, folder: Path) -> None:
    assert learnt(folder, loss).summary["metrics"]["val_accuracy"] > 0.9


def test_a_reward_model_is_a_classifier_that_others_load(folder: Path) -> None:
    model = {"task": "reward-model", "preference": None}
    report = learnt(folder, "reward", model=model, export={"to": "hf"}, optimizer={"lr": 1e-2})
    assert report.summary["metrics"]["val_accuracy"] > 0.9
    theirs = AutoModelForSequenceClassification.from_pretrained(report.exported).eval()
    trained = open_run(report.run_dir)
    batch = trained.task.collate([trained.task.validation[i] for i in range(4)])
    with torch.no_grad():
        ours = trained.task.module.eval()(batch)
        rows = theirs(**{name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}).logits
    assert torch.allclose(ours, rows.view(-1, 2), atol=1e-6)


def test_the_reference_of_an_adapter_is_its_base(folder: Path) -> None:
    given = preferred.recipe(folder, adapter=True, budget={"steps": 5}, optimizer={"lr": 1e-2})
    fit(plan(given), run_dir=folder / "lora")
    task = build_task(given, workdir=folder / "lora")
    task.module.load_state_dict(load_weights(folder / "lora" / "final"), strict=False)
    module = task.module.train()
    batch = task.collate([task.train[i] for i in range(4)])
    rows = {name: value.flatten(0, 1) for name, value in batch.items()}
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    copy = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        wanted = -module._loss.by_token(copy, {"input_ids": rows["input_ids"], "labels": rows["labels"]}).sum(1)
        assert torch.equal(module.referred(rows), wanted)
        assert (module.answers(rows).log_probabilities - wanted).abs().max() > 1e-2, "the adapters do something"
        with frozen_reference(module):
            assert not any(part.training for part in module.modules())
    assert {name: p.requires_grad for name, p in module.named_parameters()} == before
    assert all(part.training for part in module.modules())
    assert not (folder / "lora" / FILE).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_every_kind_leave_their_base_alone(kind: str) -> None:
    model, ids = llama().eval(), torch.arange(1, 17)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    adapted = add_adapter(model, AdapterSpec(kind=kind, **({} if kind == "ia3" else {"rank": 2})), "causal-lm")  # type: ignore[arg-type]
    trained = [p for p in adapted.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p += 0.1
        assert not torch.equal(adapted(input_ids=ids).logits, wanted)
        with frozen_reference(adapted):
            assert torch.equal(adapted(input_ids=ids).logits, wanted)
    assert all(p.requires_grad for p in trained)


def test_what_the_reference_costs_is_the_runs_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed, seconds = PairwisePreference._documents, 0.2

    def slowly(module: PairwisePreference, documents: Any) -> torch.Tensor:
        sleep(seconds)
        return computed(module, documents)

    monkeypatch.setattr(PairwisePreference, "_documents", slowly)
    given = preferred.recipe(folder, "ipo", budget={"hours": "1.9 s"}, data={"micro_batch_size": 16})
    with pytest.raises(ImpossibleBudget, match="starting up alone has taken"):  # ten batches take two seconds
        fit(plan(given), run_dir=folder / "slow")


@pytest.mark.parametrize("loss", ["dpo", "orpo", "kto"])
def test_a_batch_may_be_cut_in_any_way(loss: str, folder: Path) -> None:
    verdict = verify(preferred.recipe(folder, loss, data={"batch_size": 8}), ranks=1)
    assert verdict is not None and verdict.problems == []
    assert "accumulation" in {o.variant.axis for o in verdict.outcomes if o.status == "equal"}


def test_logits_in_chunks_are_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = build_task(preferred.recipe(folder, "orpo"), workdir=folder / "chunks")
    batch = task.collate([task.train[i] for i in range(4)])
    rows = {name: value.flatten(0, 1) for name, value in batch.items()}
    gradients = []
    for chunked in (False, True):
        monkeypatch.setattr("shoestring.trainer.tasks.next_token.CHUNK", 1 << 12)
        task.module._loss.chunked = chunked
        task.module.zero_grad()
        task.module.training_step(batch, 0).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in task.module.parameters()]))
    whole = task.module.answers(rows).log_probabilities
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6) and torch.isfinite(whole).all()


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Path:
    preferred.pretrained(folder / "model")
    preferred.write(folder)
    succeed(preference_ranks.main, folder, world=2, folder=folder / "logs")
    return folder


@pytest.mark.parametrize("loss", preference_ranks.LOSSES)
def test_ranks_learn_alike_and_resume_to_the_bit(loss: str, ranks: Path) -> None:
    summary = json.loads((ranks / f"{loss}-broken" / "summary.json").read_text())
    assert summary["resumed_from"] == 3
    whole, broken = (load_weights(ranks / f"{loss}-{name}" / "final") for name in ("whole", "broken"))
    assert whole and all(torch.equal(whole[name], broken[name]) for name in whole)
    report = fit(plan(preference_ranks.recipe(ranks, loss, "single", 1)), run_dir=ranks / f"{loss}-alone")
    alone = load_weights(ranks / f"{loss}-alone" / "final")
    assert max(float((alone[name] - whole[name]).abs().max()) for name in whole) < 1e-5
    assert report is not None
    assert summary["metrics"] == pytest.approx(report.summary["metrics"], rel=1e-4, abs=1e-5)
    assert summary["trained_tokens"] == report.summary["trained_tokens"] > 0


def test_a_run_whose_reference_is_lost_does_not_go_on(dpo: Report, folder: Path) -> None:
    (dpo.run_dir / FILE).rename(folder / "aside.npz")
    more = preferred.recipe(folder, "dpo", evaluation={"every": "5 steps"}, checkpoint={"best": "max val_margin"},
                            budget={"steps": 60})  # fmt: skip
    with pytest.raises(TaskError, match=r"has no reference\.npz of these data"):
        fit(plan(more), run_dir=dpo.run_dir, accept_changes=True)
