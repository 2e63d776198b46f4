"""Every public name of this package, for type checkers and for catalog/registry.py, which reads this file.

Adding a technique is a line below, under its perspective: the module's name is the technique's name in recipes.
"""

# isort: off
from .catalog.compose import compose as compose
from .accounting.accountant import Accountant as Accountant
from .accounting.budget import Budget as Budget
from .accounting.clock import Clock as Clock
from .accounting.clock import Duration as Duration
from .accounting.clock import clock_of as clock_of
from .card import Card as Card
from .card import IncompatibleTechniques as IncompatibleTechniques
from .card import Misconfigured as Misconfigured
from .card import Settings as Settings
from .contract import Technique as Technique
from .card import Effect as Effect
from .card import Workload as Workload
from .parameters.accessor import shards_of as shards_of
from .catalog.registry import make as make

# data
from .data.sequence_length_warmup import SequenceLengthWarmup as SequenceLengthWarmup
from .data.competence_curriculum import CompetenceCurriculum as CompetenceCurriculum

# model
from .model.gradient_checkpointing import GradientCheckpointing as GradientCheckpointing
from .model.stochastic_depth import StochasticDepth as StochasticDepth

# optimization
from .optimization.lr_schedule import LRSchedule as LRSchedule
from .optimization.lr_scaling import LRScaling as LRScaling
from .optimization.weight_averaging import WeightAveraging as WeightAveraging

# system
from .system.mixed_precision import MixedPrecision as MixedPrecision
from .system.compiled_blocks import CompiledBlocks as CompiledBlocks

# sparsity
from .sparsity.structured_pruning import StructuredPruning as StructuredPruning
from .sparsity.gradual_pruning import GradualPruning as GradualPruning
from .sparsity.set import SET as SET
from .sparsity.rigl import RigL as RigL
from .sparsity.top_kast import TopKAST as TopKAST
from .sparsity.movement_pruning import MovementPruning as MovementPruning
from .sparsity.n_m import NM as NM
from .sparsity.snip import SNIP as SNIP
from .sparsity.grasp import GraSP as GraSP
from .sparsity.synflow import SynFlow as SynFlow
from .sparsity.lottery_ticket import LotteryTicket as LotteryTicket

# compression
from .compression.low_rank import LowRank as LowRank
from .compression.weight_clustering import WeightClustering as WeightClustering
from .compression.quantization_aware import QuantizationAware as QuantizationAware
from .compression.distillation import Distillation as Distillation
from .compression.early_exit import EarlyExit as EarlyExit
