"""What the tests of tasks and of their data share: a tiny recipe that is real in every part, and short runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from shoestring.recipes import Recipe, recipe_from
from shoestring.trainer.data.corpora import of_texts
from shoestring.trainer.data.token_store import TokenStore, store_tokens
from shoestring.trainer.tasks import Task, build_task

THIRD_PARTY = (  # Lightning's advice about small runs
    "ignore:.*does not have many workers.*",
    "ignore:.*isinstance.treespec, LeafSpec.*",
    "ignore:.*but have no `validation_step`.*",
)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Tiny:
    """Recipes, tasks and runs of a small causal model on a few files of the standard library."""

    llama = LLAMA

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir

    def recipe(self, **sections: dict[str, Any]) -> Recipe:
        """The recipe, its sections replaced key by key; None takes a key away."""
        values: dict[str, Any] = {
            "model": {"task": "causal-lm", "config": LLAMA, "tokenizer": {"train": "bpe", "vocab_size": 384}},
            "data": {"source": "python-stdlib", "limit": 24, "sequence_length": 64, "batch_size": 8, "validation": 0.1},
            "budget": {"steps": 10},
            "optimizer": {"lr": 1e-2},
        }
        for name, changes in sections.items():
            merged = {**values.get(name, {}), **changes}
            values[name] = {key: value for key, value in merged.items() if value is not None}
        return recipe_from(values)

    def task(self, precision: str = "fp32", **sections: dict[str, Any]) -> Task:
        """The task of `recipe`."""
        return build_task(self.recipe(**sections), workdir=self.workdir, precision=precision)

    def fit(self, task: Task, steps: int) -> None:
        """Train a task for some optimizer steps, without validation, the same in every process."""
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_steps=steps,
            enable_checkpointing=False,
            default_root_dir=self.workdir,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            **QUIET,
        )
        trainer.fit(task.module, task.datamodule)

    def validate(self, task: Task) -> dict[str, float]:
        """The metrics of one validation run."""
        trainer = pl.Trainer(default_root_dir=self.workdir, **QUIET)
        return dict(trainer.validate(task.module, task.datamodule, verbose=False)[0])

    def bytes(self, texts: list[str]) -> TokenStore:
        """Texts as bytes, each opened by a 0: tokens that can be read off."""

        def encode(rows: list[str]) -> list[list[int]]:
            return [[0, *row.encode()] for row in rows]

        return store_tokens(of_texts(texts), encode, key="bytes", vocabulary=256, cache=self.workdir)


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """Shared helpers, writing to this test's folder."""
    return Tiny(tmp_path)


@pytest.fixture(autouse=True, scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all of these tests: what one tokenized, another finds."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def use_home(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Point the cache there."""
    monkeypatch.setenv("SHOESTRING_HOME", str(shared_home))
    yield


def allow_warnings(items: list[pytest.Item], folder: Path) -> None:
    """Third-party warnings are let through in this folder only."""
    for item in items:
        if folder in item.path.parents:
            for rule in THIRD_PARTY:
                item.add_marker(pytest.mark.filterwarnings(rule))
