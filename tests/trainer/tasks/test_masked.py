"""Masked language modelling: what is hidden, that it is learnt, and that a resumed run hides the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted import Crash
from toy import Exploded

from shoestring.trainer import fit, plan
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.data.masked_texts import HIDDEN, REPLACED, Masking
from shoestring.trainer.data.receipt import receipt

BERT = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
MODEL = {"task": "masked-lm", "config": BERT}


def test_what_is_hidden_by_hand() -> None:
    masking = Masking(mask=3, special=(0, 1, 2, 3), vocabulary=1000, share=0.15)
    ids = np.arange(1, 401)  # the first three are special
    torch.manual_seed(0)
    fates = np.zeros(3)
    for _ in range(50):
        sample = masking(ids, 0)
        inputs, labels = sample["input_ids"].numpy(), sample["labels"].numpy()
        hidden = labels != -100
        assert hidden.sum() == 60 == masking.count(np.array(397)) and not hidden[:3].any()
        assert (labels[hidden] == ids[hidden]).all() and (inputs[~hidden] == ids[~hidden]).all()
        masked, kept = inputs[hidden] == 3, inputs[hidden] == ids[hidden]
        fates += masked.sum(), (~masked & ~kept).sum(), kept.sum()
    shares = fates / fates.sum()
    assert np.abs(shares - [HIDDEN, REPLACED - HIDDEN, 1 - REPLACED]).max() < 0.03
    assert masking.count(np.array([0, 1, 3, 10])).tolist() == [0, 1, 1, 2], "one at least, where there is one"
    fixed = Masking(mask=3, special=(), vocabulary=1000, share=0.15, fixed=True)
    assert torch.equal(fixed(ids, 7)["labels"], fixed(ids, 7)["labels"])
    assert not torch.equal(fixed(ids, 7)["labels"], fixed(ids, 8)["labels"])


@pytest.mark.parametrize("pack", [True, False])
def test_hidden_words_are_learnt_and_measured_exactly(tiny: Any, pack: bool) -> None:
    task = tiny.task(model=MODEL, data={"pack": pack})
    for data in (task.train, task.validation):
        counts = [int((data[i]["labels"] != -100).sum()) for i in range(len(data))]
        assert data.target_counts.tolist() == counts, "what a batch weighs is known before it is read"
        assert data.token_counts.tolist() == [len(data[i]["input_ids"]) for i in range(len(data))]
    assert task.tokenizer.mask_token_id == len(task.tokenizer) - 1 and task.unit == "tokens"
    tiny.fit(task, 40)
    metrics = tiny.validate(task)
    assert tiny.validate(task) == metrics, "an evaluation hides the same each time"
    losses, right, module = [], 0, task.module.eval()
    for i in range(len(task.validation)):
        batch = task.collate([task.validation[i]])
        hidden = batch["labels"] != -100
        with torch.no_grad():
            logits = module.model(input_ids=batch["input_ids"]).logits[hidden]
        losses.append(torch.nn.functional.cross_entropy(logits, batch["labels"][hidden], reduction="none"))
        right += int((logits.argmax(-1) == batch["labels"][hidden]).sum())
    every = torch.cat(losses)
    assert metrics["val_loss"] == pytest.approx(every.mean().item(), rel=1e-4)
    assert metrics["val_accuracy"] == pytest.approx(right / len(every), abs=1e-6)
    assert metrics["val_perplexity"] == pytest.approx(math.exp(metrics["val_loss"]), rel=1e-4)
    assert metrics["val_loss"] < 0.9 * math.log(len(task.tokenizer)), "nothing was learnt"
    state = torch.get_rng_state()
    shown = receipt(task.prepared)
    assert torch.equal(state, torch.get_rng_state())
    assert shown.trained_share == pytest.approx(0.15, abs=0.03) and any(
        "<|mask|>" in text for text, _ in shown.shown[0]
    )


def test_a_resumed_run_hides_the_same(tiny: Any, tmp_path: Path) -> None:
    sections = {"budget": {"steps": 6}, "checkpoint": {"every": "2 steps"}, "tracking": {"ledger": False}}
    recipe = tiny.recipe(model=MODEL, strategy={"name": "single"}, evaluation={"at_end": False}, **sections)
    fit(plan(recipe), run_dir=tmp_path / "whole")
    with pytest.raises(Exploded):
        fit(plan(recipe), run_dir=tmp_path / "broken", callbacks=[Crash(5)])
    report = fit(plan(recipe), run_dir=tmp_path / "broken")
    assert report is not None and report.summary["resumed_from"] == 4
    whole, again = load_weights(tmp_path / "whole" / "final"), load_weights(tmp_path / "broken" / "final")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_texts_alone_are_masked(tiny: Any, tmp_path: Path) -> None:
    rows = [{"question": f"what is {i}", "answer": str(i)} for i in range(20)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TaskError, match=r"masked-lm is trained on texts.*data\.format: plain"):
        tiny.task(model=MODEL, data={"source": str(tmp_path / "chats.jsonl"), "limit": None})
    causal = tiny.task()
    causal.tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(TaskError, match="has no mask token"):
        tiny.task(model={**MODEL, "tokenizer": str(tmp_path / "tokenizer")})
