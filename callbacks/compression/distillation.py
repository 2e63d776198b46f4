"""Distillation: a student learns from a frozen teacher's outputs as well as from labels (arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ..contract import Card, Effect, Technique, Workload, require
from ..forward.blocks import blocks, hidden_of, recorded
from ..forward.model_calls import Call, NoLogits, calls_of, logits_of, model_name
from ..forward.training_step import Step, add_auxiliary_loss, remove_from_step
from . import distillation_losses as losses
from .logit_cache import LogitCache
from .target_positions import TargetPositions, cache_keys, target_positions
from .teachers import DTYPES, NoTeacher, Teacher, check_outputs, fingerprint, frozen_copy, load


@dataclass(kw_only=True, eq=False, repr=False)
class Distillation(Technique, pl.Callback):
    """Learn from a frozen teacher too: add `weight` * T^2 * KL(teacher || student) to the module's own loss.

    The teacher runs in evaluation mode on the very inputs the student got, and is in no state_dict, optimizer or engine
    of the student's. Cached logits are looked up by the content of a sample, never by its number, so crops, dropped
    tokens and growing lengths are safe; a sample keeps the logits of the batch in which it was first seen, and rounding
    is the same whether they were just computed or read.

    Source: arXiv 1503.02531.

    Args:
        teacher: "initial", the student as it is when the fit begins; a folder or hub name of a Hugging Face model; in
            Python also any nn.Module that takes the student's inputs.
        weight: Of the divergence between the outputs; 0 leaves it out.
        labels: How many times the module's own loss counts.
        temperature: T, by which the logits of both are divided.
        hidden: Weight of matching block outputs (mean squared error, or batch similarities where widths differ, arXiv
            1907.09682).
        attention: Weight of matching attention maps (arXiv 1612.03928, 2002.10957; of transformers with eager attention
            only).
        layers: Student block -> teacher block, numbered from 0; by default spread evenly.
        of: Dotted name of the submodule that returns logits [B, T, V] or [B, C]; by default `model`, the
            LightningModule's own `forward`, or its only child.
        shift: As in causal models: a position predicts the next label. Positions that predict a label count.
        top_k: Keep the teacher's likeliest classes and take the others together; None keeps all.
        cache: A folder for the teacher's logits as float16; None computes them anew.
        teacher_dtype: In which the teacher is kept: float32 | bfloat16 | float16.
        shard_teacher: Give the teacher a ZeRO-3 engine of its own, so each rank holds a part of it.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import Distillation
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[Distillation(teacher="gpt2-large", weight=0.5, labels=0.5)])
    """

    # that "modules" is not read lets the techniques that change them act after "initial" was copied
    card = Card(
        name="distillation",
        does="learns from the outputs of a frozen teacher as well as from labels",
        paper="1503.02531",
        saves={"size"},
        writes={"loss"},
    )

    teacher: str | nn.Module = "initial"
    weight: float = 1.0
    labels: float = 1.0
    temperature: float = 2.0
    hidden: float = 0.0
    attention: float = 0.0
    layers: Mapping[int, int] | None = None
    of: str = ""
    shift: bool = True
    top_k: int | None = None
    cache: str | None = None
    teacher_dtype: str = "bfloat16"
    shard_teacher: bool = False

    def check(self) -> None:
        given = callable(self.teacher) or bool(self.teacher)  # as a module is
        require(given, self, "teacher", "initial | a folder | a hub name | in Python a module")
        for name in ("weight", "hidden", "attention", "labels"):
            require(getattr(self, name) >= 0, self, name, "a number of at least 0")
        require(self.temperature > 0, self, "temperature", "a positive number")
        require(self.top_k is None or self.top_k > 0, self, "top_k", "a positive number of classes, or null for all")
        require(self.teacher_dtype in DTYPES, self, "teacher_dtype", " | ".join(DTYPES))
        logits_only = not (self.hidden or self.attention)
        require(self.cache is None or logits_only, self, "cache", "null: hidden states and attention are not cached")
        # where one rank finds its samples and another does not, they would wait for each other for ever
        require(self.cache is None or not self.shard_teacher, self, "cache", "null, or shard_teacher=False")

    @property
    def _acts(self) -> bool:
        return bool(self.weight or self.hidden or self.attention or self.labels != 1)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.teacher_dtype)

    def predict(self, workload: Workload) -> Effect:
        """Predict for a teacher as large as the student: its forward, and its weights beside 16 bytes a parameter."""
        if not self._acts:
            return Effect()
        held = DTYPES[self.teacher_dtype] / (workload.world_size if self.shard_teacher else 1)
        return Effect(flops=4 / 3, states=1 + held / 16)

    @classmethod
    def example(cls) -> Self:
        return cls(weight=0.5, teacher_dtype="float32")

    @classmethod
    def noop(cls) -> Self:
        return cls(weight=0.0)

    # -- hooks ------------------------------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before checkpoints are read and engines made: "initial" is what the user's code has built."""
        if stage != "fit" or not self._acts:
            return
        self._began_with: str | None = None
        if any(True for _ in pl_module.parameters()):
            self._prepare(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Modules that build their layers in `configure_model`, cut by ZeRO-3 as they are made, have weights by now."""
        if self._acts and not hasattr(self, "_teacher"):
            self._prepare(pl_module)

    def _prepare(self, pl_module: pl.LightningModule) -> None:
        self._of = model_name(pl_module, self.of, self.card.name)
        self._teacher = Teacher(self._frozen(pl_module.get_submodule(self._of)), self._dtype)
        if self.weight:
            check_outputs(pl_module.get_submodule(self._of), self._teacher.module)
        kept = self.teacher == "initial" or self.cache is not None
        self._teacher_is = fingerprint(self._teacher.module, self.temperature, self.top_k) if kept else None
        self._cache = None if self.cache is None else LogitCache(Path(self.cache) / str(self._teacher_is))

    def _frozen(self, student: nn.Module) -> nn.Module:
        dtype = self._dtype
        if isinstance(self.teacher, nn.Module):
            return frozen_copy(self.teacher, dtype, apart=self.shard_teacher)  # an engine takes its weights apart
        if self.teacher != "initial":
            return load(self.teacher, dtype)
        return frozen_copy(student, dtype, apart=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._acts:
            return
        if self._began_with not in (None, self._teacher_is):
            raise NoTeacher(
                f"distillation: this run began with teacher {self._began_with} and now has {self._teacher_is}. "
                "Build the student from the same weights, with the same settings, or start another run."
            )
        self._student = pl_module.get_submodule(self._of)
        self._teacher.to(pl_module.device)
        if self.shard_teacher and trainer.world_size > 1:
            self._teacher.shard()
        self._student_blocks, self._teacher_blocks = self._blocks()
        add_auxiliary_loss(pl_module, self)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if getattr(self, "_cache", None) is not None:
            trainer.strategy.barrier("distillation cache")  # all ranks have written what they saw in the last epoch
            self._cache.refresh()  # type: ignore[union-attr]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        remove_from_step(pl_module, self)
        if getattr(self, "_cache", None) is not None:
            self._cache.close()  # type: ignore[union-attr]
        if getattr(self, "_teacher", None) is not None:
            self.teacher_forwards = self._teacher.forwards
            self._teacher.release()
        for name in ("_teacher", "_student", "_student_blocks", "_teacher_blocks", "_cache"):
            self.__dict__.pop(name, None)

    def _blocks(self) -> tuple[list[nn.Module], list[nn.Module]]:
        if not (self.hidden or self.attention):
            return [], []
        both = blocks(self._student), blocks(self._teacher.module)
        for whose, there in zip(("student", "teacher"), both, strict=True):
            if not there:
                raise NoLogits(f"distillation: hidden and attention need repeated blocks, and the {whose} has none")
        pairs = self.layers or dict(losses.layer_pairs(len(both[0]), len(both[1])))
        self._pairs = [(int(mine), int(its)) for mine, its in pairs.items()]
        for mine, its in self._pairs:
            if not (0 <= mine < len(both[0]) and 0 <= its < len(both[1])):
                raise NoLogits(f"distillation: layers has {mine}: {its}; the student has {len(both[0])} blocks, "
                               f"the teacher {len(both[1])}, counted from 0")  # fmt: skip
        return both

    # -- the term in the loss ---------------------------------------------------------------------------------------
    @contextmanager
    def capture(self) -> Iterator[tuple[list[Call], list[Any]]]:
        """Inside, note what the student is called with and returns."""
        with ExitStack() as stack:
            outputs = stack.enter_context(recorded(self._student_blocks))
            if self.attention and hasattr(self._student, "config"):
                stack.callback(self._student.register_forward_pre_hook(_with_attentions, with_kwargs=True).remove)
            yield stack.enter_context(calls_of(self._student)), outputs

    def compute(self, watched: tuple[list[Call], list[Any]], loss: Tensor, step: Step) -> Tensor:
        """Return what is added to the loss of this micro-batch."""
        calls, outputs = watched
        if not calls:
            raise NoLogits(f"distillation: {self._of or 'forward'!r} was not called in training_step; set `of`")
        call = calls[-1]
        logits = logits_of(call.output, f"distillation: {self._of or 'forward'!r}")
        at = target_positions(call, logits, step.batch, self.shift)
        own = (self.labels - 1) * loss
        if not (self.weight or self.hidden or self.attention):
            return own
        term = self._from_cache(call, logits, at) if self._cache is not None else self._live(call, logits, outputs, at)
        if isinstance(step.batch, Mapping) and "loss_weight" in step.batch:
            term = term * step.batch["loss_weight"]  # the micro-batch's share of the mean over the global batch
        return own + term

    def _live(self, call: Call, logits: Tensor, mine: list[Any], at: TargetPositions) -> Tensor:
        with recorded(self._teacher_blocks) as theirs:
            taught = self._teacher(*call.args, **call.kwargs)
        term = self._matching(call, taught, mine, theirs, at)
        if self.weight:
            wanted, kept = self._reduced(at.rows(logits_of(taught, "distillation: the teacher")))
            mask = None if at.mask is None else at.mask.flatten()
            term = term + self.weight * self._against(at.rows(logits), wanted, kept, mask)
        return term

    def _from_cache(self, call: Call, logits: Tensor, at: TargetPositions) -> Tensor:
        return self.weight * self._against(at.select(logits), *self._cached(call, at))

    def _reduced(self, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        """The teacher's logits [N, C] as a cache would give them back: (values, class numbers)."""
        if self.top_k is None and self._cache is None:
            return wanted, None
        kept = losses.top_logits(wanted, self.top_k or wanted.shape[-1])
        return losses.rounded(losses.lump(wanted, kept, self.temperature)), kept

    def _against(self, logits: Tensor, wanted: Tensor, kept: Tensor | None, mask: Tensor | None = None) -> Tensor:
        if kept is not None:
            logits = losses.lump(logits, kept, self.temperature)
        return losses.kd_loss(logits, wanted, self.temperature, mask)

    def _cached(self, call: Call, at: TargetPositions) -> tuple[Tensor, Tensor]:
        """The teacher's logits of every position: those of samples not seen before are computed and kept."""
        assert self._cache is not None
        keys = cache_keys(call, at, causal=self.shift)
        records = [self._cache.get(key) for key in keys]
        if any(record is None for record in records):
            taught = logits_of(self._teacher(*call.args, **call.kwargs), "distillation: the teacher")
            fresh = self._reduced(at.select(taught))
            pieces = zip(*(part.split(at.counts) for part in fresh if part is not None), strict=True)
            for i, (values, kept) in enumerate(pieces):
                if records[i] is None:
                    self._cache.put(keys[i], values, kept)
                    records[i] = values, kept
        device = at.device
        both = zip(*(record for record in records if record is not None), strict=True)
        values, kept = (torch.cat([part.to(device) for part in parts]) for parts in both)
        return values, kept

    def _matching(self, call: Call, taught: Any, mine: list[Any], theirs: list[Any], at: TargetPositions) -> Tensor:
        total = torch.zeros((), device=at.device)
        if not (self.hidden or self.attention):
            return total
        pairs = [(hidden_of(mine[i]), hidden_of(theirs[j]).float()) for i, j in self._pairs]
        if self.hidden:
            total = total + self.hidden * sum(losses.hidden_loss(s, t) for s, t in pairs) / len(pairs)
        if not self.attention:
            return total
        seen, wanted = getattr(call.output, "attentions", None), getattr(taught, "attentions", None)
        if seen and wanted and seen[0] is not None and wanted[0] is not None:
            mask = call.kwargs.get("attention_mask")
            each = [losses.self_attention_loss(seen[i], wanted[j], mask) for i, j in self._pairs]
        elif all(s.ndim == 4 for s, _ in pairs):
            each = [losses.spatial_attention_loss(s, t) for s, t in pairs]
        else:
            raise NoLogits("distillation: attention needs convolution blocks, or transformers on both sides that were "
                           "loaded with attn_implementation='eager'; the others keep no attention maps")  # fmt: skip
        return total + self.attention * sum(each) / len(each)

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        known = getattr(self, "_teacher_is", None)
        return {} if known is None else {"teacher": known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._began_with = state_dict.get("teacher")


def _with_attentions(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "output_attentions": True}
