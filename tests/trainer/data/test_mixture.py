"""Samples that are drawn from several sources: by weight, the same for every number of ranks, resumed in place."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
from rich.console import Console

from shoestring.callbacks.sampling.global_batches import GlobalBatches
from shoestring.recipes import Recipe, RecipeError, load_recipe
from shoestring.trainer import Budget, Trainer
from shoestring.trainer.cli.receipt_display import show_receipt
from shoestring.trainer.data.mixture import Joined, Mixture, MixtureOrder, shares
from shoestring.trainer.data.packing import Packed
from shoestring.trainer.data.tokens import Blocks
from shoestring.trainer.run.receipt import receipt_of
from shoestring.trainer.tasks import build_task
from shoestring.trainer.tasks.build import TaskData

SIZES, WEIGHTS = [5000, 400], [0.9, 0.1]


def batches(world: int, position: int, count: int) -> list[list[int]]:
    """The global batches of 12 samples from a step on, put together from what each rank draws."""
    by_rank = []
    for rank in range(world):
        order = GlobalBatches(
            MixtureOrder(SIZES, WEIGHTS, seed=3), micro=12 // world // (2 if world < 4 else 1),
            accumulate=2 if world < 4 else 1, rank=rank, world=world, seed=3, position=lambda: position,
        )  # fmt: skip
        samples: list[int] = []
        for micro in order:
            samples += micro
            if len(samples) == count * 12 // world:
                break
        by_rank.append(np.array(samples).reshape(count, -1))
    return [sorted(batch.tolist()) for batch in np.concatenate(by_rank, axis=1)]


def test_shares_are_drawn_and_each_source_is_read_through_before_it_comes_again() -> None:
    order = MixtureOrder(SIZES, WEIGHTS, seed=1)
    stream = np.concatenate([order.of_epoch(epoch) for epoch in range(4)])
    small = stream >= SIZES[0]
    for count in (100, 1000, 5400, len(stream)):
        spread = math.sqrt(count * 0.9 * 0.1)
        assert abs(small[:count].sum() - 0.1 * count) < 2.576 * spread + 1, "the binomial interval of 99 %"
    for drawn, size in ((stream[~small], SIZES[0]), (stream[small] - SIZES[0], SIZES[1])):
        passes = [drawn[at : at + size] for at in range(0, len(drawn), size)]
        assert all(len(set(each.tolist())) == len(each) for each in passes), "none twice within a pass"
        assert len(passes) > 3 and not np.array_equal(passes[0], passes[1]), "shuffled anew"
    again = MixtureOrder(SIZES, WEIGHTS, seed=1)
    assert np.array_equal(again.of_epoch(3), order.of_epoch(3)), "without the epochs before"
    assert not np.array_equal(MixtureOrder(SIZES, WEIGHTS, seed=2).of_epoch(0), order.of_epoch(0))
    assert shares(10, [1, 1, 1]) == [4, 3, 3] and shares(7, [1e-9, 1]) == [0, 7]


@pytest.mark.parametrize("position", [0, 7, 449, 1203])
def test_every_number_of_ranks_draws_the_same_from_any_step_on(position: int) -> None:
    count = min(4, 450 - position % 450)  # an epoch is 450 steps
    alone = batches(1, position, count)
    assert batches(2, position, count) == batches(4, position, count) == alone
    if count > 1:
        assert batches(1, position + 1, count - 1) == alone[1:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    chats = [{"ask": f"What is {n}?", "reply": f"It is {n}."} for n in range(60)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "texts.csv").write_text("body\n" + "".join(f"text number {n} says so\n" for n in range(400)))
    return folder


def recipe(folder: Path, *changes: str) -> Recipe:
    sources = (
        f"[{{source: {folder}/texts.csv, weight: 3, text_column: body}}, "
        f"{{source: {folder}/chats.jsonl, format: question-answer, columns: {{question: ask, answer: reply}}}}]"
    )
    return load_recipe(
        "quickstart",
        [
            "data.source=null", f"data.sources={sources}", "data.sequence_length=48", "data.batch_size=8",
            "data.micro_batch_size=auto", "data.limit=null", "budget={steps: 100}",
            "model.tokenizer={train: bpe, vocab_size: 300}",
            "model.config={model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
            "num_attention_heads: 2, num_key_value_heads: 2}", *changes,
        ],
    )  # fmt: skip


def test_sources_of_different_kinds_are_one_data_set_and_the_receipt_says_how_often_each_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt = receipt_of(recipe(folder, "data.validation=0.1"), folder / "run")
    texts, chats = receipt.sources
    assert (texts["weight"], chats["weight"]) == (0.75, 0.25)
    assert texts["samples"] + chats["samples"] == receipt.samples and receipt.validation_samples > 4
    drawn = [800 * each["weight"] / each["samples"] for each in (texts, chats)]  # 100 steps of 8
    assert [texts["epochs"], chats["epochs"]] == pytest.approx(drawn, rel=0.01)
    show_receipt(receipt.as_dict(), Console(width=200))
    assert f"25.0% from {folder}/chats.jsonl" in capsys.readouterr().out
    task = build_task(recipe(folder, "data.validation=0.1"), workdir=folder / "run")
    assert isinstance(task.train, Mixture) and isinstance(task.validation, Joined)
    assert [type(part) for part in task.train.parts] == [Blocks, Packed]
    assert task.facts["baselines"]["unigram"] > 0 and "trained_tokens" in task.facts


class Seen(pl.Callback):
    """Keeps the samples of each step; breaks off at a step."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at = dies_at
        self.steps: dict[int, list[list[int]]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: object, batch: dict, batch_idx: int) -> None:
        if trainer.global_step == self.dies_at:
            raise RuntimeError("broken off")
        self.steps.setdefault(trainer.global_step, []).extend(batch["input_ids"].tolist())


@pytest.mark.filterwarnings("ignore:.*ended before the epoch ended.*")
def test_a_run_that_breaks_off_goes_on_with_the_very_samples(folder: Path) -> None:
    task = build_task(recipe(folder, "data.validation=0", "data.pack=false"), workdir=folder / "run")

    def run(name: str, seen: Seen) -> dict[int, list[list[int]]]:
        trainer = Trainer(
            Budget(steps=70), [], run_dir=folder / name, callbacks=[seen], strategy="single", accelerator="cpu",
            checkpoint_every="20 steps", limit_val_batches=0, ledger=False, enable_progress_bar=False, log_every=1000,
        )  # fmt: skip
        trainer.fit(task.module, datamodule=TaskData(task, 8))
        return seen.steps

    whole = run("whole", Seen())
    first, second = Seen(dies_at=47), Seen()
    with pytest.raises(RuntimeError, match="broken off"):
        run("broken", first)
    run("broken", second)
    assert len(whole) == 70 and min(second.steps) == 40, "from the last checkpoint on"
    assert {**first.steps, **second.steps} == whole
    lengths = [len(row) for rows in whole.values() for row in rows]
    assert len(Counter(lengths)) > 1, "of both sources"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.source=a.txt"], r"data\.sources: .*exactly one of source and sources"),
        (["data.sources=[]"], r"data\.source: found nothing"),
        (["data.sources=[{source: a.txt, wieght: 2}]"], r"data\.sources\[0\]\.wieght: .*did you mean weight"),
        (["data.sources=[{source: a.txt, weight: 0}]"], r"data\.sources\[0\]\.weight: .*a number above 0"),
        (["data.sources=[{source: a.txt}, {source: digits}]"], r"data\.sources\[1\]\.source: .*images and code"),
        (["data.sources=[{source: 'a:b'}]"], r"data\.sources\[0\]\.source: .*images and code"),
        (
            ["data.sources=[{source: a/b, args: {trust_remote_code: true}}]"],
            r"data\.sources\[0\]\.args\.trust_remote_code: .*true only with --allow-code",
        ),
    ],
)
def test_what_sources_cannot_be_is_said(folder: Path, changes: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(folder, *changes)
