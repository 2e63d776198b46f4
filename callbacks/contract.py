"""The contract of a technique: the page to read first.

A technique is an ordinary Lightning `Callback` plus a declaration, its card (card.py). It acts twice: `edit` changes
the settings that must be known before a trainer exists (precision, accumulation, strategy options), then Lightning's
own hooks act on the run.

    @dataclass(kw_only=True, eq=False, repr=False)    # makes the constructor; hash and repr stay those of Technique
    class MyTechnique(Technique, pl.Callback):
        card = Card(name="my_technique", does="one line", writes={"weights"}, ...)

        strength: float = 0.5                         # a setting

What Lightning has no hook for, a technique installs when a fit begins and takes away at teardown:

    choose the samples of a batch, and weigh them      forward/training_step.py: choose_samples
    add a term to the loss                             forward/training_step.py: add_auxiliary_loss
    skip, recompute or watch repeated blocks           forward/blocks.py: wrap_block
    let layers see other weights                       forward/forward_weights.py: ForwardWeights
    choose the samples of a global batch               sampling/samples.py: install_sampler
    change the batch size on the clock                 sampling/global_batches.py: GlobalBatches.sizes
    keep a number for each sample                      sampling/scores.py: SampleScores
    change gradients as they are communicated          parameters/communication.py: set_reduction
    read and edit weights, gradients and their state   parameters/accessor.py: shards_of

Samples, tokens and FLOPs are counted inside the step, waiting for data before any technique acts: what is not chosen is
not counted as trained, and what scoring costs is. So forwards belong into the step, not into `on_train_batch_start`.

Rules that the contract suite checks for every registered technique:
  1. Settings are the fields of a dataclass, all with a default; a constructor written by hand stores its keyword
     arguments under their own names and does nothing else. `check` judges them.
  2. `edit` is pure and idempotent. A plan has neither torch nor Lightning (catalog/registry.py), so `check`, `needs`
     and `predict` use none.
  3. It writes only the parts on its card, and never imports or looks for another technique.
  4. Small state lives in `state_dict`; tensors shaped like parameters live in `fragments` (see below).
  5. Randomness comes from a generator of its own, seeded by `derive_seed(run seed, name, ...)`.
  6. What was hooked is unhooked at teardown, which follows a crash too. Heavy packages are imported where needed.
  7. Strength 0 (`noop()`) equals absent, bit for bit.
  8. Nothing in the hot loop synchronises the device or starts a collective on every step.

This module imports neither torch nor Lightning.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Set
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

from ..seeds import derive_seed as derive_seed
from .card import MIXING as MIXING
from .card import PARTS as PARTS
from .card import SAVINGS as SAVINGS
from .card import BadSetting as BadSetting
from .card import Card as Card
from .card import Effect as Effect
from .card import IncompatibleTechniques as IncompatibleTechniques
from .card import Misconfigured as Misconfigured
from .card import Settings as Settings
from .card import Workload as Workload

if TYPE_CHECKING:
    from torch import Tensor


HOT_HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip


def silence(cls: type) -> type:
    """Take Lightning's own no-op hooks of every step away from a callback class.

    Lightning opens and closes a profiler around each hook of each callback, some twenty function calls, and skips what
    is not callable: a callback then costs a step only what it does in it.
    """
    for hook in HOT_HOOKS:
        method = getattr(cls, hook, None)
        if method is not None and method.__module__.startswith("pytorch_lightning"):
            setattr(cls, hook, None)
    return cls


class ReshapeListener:
    """A callback that is told when a technique changes the shapes of the model in mid-run (sparsity/reshape.py)."""

    def on_cut(self, trainer: Any, pl_module: Any, cut: Any) -> None:
        """Parts of parameters are gone; told before `on_reshape`.

        cut: a `parameters.cut.Cut`, which says what has been kept of every parameter.
        """

    def on_reshape(self, trainer: Any, pl_module: Any) -> None:
        """The model has new parameters, on the device and in the engine: fragments have been cut with them, and hooks
        on parameters are gone."""


@runtime_checkable
class Resuming(Protocol):
    """A trainer that knows, before `setup`, what the checkpoint holds that it will resume from: ours does."""

    def saved_state(self, key: str) -> dict[str, Any] | None:
        """The saved state of the callback `key`, or None where nothing is resumed. Collective."""


class SampleTable(Protocol):
    """What `Technique.tables` gives: a `sampling.scores.SampleScores`, cut into pieces, one a rank."""

    count: int  # of samples

    @property
    def offset(self) -> int: ...

    @property
    def length(self) -> int: ...

    def share(self) -> Tensor:
        """This rank's piece, [length], up to date. Collective."""
        ...

    def whole(self) -> Tensor:
        """All of it, [count]. Collective."""
        ...

    def load(self, piece: Tensor) -> None:
        """The counterpart of either."""
        ...


class Technique(ReshapeListener):
    """Mixed into `pl.Callback`. See the module's docstring for the rules.

    Example:
        >>> from dataclasses import dataclass
        >>> import pytorch_lightning as pl
        >>> @dataclass(kw_only=True, eq=False, repr=False)
        ... class Damp(Technique, pl.Callback):
        ...     card = Card(name="damp", does="makes gradients smaller", writes={"gradients"})
        ...     factor: float = 0.9
        >>> Damp(factor=0.5)
        Damp(factor=0.5)
    """

    card: ClassVar[Card]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        silence(cls)

    # -- before a trainer exists ------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raise `Misconfigured` where a setting is outside its range."""

    def needs(self) -> Set[str]:
        """Facts this instance needs; overridden where a setting decides (fp16 needs "cuda")."""
        return self.card.needs

    def edit(self, settings: Settings) -> Settings:
        """Return `settings` changed for this technique. Pure, idempotent."""
        return settings

    def predict(self, workload: Workload) -> Effect:
        """The factors this technique puts on `workload`: an estimate, never printed as a saving."""
        return Effect()

    # -- what the run's account and monitor ask -----------------------------------------------------------------------
    def densities(self) -> dict[str, float]:
        """By parameter name: the share of its elements that layers compute with, where that is not all of them."""
        return {}

    def step_kind(self) -> Hashable:
        """Return what, besides shapes, decides the next step's FLOPs: the version of masks, the blocks that are on.

        Steps of one kind are counted once. Asked when all techniques have had their `on_train_batch_start`.
        """
        return None

    def reshapes_next(self, trainer: Any) -> bool:
        """Whether the model gets other shapes before the next step: then the run is saved first, in the old ones."""
        return False

    # -- for the contract suite -------------------------------------------------------------------------------------
    @classmethod
    def example(cls) -> Self:
        """The smallest instance that visibly acts on a run of a dozen steps."""
        return cls()

    @classmethod
    def noop(cls) -> Self:
        """Strength 0: an instance that must equal its absence bit for bit."""
        raise NotImplementedError(f"{cls.__name__} must say what strength 0 is")

    # -- the end ----------------------------------------------------------------------------------------------------
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Unhook what was hooked."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning calls no `teardown` after a crash, and the module may be used again."""
        self.teardown(trainer, pl_module, "fit")

    # -- state ------------------------------------------------------------------------------------------------------
    @property
    def state_key(self) -> str:
        """Under which Lightning's checkpoints keep this technique's state."""
        return self.card.name

    def fragments(self) -> dict[str, dict[str, Tensor]]:
        """State shaped like parameters, as this rank's slices: state name -> parameter name -> [local length].

        The slices are those of `shards.Shards`; checkpoints store them with their offsets, so they can be loaded on
        another number of ranks. Called between steps.
        """
        return {}

    def load_fragments(self, fragments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `fragments` gave, already cut to this rank's slices."""

    def tables(self) -> Mapping[str, SampleTable]:
        """Numbers for each sample of the data, by name: kept in checkpoints like `fragments`, for any number of ranks.

        Made in `setup` and opened in `on_fit_start`, so that they are there when a checkpoint is read.
        """
        return {}

    def rebuild(self, pl_module: Any, state: Mapping[str, Any]) -> None:
        """Give a module just built the shapes it had when `state_dict` gave `state`. Most techniques change none."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """In a plain `pl.Trainer`: whole tensors go into Lightning's own checkpoint (collective where sharded)."""
        if tables := self.tables():
            kept = checkpoint.setdefault("shoestring_tables", {})
            kept[self.state_key] = {name: table.whole() for name, table in tables.items()}
        if not (fragments := self.fragments()):
            return
        from .parameters.accessor import shards_of

        shards = shards_of(trainer, pl_module)
        checkpoint.setdefault("shoestring", {})[self.state_key] = {
            state: {name: shards.gather(name, local) for name, local in named.items()}
            for state, named in fragments.items()
        }

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The counterpart: cut this rank's slices from the whole tensors."""
        for name, whole in checkpoint.get("shoestring_tables", {}).get(self.state_key, {}).items():
            self.tables()[name].load(whole)
        if (wholes := checkpoint.get("shoestring", {}).get(self.state_key)) is None:
            return
        from .parameters.accessor import cut

        self.load_fragments({state: cut(trainer, pl_module, named) for state, named in wholes.items()})

    @classmethod
    def setting_names(cls) -> list[str]:
        """The names of the keyword arguments, in the order they are written."""
        return list(inspect.signature(cls).parameters)

    def settings(self) -> dict[str, Any]:
        """The keyword arguments this instance was made with."""
        return {name: getattr(self, name) for name in self.setting_names()}

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({inside})"


def require(condition: bool, technique: Technique, setting: str, allowed: str) -> None:
    """Raise the one-line error of a setting outside its range."""
    if not condition:
        raise BadSetting(technique.card.name, setting, getattr(technique, setting), allowed)
