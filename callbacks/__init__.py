"""Techniques of efficient training, the contract they keep, and what they act through.

Read `contract.py` first. Names are loaded on first use, so importing this package costs nothing. Type checkers read
the imports below instead, one for each name: a misspelt one is an error.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .compose import compose as compose  # light, and its module has the same name: bound here, once
from .registry import TECHNIQUES

if TYPE_CHECKING:
    from .accounting.accountant import Accountant as Accountant
    from .accounting.budget import Budget as Budget
    from .accounting.clock import Clock as Clock
    from .accounting.clock import Duration as Duration
    from .accounting.clock import clock_of as clock_of
    from .compression.distillation import Distillation as Distillation
    from .compression.early_exit import EarlyExit as EarlyExit
    from .compression.low_rank import LowRank as LowRank
    from .compression.quantization_aware import QuantizationAware as QuantizationAware
    from .compression.weight_clustering import WeightClustering as WeightClustering
    from .contract import Card as Card
    from .contract import IncompatibleTechniques as IncompatibleTechniques
    from .contract import Misconfigured as Misconfigured
    from .contract import Settings as Settings
    from .contract import Technique as Technique
    from .data.competence_curriculum import CompetenceCurriculum as CompetenceCurriculum
    from .data.sequence_length_warmup import SequenceLengthWarmup as SequenceLengthWarmup
    from .effect import Effect as Effect
    from .effect import Workload as Workload
    from .model.gradient_checkpointing import GradientCheckpointing as GradientCheckpointing
    from .optimization.lr_scaling import LRScaling as LRScaling
    from .optimization.lr_schedule import LRSchedule as LRSchedule
    from .optimization.weight_averaging import WeightAveraging as WeightAveraging
    from .parameters.accessor import shards_of as shards_of
    from .registry import make as make
    from .sparsity.gradual_pruning import GradualPruning as GradualPruning
    from .sparsity.grasp import GraSP as GraSP
    from .sparsity.lottery_ticket import LotteryTicket as LotteryTicket
    from .sparsity.movement_pruning import MovementPruning as MovementPruning
    from .sparsity.n_m import NM as NM
    from .sparsity.rigl import RigL as RigL
    from .sparsity.set import SET as SET
    from .sparsity.snip import SNIP as SNIP
    from .sparsity.structured_pruning import StructuredPruning as StructuredPruning
    from .sparsity.synflow import SynFlow as SynFlow
    from .sparsity.top_kast import TopKAST as TopKAST
    from .system.mixed_precision import MixedPrecision as MixedPrecision

_HOMES = {
    "Card": "contract", "Technique": "contract", "Settings": "contract", "Effect": "effect", "Workload": "effect",
    "IncompatibleTechniques": "contract", "Misconfigured": "contract",
    "Budget": "accounting.budget", "Clock": "accounting.clock", "Duration": "accounting.clock",
    "clock_of": "accounting.clock", "Accountant": "accounting.accountant",
    "shards_of": "parameters.accessor", "make": "registry",
    **{home.partition(":")[2]: home.partition(":")[0] for home in TECHNIQUES.values()},
}  # fmt: skip

__all__ = ["compose", *sorted(_HOMES)]

if not TYPE_CHECKING:  # checkers would accept any name

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return getattr(import_module(f".{_HOMES[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
