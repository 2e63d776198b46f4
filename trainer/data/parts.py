"""The sources of a recipe: each loaded and split by itself, with what is said of how they are mixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import digest
from .corpora import Corpus, chained
from .labels import Kind
from .mixture import AnyTexts, Joined, Mixture
from .packing import Texts
from .sources import load_corpus
from .split import balance, split

if TYPE_CHECKING:
    from ...recipes import Recipe
    from .shapes import Shape


@dataclass(frozen=True)
class Parts:
    """What the sources of a recipe hold.

    names, weights, train: of each source. held: what is held out of each, or one that is a source of its own; may be
    empty.
    """

    names: list[str]
    weights: list[float]
    train: list[Corpus]
    held: list[Corpus]

    @property
    def whole(self) -> Corpus:
        """All that is trained on, each source once."""
        return chained(self.train)

    @property
    def facts(self) -> dict[str, Any]:
        """What the texts are, and which rows of them are left out, if any."""
        both = chained([*self.train, *self.held])
        held = chained(self.held).fingerprint if self.held else ""
        counts = {"rows_without_text": both.skipped, "rows_bad": dict(both.bad)}
        return {
            "data_digest": digest([self.whole.fingerprint, held]),  # equal exactly when texts are
            **{name: count for name, count in counts.items() if count},
        }


def load_parts(
    recipe: Recipe, cache: Path, *, labelled: bool, only: Mapping[str, Shape] | None = None,
    group: Callable[[str], str] | None = None, kind: Kind = "single-label",
) -> Parts:  # fmt: skip
    """Load what a recipe trains on and holds out. Raises `TaskError`.

    only: the shapes that rows may have. group: by what of a text it is held out. kind: what labels are.
    """
    data = recipe.data
    load = partial(load_corpus, cache=cache, labelled=labelled, only=only, kind=kind)
    names, weights, train, held = [], [], [], []
    for number, (weight, one) in enumerate(data.each()):
        key = f"data.sources[{number}].source" if data.sources else "data.source"
        source = str(one.source)
        corpus = load(one, source, _arguments(one), key=key)
        if group is not None and corpus.groups is None:
            corpus = replace(corpus, groups=[group(text) for text in corpus.texts])
        part = [corpus]
        if not isinstance(data.validation, str) and data.validation:
            part = list(split(corpus, data.validation, cache, by_label=kind == "single-label"))
        if labelled and source == "python-packages":
            part = [balance(each) for each in part]
        names.append(source)
        weights.append(weight)
        train.append(part[0])
        held += part[1:]
    if isinstance(data.validation, str):
        held = [load(data, data.validation, _arguments(data), key="data.validation")]
    return Parts(names, weights, train, held)


def joined(parts: Parts, recipe: Recipe, samples: Callable[[Corpus, bool], Texts]) -> tuple[AnyTexts, AnyTexts | None]:
    """Training and validation data. samples: a corpus, and whether no token of it may be lost -> its data set."""
    train = [samples(corpus, False) for corpus in parts.train]
    held = [samples(corpus, True) for corpus in parts.held]
    mixed = Mixture(train, parts.weights, recipe.seed) if len(train) > 1 else train[0]
    return mixed, Joined(held) if len(held) > 1 else held[0] if held else None


def sources_facts(parts: Parts, train: AnyTexts, recipe: Recipe) -> dict[str, Any]:
    """`sources`, where there are several: of each its samples, its share, and how often a run reads them all.

    `epochs` is that number; for a run whose budget does not say how many samples it draws, of one epoch of the mixture.
    """
    if not isinstance(train, Mixture):
        return {}
    drawn = _samples_of_run(recipe, len(train)) or len(train)
    order = train.order
    sources = [
        {
            "source": name,
            "weight": weight / sum(parts.weights),
            "samples": size,
            "epochs": round(draws / len(train) * drawn / size, 4),
        }
        for name, weight, size, draws in zip(parts.names, parts.weights, order.sizes, order.draws, strict=True)
    ]
    return {"sources": sources}


def _samples_of_run(recipe: Recipe, epoch: int) -> float | None:
    """Samples that the budget allows, as far as that is known before it runs."""
    budget = recipe.budget
    limits = [budget.samples]
    limits.append(None if budget.steps is None else budget.steps * recipe.data.batch_size)
    limits.append(None if budget.epochs is None else budget.epochs * epoch)
    return min((limit for limit in limits if limit is not None), default=None)


def _arguments(data: Any) -> dict[str, Any]:
    """Those of the reader: the one that packing takes is not its."""
    return {name: value for name, value in data.args.items() if name != "pack_isolation"}
