"""Sources and targets: as transformers collates them, learnt, measured exactly, resumed to the bit, and left with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapted import Crash
from toy import Exploded

from shoestring.recipes import RecipeError, recipe_from
from shoestring.trainer import fit, plan
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.data.receipt import receipt
from shoestring.trainer.export.generation import Sampling, open_text_model
from shoestring.trainer.export.quality import quality
from shoestring.trainer.export.runtimes import eager
from shoestring.trainer.export.trained import open_run
from shoestring.trainer.export.write import export
from shoestring.trainer.planning.sizes import size_of
from shoestring.trainer.tasks import build_task

pytestmark = pytest.mark.filterwarnings("ignore")
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
BART = {"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_position_embeddings": 64}  # fmt: skip
WORDS = ["one", "two", "three", "four", "five", "six"]
GREEDY = Sampling(max_tokens=12, temperature=0)


def rows(count: int) -> list[dict[str, Any]]:
    """What is prompts names what is answered, in one or two words."""
    prompts = [f"{WORDS[i % 6]} {'and ' * (i % 4)}{i}" for i in range(count)]
    return [{"prompt": text, "completion": " ".join([WORDS[i % 6]] * (i % 2 + 1))} for i, text in enumerate(prompts)]


def recipe(folder: Path, given: list[dict[str, Any]] | None = None, **sections: Any) -> Any:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(96) if given is None else given)))
    values: dict[str, Any] = {
        "model": {"task": "seq2seq", "config": T5, "tokenizer": {"train": "bpe", "vocab_size": 300}},
        "data": {"source": str(folder / "rows.jsonl"), "sequence_length": 16, "batch_size": 8, "validation": 0.1},
        "budget": {"steps": 120}, "optimizer": {"lr": 1e-2}, "strategy": {"name": "single"},
        "tracking": {"ledger": False},
    }  # fmt: skip
    for name, changes in sections.items():
        values[name] = {key: value for key, value in {**values.get(name, {}), **changes}.items() if value is not None}
    return recipe_from(values, "pairs")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("pairs")
    evaluated = {"every": "40 steps"}
    report = fit(
        plan(recipe(home, evaluation=evaluated, checkpoint={"best": "max val_accuracy"})), run_dir=home / "run"
    )
    assert report is not None
    (home / "metrics.json").write_text(json.dumps(report.summary["metrics"]))
    return home / "run"


@pytest.mark.parametrize("shape", [T5, BART], ids=["t5", "bart"])
def test_samples_are_what_transformers_makes_of_them(tmp_path: Path, shape: dict[str, Any]) -> None:
    """With padding that is the end-of-text token, and rows that are cut, too."""
    given = [*rows(12), {"prompt": "long " * 40, "completion": "longer " * 40}]
    own = build_task(recipe(tmp_path, given, data={"validation": 0.0}), workdir=tmp_path).tokenizer
    own.pad_token = own.eos_token
    own.save_pretrained(tmp_path / "tokenizer")
    config = {**shape, "decoder_start_token_id": 5}
    model = {"config": config, "tokenizer": str(tmp_path / "tokenizer")}
    task = build_task(recipe(tmp_path, given, model=model, data={"validation": 0.0}), workdir=tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    features = []
    for row in given:
        encoded = tokenizer(row["prompt"], text_target=row["completion"], truncation=True, max_length=16)
        features.append({"input_ids": encoded["input_ids"], "labels": encoded["labels"]})
    inner: Any = task.module.model
    theirs = transformers.DataCollatorForSeq2Seq(tokenizer, model=inner)(features)
    ours = task.collate([task.train[i] for i in range(len(given))])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and set(ours) == set(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    ends = [int(row[row != -100][-1]) for row in ours["labels"]]
    assert ends == [tokenizer.eos_token_id] * len(given), "no target ends untaught"
    assert task.train.target_counts.tolist() == [int((row != -100).sum()) for row in ours["labels"]]
    assert task.train.token_counts.tolist() == [len(f["input_ids"]) + len(f["labels"]) for f in features]
    assert task.facts["rows_cut"] == 1
    assert size_of(
        recipe(tmp_path, given, model={"config": {**shape, "vocab_size": len(tokenizer)}})
    ).parameters == sum(p.numel() for p in inner.parameters())


def test_targets_are_learnt_and_measured(run: Path) -> None:
    measured = json.loads((run.parent / "metrics.json").read_text())
    trained = open_run(run)
    worth = quality(eager(trained.model), trained)
    for ours, theirs in (("val_loss", "loss"), ("val_accuracy", "accuracy"), ("val_perplexity", "perplexity")):
        assert measured[ours] == pytest.approx(worth[theirs], rel=1e-4)
    assert measured["val_accuracy"] > 0.8, "nothing was learnt"
    task: Any = trained.task
    shown = receipt(task.prepared)
    assert shown.trained_tokens == int(task.train.target_counts.sum()) and shown.tokens == task.facts["train_tokens"]
    source, _, target = shown.shown[0]
    assert source == (rows(96)[0]["prompt"] + task.tokenizer.eos_token, False)
    assert target == (rows(96)[0]["completion"] + task.tokenizer.eos_token, True)
    summary = json.loads((run / "summary.json").read_text())
    drawn = summary["tokens"] / summary["samples"]
    assert drawn == pytest.approx(shown.tokens / shown.samples, rel=0.1), "sources and targets are counted"


def test_a_run_and_its_export_write_what_transformers_writes(run: Path, tmp_path: Path) -> None:
    made = export(open_run(run), "hf", out=tmp_path / "hf")
    assert made.error == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(made.path)
    ids = tokenizer("six and 2", return_tensors="pt")
    theirs = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    assert theirs == "six six", "it has learnt to write, and to stop"
    for name in (run, made.path):
        pieces: list[str] = []
        assert open_text_model(str(name)).complete("six and 2", GREEDY, pieces.append) == theirs == "".join(pieces)


def test_a_resumed_run_ends_alike(tmp_path: Path) -> None:
    given = recipe(
        tmp_path, budget={"steps": 6}, checkpoint={"every": "2 steps"}, evaluation={"at_end": False},
        model={"config": {**T5, "dropout_rate": 0.1}},
    )  # fmt: skip
    fit(plan(given), run_dir=tmp_path / "whole")
    with pytest.raises(Exploded):
        fit(plan(given), run_dir=tmp_path / "broken", callbacks=[Crash(5)])
    report = fit(plan(given), run_dir=tmp_path / "broken")
    assert report is not None and report.summary["resumed_from"] == 4
    whole, again = load_weights(tmp_path / "whole" / "final"), load_weights(tmp_path / "broken" / "final")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_adapters_beside_a_pretrained_base(run: Path, tmp_path: Path) -> None:
    export(open_run(run), "hf", out=tmp_path / "base")
    model = {"name": str(tmp_path / "base"), "config": None, "tokenizer": None, "adapter": {"rank": 2}, "dtype": "nf4"}
    for dtype, forms in (("auto", ("peft", "hf")), ("nf4", ("hf",))):
        given = recipe(tmp_path, model={**model, "dtype": dtype}, budget={"steps": 2})
        fit(plan(given), run_dir=tmp_path / dtype)
        trained = open_run(tmp_path / dtype)
        assert size_of(given).trainable == trained.task.facts["trainable"]
        for form in forms:
            assert export(trained, form, out=tmp_path / f"{dtype}-{form}").error < 1e-5
    settings = json.loads((tmp_path / "auto-peft" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_2_SEQ_LM"
    said = [open_text_model(str(tmp_path / name)).complete("six and 2", GREEDY, lambda text: None)
            for name in ("auto", "auto-peft", "auto-hf")]  # fmt: skip
    assert said[0].startswith("six") and len(set(said)) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2},
         r"row 1 is a chat of 4 messages; seq2seq takes one message of the user and the answer"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "row 1 has an empty"),
        ({"text": "a"}, "rows have the columns text; needed are messages; or conversations; or instruction and output"),
        ({"prompt": "a", "completion": " "}, "row 1 has an empty answer"),
    ],
)  # fmt: skip
def test_rows_that_are_no_pair_are_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError, match=said):
        build_task(recipe(tmp_path, [row] * 4), workdir=tmp_path)


def test_chats_of_one_exchange_and_instructions_are_pairs(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Two?"},
            {"role": "assistant", "content": "Yes."}]  # fmt: skip
    for given, source, target in (
        ({"messages": chat}, "Be short.\n\nTwo?", "Yes."),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n\n1 2", "3"),
        ({"question": "Why?", "answer": "<|pad|>"}, "Why?", "<|pad|>"),
    ):
        task = build_task(recipe(tmp_path, [given] * 4, data={"validation": 0.0}), workdir=tmp_path)
        sample = task.train[0]
        ends = task.tokenizer.eos_token
        assert task.tokenizer.decode(sample["input_ids"]) == source + ends
        assert task.tokenizer.decode(sample["labels"]) == target + ends
        assert task.tokenizer.pad_token_id not in sample["labels"], "a text that spells a special token is text"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"train_on": "all"}}, r"data\.train_on: found 'all'; allowed: answers for seq2seq"),
        ({"data": {"chat_template": "{{ messages }}"}}, r"data\.chat_template: .*null for seq2seq"),
        ({"data": {"source": "python-stdlib"}}, r"data\.source: .*for seq2seq: python-docstrings, or data of your own"),
        ({"model": {"chunked_loss": True}}, r"chunked_loss: found True; allowed: auto \| false for seq2seq"),
        ({"model": {"config": None, "tokenizer": None}}, "exactly one of name and config for seq2seq"),
        ({"evaluation": {"generate": "a"}}, r"evaluation\.generate: .*null for seq2seq"),
        ({"goal": {"metric": "val_f1", "above": 1}}, r"goal\.metric: .*val_loss \| val_perplexity \| val_accuracy"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(tmp_path, **sections)


def test_a_technique_that_cuts_sources_is_refused(tmp_path: Path) -> None:
    values = recipe(tmp_path).model_dump(exclude_unset=True)
    with pytest.raises(RecipeError, match=r"techniques\[0\].*no sequence_length_warmup for seq2seq"):
        recipe_from({**values, "techniques": ["sequence_length_warmup"]}, "pairs")
