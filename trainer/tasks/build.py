"""From a recipe to a task: the LightningModule, its data, its tokenizer, and the facts a plan needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from ...own_code import is_code
from ..data.cache import cache_root
from ..data.custom import call_code
from ..data.errors import TaskError, unknown
from ..data.images import build_image_model
from ..data.labels import class_weights, labels_of
from ..data.mixture import Mixture
from ..data.preferences import TASKS as PREFERENCE_TASKS
from ..data.preferences import prepare_preferences
from ..data.prepare import Prepared, prepare
from ..data.receipt import Receipt as Receipt
from ..data.receipt import receipt
from ..data.seq2seq import prepare_pairs
from ..data.tokenizers import framing, keep_tokenizer, kept_tokenizer, tokenizer_key
from .classify import Classifier
from .frozen import frozen_base, places
from .labelled_tokens import MaskedLM, Seq2SeqLM
from .language import CausalLM
from .lora import add_adapter
from .models import build_image_form, build_model, show_weights_of
from .module import TaskModule
from .own_code_checks import give_optimizer, makes_optimizer
from .preference import PairwisePreference, SinglePreference
from .problems import Problem, problem_of
from .quantized import weights_in
from .reference import CachedReference
from .rewards import RewardModel
from .tagging import Tagger
from .weight_dtypes import Kept, kept_in

if TYPE_CHECKING:
    from ...recipes import Recipe
    from ..checkpoint.base import FrozenBase


@dataclass(frozen=True)
class Task:
    """The model and the data that a run trains on.

    module: the LightningModule. train, validation: map-style data sets whose samples are dicts of tensors (None where
    a user's datamodule brings its own loaders; validation also where none is held out). collate: samples -> batch.
    tokenizer: of text tasks. facts: counts and names, see `build_task`. unit: what throughput is counted in.
    datamodule: plain loaders over the data sets, or the user's own. prepared: the data, to build another module for.
    model_seconds: building the module took.
    """

    module: pl.LightningModule
    train: Dataset[Any] | None
    validation: Dataset[Any] | None
    collate: Callable[..., Any] | None
    tokenizer: Any
    facts: dict[str, Any]
    unit: Literal["tokens", "samples"]
    datamodule: pl.LightningDataModule | None = None
    prepared: Prepared | None = None
    model_seconds: float = 0.0

    @property
    def tokenizer_key(self) -> str:
        """What the tokenizer does, as one word: another one has another."""
        return tokenizer_key(self.tokenizer)

    @property
    def details(self) -> dict[str, Any]:
        """What the last validation has found beside its metrics: the table of classes, the confusion matrix."""
        return dict(self.module.details) if isinstance(self.module, TaskModule) else {}

    def receipt(self) -> Receipt | None:
        """What is about to be learnt, from what is known already; None where a user's datamodule holds the data."""
        return None if self.prepared is None or self.train is None else receipt(self.prepared, duplicates=False)

    def keep_tokenizer(self, run_dir: Path) -> None:
        """Keep it with the run, whose weights are trained for it. Nothing where the task has none."""
        if self.tokenizer is not None:
            keep_tokenizer(self.tokenizer, run_dir)


@dataclass(frozen=True)
class Room:
    """Where weights are kept on disk: for later starts, and until they are cut; and the run's folder."""

    cache: Path
    run: Path
    passing: Path | None = None


class TaskData(pl.LightningDataModule):
    """Plain loaders over a task's data sets, for `pl.Trainer`: shuffled for training, in order for validation.

    micro_batch_size: samples per rank and forward. workers: loader processes.
    """

    def __init__(self, task: Task, micro_batch_size: int, workers: int = 0) -> None:
        super().__init__()
        self.task, self.micro_batch_size, self.workers = task, micro_batch_size, workers

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training set in a new random order each epoch."""
        return self._loader(self.task.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches of the validation set in order; no loader where there is none."""
        return [] if self.task.validation is None else self._loader(self.task.validation, shuffle=False)

    def _loader(self, data: Any, *, shuffle: bool) -> DataLoader[Any]:
        order = data.order if shuffle and isinstance(data, Mixture) else None
        return DataLoader(
            data,
            batch_size=self.micro_batch_size,
            shuffle=shuffle and order is None,
            sampler=order,
            collate_fn=self.task.collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )


def build_task(
    recipe: Recipe, *, workdir: Path, precision: str = "fp32", prepared: Prepared | None = None, cuts: bool = False
) -> Task:
    """Build the model and the data of a recipe, the same on every rank.

    workdir: a run that has trained there keeps its tokenizer; its `.cache` holds tokenized data and trained tokenizers,
    unless `SHOESTRING_HOME` is set. Any number of processes may call this at once. precision: what is computed in, on
    which it depends what weights are kept in (`weight_dtypes`). prepared: the data of a task of the same recipe, which
    is not read again. cuts: each rank is to keep a part of every weight: until then the weights of text models lie in
    files of `workdir`, and the module's `passing` says in which folder.

    Initial weights are drawn from `recipe.seed`; the caller's random numbers are left as they were. `Task.facts` has
    `model_type, parameters, trainable, train_samples`, and where they apply `validation_samples, vocab_size,
    train_tokens, validation_tokens, classes, baselines`. Raises `TaskError`.
    """
    kind = recipe.model.task
    if not is_code(kind) and kind not in MODULES:
        raise unknown("model.task", kind, [*MODULES, "module:attr"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # not torch.manual_seed: that reseeds the GPUs, too
        data = prepared or _prepared(recipe, workdir)
        room = Room(cache_root(workdir), workdir, workdir / ".passing" if cuts else None)
        task = _build(recipe, data, kept_in(recipe.model, precision), room)
    counts = {
        "parameters": weights_in(task.module),
        "trainable": sum(p.numel() for p in task.module.parameters() if p.requires_grad),
    }
    task = replace(task, facts={**task.facts, **counts})
    if task.datamodule is not None or task.train is None:
        return task
    micro = recipe.data.micro_batch_size
    size = micro if isinstance(micro, int) else recipe.data.batch_size
    return replace(task, datamodule=TaskData(task, size, recipe.data.workers))


def data_receipt(recipe: Recipe, *, workdir: Path) -> Receipt:
    """The receipt of a recipe's data, which is prepared as for a run; no model is built. Raises `TaskError`."""
    data = _prepared(recipe, workdir)
    if data.train is None:
        raise TaskError(f"data.source: {recipe.data.source} gave a datamodule of its own, which is not looked into.")
    return receipt(data)


def _prepared(recipe: Recipe, workdir: Path) -> Prepared:
    makers = {**dict.fromkeys(PREFERENCE_TASKS, prepare_preferences), "seq2seq": prepare_pairs}
    make = makers.get(recipe.model.task, prepare)
    return make(recipe, cache_root(workdir), kept_tokenizer(workdir))


def _build(recipe: Recipe, data: Prepared, kept: Kept, room: Room) -> Task:
    kind, began = recipe.model.task, monotonic()
    module, facts = (_own if is_code(kind) else MODULES[kind])(recipe, data, kept, room)
    facts = {**data.facts, **facts}
    validates = type(module).validation_step is not pl.LightningModule.validation_step
    held = data.validation if validates else None  # a user's module need not look at it
    seconds = monotonic() - began
    return Task(
        module, data.train, held, data.collate, data.tokenizer, facts, data.unit, data.datamodule, data, seconds
    )  # fmt: skip


def _language(recipe: Recipe, data: Prepared, kept: Kept, room: Room) -> tuple[pl.LightningModule, dict[str, Any]]:
    model, base = _hub_model(recipe, data, kept, room)
    opening = [] if data.tokenizer is None else framing(data.tokenizer, packed=recipe.data.pack)[0]
    module = CausalLM(
        model, recipe.optimizer, isolated=data.isolated, opening=tuple(opening), chunked_loss=recipe.model.chunked_loss
    )
    return _beside(module, base, room)


def _labelled(recipe: Recipe, data: Prepared, kept: Kept, room: Room) -> tuple[pl.LightningModule, dict[str, Any]]:
    model, base = _hub_model(recipe, data, kept, room)
    make = Seq2SeqLM if recipe.model.task == "seq2seq" else MaskedLM
    return _beside(make(model, recipe.optimizer), base, room)


def _sequences(recipe: Recipe, data: Prepared, kept: Kept, room: Room) -> tuple[pl.LightningModule, dict[str, Any]]:
    problem = _problem(recipe, data)
    model, base = _hub_model(recipe, data, kept, room)
    return _beside(Classifier(model, recipe.optimizer, problem), base, room)


def _words(recipe: Recipe, data: Prepared, kept: Kept, room: Room) -> tuple[pl.LightningModule, dict[str, Any]]:
    model, base = _hub_model(recipe, data, kept, room)
    return _beside(Tagger(model, recipe.optimizer, data.classes or ()), base, room)


def _beside(module: TaskModule, base: FrozenBase | None, room: Room) -> tuple[pl.LightningModule, dict[str, Any]]:
    """The module of a Hugging Face model, told of the base that need not be saved and of where weights lie."""
    module.frozen_base, module.passing = base, room.passing
    model: Any = module.model
    return module, {"model_type": model.config.model_type}


def _preferences(recipe: Recipe, data: Prepared, kept: Kept, room: Room) -> tuple[pl.LightningModule, dict[str, Any]]:
    model, base = _hub_model(recipe, data, kept, room)
    section = recipe.model.preferences
    cached = None
    if section.kind.reference and recipe.model.adapter is None:
        sets = {"train": data.train, "validation": data.validation}
        held = {name: each for name, each in sets.items() if each is not None}
        cached = CachedReference(held, room.run, f"{data.facts['data_digest']} {tokenizer_key(data.tokenizer)}")
    make = PairwisePreference if section.kind.pairs else SinglePreference
    module = make(
        model, recipe.optimizer, section, reference=cached, pad=data.tokenizer.pad_token_id,
        opening=tuple(framing(data.tokenizer, packed=False)[0]), chunked_loss=recipe.model.chunked_loss,
    )  # fmt: skip
    return _beside(module, base, room)


def _rewards(recipe: Recipe, data: Prepared, kept: Kept, room: Room) -> tuple[pl.LightningModule, dict[str, Any]]:
    model, base = _hub_model(recipe, replace(data, classes=["reward"]), kept, room)
    return _beside(RewardModel(model, recipe.optimizer), base, room)


def _images(recipe: Recipe, data: Prepared, kept: Kept, room: Room) -> tuple[pl.LightningModule, dict[str, Any]]:
    problem, shape = _problem(recipe, data), tuple(data.train[0]["pixel_values"].shape)
    config = dict(recipe.model.config or {})
    if "kind" in config:
        model = build_image_model(config, shape, len(data.classes or ()))
        return Classifier(model, recipe.optimizer, problem), {"model_type": config["kind"]}
    form: Any = build_image_form(recipe.model, shape, data.classes or ())
    return _beside(Classifier(form, recipe.optimizer, problem), None, Room(room.cache, room.run))


def _own(recipe: Recipe, data: Prepared, kept: Kept, room: Room) -> tuple[pl.LightningModule, dict[str, Any]]:
    module = call_code(recipe.model.task, recipe.model.args, "model.task")
    if not isinstance(module, pl.LightningModule):
        raise TaskError(f"model.task: {recipe.model.task} returned a {type(module).__name__}, not a LightningModule.")
    if not makes_optimizer(module):
        give_optimizer(module, recipe.optimizer)
    return module, {"model_type": type(module).__name__}


MODULES: dict[str, Callable[..., tuple[pl.LightningModule, dict[str, Any]]]] = {
    "causal-lm": _language,
    "masked-lm": _labelled,
    "seq2seq": _labelled,
    "sequence-classification": _sequences,
    "token-classification": _words,
    "image-classification": _images,
    "preference": _preferences,
    "reward-model": _rewards,
}


def _problem(recipe: Recipe, data: Prepared) -> Problem:
    kind, wanted = recipe.model.problem, recipe.model.class_weights
    if data.classes is None and kind != "regression":
        raise TaskError("data.source: classification needs (train, validation) data sets, not a datamodule.")
    weights = None if wanted is None else class_weights(wanted, labels_of(data.train), data.classes or ())
    return problem_of(kind, data.classes, weights)


def _hub_model(recipe: Recipe, data: Prepared, kept: Kept, room: Room) -> tuple[Any, FrozenBase | None]:
    """The Hugging Face model of a text task, with its adapter, and what need not be saved of it."""
    model: Any = build_model(
        recipe.model, recipe.model.form, tokenizer=data.tokenizer, sequence_length=recipe.data.sequence_length,
        classes=data.classes, kept=kept, cache=room.cache, passing=room.passing,
    )  # fmt: skip
    if recipe.model.adapter is None:
        return model, None
    before = places(model)
    read = partial(show_weights_of, recipe.model, recipe.model.form, classes=data.classes, kept=kept)
    adapted = add_adapter(model, recipe.model.adapter, recipe.model.form, read)
    return adapted, frozen_base(recipe, adapted, before)
