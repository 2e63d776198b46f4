"""What a million trained tokens costs: counted over ranks and attempts, and told where it is known."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import adapted
import pytest
from command_line import command
from toy import Exploded

from shoestring.recipes import recipe_from
from shoestring.trainer import Ledger, Report, fit, plan
from shoestring.trainer.tasks import build_task

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip
CHATS, BATCH, EPOCHS = 24, 8, 2


def recipe(home: Path, **sections: Any) -> Any:
    """Two whole epochs of chats whose answers differ in length: rows are padded, prompts are not trained on."""
    path = home / "chats.jsonl"
    pairs = [(f"Say {i} times no.", "no " * (1 + i % 5)) for i in range(CHATS)]
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": said}] for question, said in pairs
    ]
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    values: dict[str, Any] = {
        "model": {"task": "causal-lm", "config": SHAPE, "tokenizer": {"train": "bpe", "vocab_size": 300}},
        "data": {"source": str(path), "validation": 0, "pack": False, "sequence_length": 64, "batch_size": BATCH},
        "budget": {"steps": EPOCHS * CHATS // BATCH}, "strategy": {"name": "single"},
        "checkpoint": {"every": "2 steps"}, "cluster": {"usd_per_device_hour": 3.6},
    }  # fmt: skip
    return recipe_from({**values, **sections}, "priced")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A run that has crashed after its fifth step, and went on from its fourth."""
    home = tmp_path_factory.mktemp("priced")
    with pytest.raises(Exploded):
        fit(plan(recipe(home)), run_dir=home / "run", callbacks=[adapted.Crash(5)])
    report = fit(plan(recipe(home)), run_dir=home / "run")
    assert report is not None and report.summary["resumed_from"] == 4
    return report


def test_tokens_that_carry_loss_are_counted_once_and_priced(resumed: Report) -> None:
    task = build_task(recipe(resumed.run_dir.parent), workdir=resumed.run_dir)
    targets = sum(int((task.train[i]["labels"][1:] != -100).sum()) for i in range(len(task.train)))
    total = resumed.summary
    assert total["trained_tokens"] == EPOCHS * targets < total["tokens"] / 2
    assert total["padding"] > 0 and total["usd"] == pytest.approx(total["device_seconds"] / 1000)
    price = total["usd_per_million_trained_tokens"]
    assert price == pytest.approx(1e6 * total["usd"] / (EPOCHS * targets))
    kept = json.loads((resumed.run_dir / "report.json").read_text())
    assert kept["summary"]["usd_per_million_trained_tokens"] == price


def test_the_ledger_tells_it_an_older_one_too(
    resumed: Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger()
    with closing(sqlite3.connect(ledger.path)) as db:  # as one was that was made before
        db.execute("ALTER TABLE runs DROP COLUMN trained_tokens")
        db.commit()
    ledger.rebuild([resumed.run_dir])
    capsys.readouterr()
    assert command(monkeypatch, "runs", "show", str(resumed.run_dir), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    for name in ("trained_tokens", "usd_per_million_trained_tokens"):
        assert shown[name] == pytest.approx(resumed.summary[name])


def test_what_is_not_known_is_not_told(resumed: Report, capsys: pytest.CaptureFixture[str]) -> None:
    from shoestring.trainer.cli.display import show_report

    show_report(resumed)
    assert "per million trained tokens" in capsys.readouterr().out
    home = resumed.run_dir.parent
    free = fit(plan(recipe(home, cluster={"usd_per_device_hour": 0})), run_dir=home / "free")
    digits = {"task": "image-classification", "config": {"kind": "mlp", "hidden": [8]}}
    data = {"source": "digits", "batch_size": 64}
    images = fit(plan(recipe(home, model=digits, data=data, budget={"steps": 2})), run_dir=home / "images")
    assert free is not None and images is not None
    assert free.summary["trained_tokens"] == resumed.summary["trained_tokens"] and images.summary["usd"] > 0
    assert "trained_tokens" not in images.summary
    for report in (free, images):
        assert "usd_per_million_trained_tokens" not in report.summary
        show_report(report)
    assert "per million" not in capsys.readouterr().out
