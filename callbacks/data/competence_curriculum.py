"""Competence-based curriculum: easy samples first, all samples once the model is competent (arXiv 1903.09848)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pytorch_lightning as pl
import torch

from ..accounting.clock import Duration, clock_of
from ..contract import Card, IncompatibleTechniques, Technique, derive_seed, require
from ..sampling.samples import install_sampler, training_loader
from ..sampling.seeding import seeded

Difficulty = str | Sequence[float] | Callable[[Any], float]


def competence(ramp: float, start: float) -> float:
    """Share of the data, easiest first, that may be drawn: c(t) = min(1, sqrt(t (1 - c0^2) / T + c0^2))."""
    return min(1.0, math.sqrt(ramp * (1.0 - start**2) + start**2))


def sample_tokens(sample: Any) -> Sequence[Any]:
    """The tokens of a sample, for text scores: its `input_ids`, else its first tensor's rounded values."""
    if isinstance(sample, dict):
        sample = sample.get("input_ids", next(iter(sample.values())))
    if isinstance(sample, tuple | list) and len(sample) and isinstance(sample[0], torch.Tensor):
        sample = sample[0]
    values = sample.reshape(-1) if isinstance(sample, torch.Tensor) else torch.as_tensor(sample).reshape(-1)
    return (values if not values.is_floating_point() else (values * 16).round().long()).tolist()


def score(dataset: Any, difficulty: Difficulty) -> np.ndarray:
    """Difficulty of every sample, [N]. "length": tokens; "rarity": mean -log p(token) under the data's unigrams."""
    if callable(difficulty):
        return np.array([difficulty(dataset[i]) for i in range(len(dataset))], dtype=np.float64)
    if not isinstance(difficulty, str):
        scores = np.asarray(difficulty, dtype=np.float64)
        if scores.shape != (len(dataset),):
            raise IncompatibleTechniques(
                f"difficulty has shape {scores.shape}, and the data has {len(dataset)} samples"
            )
        return scores
    tokens = [sample_tokens(dataset[i]) for i in range(len(dataset))]
    if difficulty == "length":
        return np.array([len(t) for t in tokens], dtype=np.float64)
    counts = Counter(t for sample in tokens for t in sample)
    total = sum(counts.values())
    cost = {t: -math.log(n / total) for t, n in counts.items()}
    return np.array([sum(cost[t] for t in sample) / max(1, len(sample)) for sample in tokens])


@dataclass(kw_only=True, eq=False, repr=False)
class CompetenceCurriculum(Technique, pl.Callback):
    """Draw each global batch from the easiest share of the data; the share grows from `start` to 1 over `until`.

    Batch k is a pure function of (seed, k, progress at k), so it does not depend on the number of ranks and resumes
    exactly. Once everything may be drawn, the loader's own order is used.

    Source: arXiv 1903.09848.

    Args:
        difficulty: "rarity" (mean -log p(token) under the data's unigrams), "length" (tokens), one number a sample [N],
            or a function from a sample to a number.
        start: Share of the data, easiest first, that the first batches come from, in (0, 1]; 1 is off.
        until: Duration after which all of the data is drawn from; any unit but tokens.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import CompetenceCurriculum
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[CompetenceCurriculum(difficulty="length", until="40%")])
        >>> round(competence(0.5, start=0.1), 3)  # share of the data, half-way to `until`
        0.711
    """

    card = Card(
        name="competence_curriculum",
        does="draws easy samples first and all samples once competent",
        paper="1903.09848",
        saves={"steps"},
        writes={"samples"},
    )

    difficulty: Difficulty = "rarity"
    start: float = 0.1
    until: str = "50%"

    def check(self) -> None:
        require(0 < self.start <= 1, self, "start", "a share in (0, 1]")
        legal = not isinstance(self.difficulty, str) or self.difficulty in ("rarity", "length")
        require(legal, self, "difficulty", "rarity | length | numbers | a function")
        ahead = Duration.parse(self.until).counts != "tokens"  # samples are chosen before their tokens are counted
        require(ahead, self, "until", "steps, samples, epochs, percent or a unit of the budget, not tokens")

    @classmethod
    def example(cls) -> Self:
        return cls(start=0.2, until="80%")

    @classmethod
    def noop(cls) -> Self:
        return cls(start=1.0)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.start >= 1.0:
            return
        self._seed = getattr(trainer, "seed", 0)
        batches = install_sampler(trainer, self._seed)
        if batches is None:
            raise IncompatibleTechniques("competence_curriculum needs one map-style DataLoader to choose samples from")
        loader = training_loader(trainer)
        self._until = until = Duration.parse(self.until)
        if until.counts == "samples":
            self._until = Duration(until.amount / batches.global_batch, "steps")
        # batches are drawn ahead by the workers and by Lightning: at most so many steps
        self._ahead = loader.num_workers * (loader.prefetch_factor or 0) + 2
        with seeded(derive_seed(self._seed, self.card.name)):  # random datasets score alike on all ranks
            self._easiest = np.argsort(score(loader.dataset, self.difficulty), kind="stable")
        self._trainer = trainer
        batches.select = self._select

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer = None

    def _select(self, epoch: int, step: int, run_step: int, chosen: Sequence[int]) -> Sequence[int]:
        clock = clock_of(self._trainer)
        share = competence(clock.toward(self._until, run_step, run_step - self._ahead), self.start)
        if share >= 1.0:
            return chosen
        pool = self._easiest[: max(len(chosen), int(share * len(self._easiest)))]
        draw = np.random.default_rng(derive_seed(self._seed, self.card.name, run_step))
        return pool[draw.permutation(len(pool))[: len(chosen)]].tolist()
