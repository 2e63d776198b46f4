"""What an evaluation asks of the model besides validation: the same training to the bit, billed, and written down."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from command_line import command
from further_ranks import PROMPTS, STRATEGIES, TOGETHER, main, recipe, trained
from processes import succeed
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoestring.trainer import Budget, Report, Trainer
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.ledger import read
from shoestring.trainer.monitor.evaluations import NEVER
from shoestring.trainer.monitor.further import EvaluationResult

pytestmark = pytest.mark.filterwarnings("ignore")
ASKED: dict[str, Any] = {"prompts": PROMPTS, "prompt_tokens": 12}


def samples(run_dir: Path) -> dict[int, list[dict[str, str]]]:
    rows = [row.fields for row in read(run_dir / "events", rank=0) if row.fields.get("event") == "samples"]
    return {row["step"]: row["samples"] for row in rows}


def same(one: Path, other: Path) -> bool:
    first, second = load_weights(one / "final"), load_weights(other / "final")
    return bool(first) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("asked")


@pytest.fixture(scope="module")
def completing(folder: Path) -> Report:
    """A run that has crashed after its fifth step, and went on from its fourth."""
    report = trained(folder, "asked", crash=True, **ASKED)
    assert report is not None and report.summary["resumed_from"] == 4
    return report


def test_prompts_are_completed_after_each_validation(completing: Report) -> None:
    written = samples(completing.run_dir)
    assert list(written) == [2, 4, 6]
    model, tokenizer = (
        kind.from_pretrained(completing.run_dir / "final") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    for prompt, sample in zip(PROMPTS, written[6], strict=True):
        asking = [{"role": "user", "content": prompt}]
        given = tokenizer.apply_chat_template(asking, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        said = model.generate(**given, do_sample=False, max_new_tokens=12)[0, given["input_ids"].shape[1] :]
        assert sample == {"prompt": prompt, "text": tokenizer.decode(said, skip_special_tokens=True)}


def test_training_is_the_same_to_the_bit_resumed_too(completing: Report, folder: Path) -> None:
    plain = trained(folder, "plain")
    assert plain is not None and same(plain.run_dir, completing.run_dir)
    assert trained(folder, "whole", **ASKED) is not None and same(folder / "whole", completing.run_dir)
    assert samples(folder / "whole") == samples(completing.run_dir)


def test_the_ledger_tells_them(
    completing: Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "runs", "show", str(completing.run_dir)) == 0
    shown = capsys.readouterr().out
    assert "'event': 'samples'" in shown and PROMPTS[0] in shown


class Counting:
    """Takes a twentieth of a second for each unit of work, of which it may say that it has fewer."""

    def __init__(self, work: int, said: int) -> None:
        self.work, self.said = work, said

    def metrics(self) -> list[str]:
        return ["units"]

    def units(self) -> int:
        return self.said

    def run(self, go_on: Callable[[], None]) -> EvaluationResult:
        for number in range(self.work):
            if number:
                go_on()
            time.sleep(0.05)
        return EvaluationResult({"units": float(self.work)})


def counting(folder: Path, work: Counting, budget: Budget, every: str | None) -> Trainer:
    trainer = Trainer(
        budget, run_dir=folder, ledger=False, accelerator="cpu", check_val_every_n_epoch=None, val_check_interval=NEVER,
        best="max units",
    )  # fmt: skip
    trainer.monitor.totals.peak_flops = 1e9
    trainer.monitor.evaluations.plan_every(every)
    trainer.monitor.further.each = [work]
    trainer.fit(small.Small(0.01), small.loader(), small.loader(shuffle=False))
    return trainer


def test_what_is_measured_is_a_metric_of_the_run(tmp_path: Path) -> None:
    summary = counting(tmp_path, Counting(2, said=2), Budget(steps=8), "4 steps").summary
    assert summary["metrics"]["units"] == 2 and summary["best"] == {"metric": "units", "value": 2, "step": 4}
    assert sum(summary["windows"].values()) == pytest.approx(summary["seconds"], abs=0.1)
    assert summary["windows"]["evaluation"] > 0.2


def test_the_budget_keeps_back_their_time(tmp_path: Path) -> None:
    trainer = counting(tmp_path, Counting(20, said=20), Budget(hours=3 / 3600), None)
    assert trainer.summary["metrics"]["units"] == 20 and trainer.summary["seconds"] < 3
    assert trainer.summary["stopped_by"] == "seconds" and trainer.monitor.account.horizon.guard.reserve_seconds > 1


def test_the_budget_ends_what_takes_longer_than_it_said(tmp_path: Path) -> None:
    summary = counting(tmp_path, Counting(200, said=1), Budget(hours=1.5 / 3600), "4 steps").summary
    events = [row.fields.get("event") for row in read(tmp_path / "events", rank=0)]
    assert "evaluation_cut" in events and "units" not in summary["metrics"] and "best" not in summary
    assert "val_loss" in summary["metrics"] and summary["seconds"] < 2


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Path:
    recipe(folder)
    succeed(main, folder, ASKED, world=2, folder=folder / "logs")
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_ranks_alone_or_together(strategy: str, ranks: Path) -> None:
    if strategy in TOGETHER:
        assert same(ranks / f"{strategy}-plain", ranks / f"{strategy}-asked")
    written = samples(ranks / f"{strategy}-asked")
    assert list(written) == [2, 4, 6] and all(sample["text"] for sample in written[6])
