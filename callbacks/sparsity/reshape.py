"""Change the shapes of a model in the middle of a run, between two steps, under one device, DDP and ZeRO-1/2/3.

    whole    every rank gathers the master weights, optimizer states and techniques' fragments, whole
    close    the wrapper or engine goes; the module gets plain parameters of its own, with the whole weights
    change   the caller cuts the module and says how; all ranks take rank 0's word
    open     DDP wraps it again, or DeepSpeed makes a new engine around a new optimizer
    restore  each rank puts its slices of the cut masters, states, step counts and fragments back

Loops, clock, data order and generators stay as they are: to the user it is one run. Hooks that somebody put on
parameters (not on modules) are lost, since the parameters are new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor

from ... import ShoestringError
from ..contract import ReshapeListener, Technique
from ..parameters.accessor import shards_of
from ..parameters.cut import Cut, renew, shrink, shrink_tensor
from ..parameters.shards import Shards

# what DeepSpeed leaves on modules, besides names that begin with ds_
_MARKS = ("_external_params", "all_parameters", "pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt")


class CannotReshape(ShoestringError):
    """Something that goes with the parameters cannot be cut with them."""


@dataclass
class Whole:
    """All that is shaped like parameters, or goes with them, on every rank: by parameter name."""

    masters: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    fragments: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)  # technique -> state -> name

    def cut(self, cut: Cut) -> None:
        """Cut everything as the parameters are cut; step counts stay."""

        def shrunk(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: shrink_tensor(tensor, cut.kept.get(name, ())) for name, tensor in named.items()}

        self.masters, self.frozen = shrunk(self.masters), shrunk(self.frozen)
        for name, states in self.states.items():
            kept = cut.kept.get(name, ())
            for state, value in self.scalars[name].items() if kept else ():
                if torch.is_tensor(value) and value.numel() > 1:
                    raise CannotReshape(
                        f"the optimizer keeps {state} of shape {tuple(value.shape)} for {name}, which goes with no "
                        "element of it and cannot be cut. Use an element-wise optimizer: AdamW, Adam, SGD."
                    )
            self.states[name] = {state: shrink_tensor(tensor, kept) for state, tensor in states.items()}
        for fragments in self.fragments.values():
            fragments.update({state: shrunk(named) for state, named in fragments.items()})


@torch.no_grad()
def reshape(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    choose: Callable[[Mapping[str, Tensor]], Mapping[str, Any] | None],
    check: Callable[[], Any] = lambda: None,
) -> Mapping[str, Any] | None:
    """Cut the model of a running fit, together with everything shaped like it.

    Call it where an accumulation window begins. `choose(masters)` sees the module unwrapped and whole, with the whole
    fp32 masters by name, and returns the state of a `Cut`, or None; rank 0's is used. `check()` sees it cut, before
    anything is made of it. Returns what was chosen.
    Every `ReshapeListener` among the callbacks is told afterwards. Collective.
    """
    generators = _collect_rng_states()
    sharded = getattr(trainer.strategy, "deepspeed_engine", None) is not None
    kept = _gather(trainer, shards_of(trainer, module))
    groups = [[_plain(group) for group in o.param_groups] for o in trainer.optimizers]
    _close(trainer, module, kept)
    with torch.enable_grad():
        chosen = _of_rank_0(choose(kept.masters))
    if chosen is not None:
        cut = Cut.of(chosen)
        before = dict(module.named_parameters())
        shrink(module, cut)
        check()
        after = dict(module.named_parameters())
        if not sharded:
            _repoint(trainer.optimizers, {id(p): after[name] for name, p in before.items()})
        kept.cut(cut)
    _open(trainer, module, groups, sharded)
    _restore(trainer, shards_of(trainer, module), kept)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ReshapeListener):
            if chosen is not None:
                callback.on_cut(trainer, module, Cut.of(chosen))
            callback.on_reshape(trainer, module)
    _set_rng_states(generators)
    return chosen


# -- taking --------------------------------------------------------------------------------------------------------
def _gather(trainer: pl.Trainer, shards: Shards) -> Whole:
    """Every rank must ask for the same tensors in the same order, though it may hold nothing of some of them."""
    kept = Whole(scalars={name: shards.scalars(name) for name in shards.slices})
    present = {name: {state: view.dtype for state, view in shards.state(name).items()} for name in shards.slices}
    for known in _all((kept.scalars, present)):
        for name, scalars in known[0].items():
            kept.scalars[name] = kept.scalars.get(name) or scalars
        for name, states in known[1].items():
            present[name] = present[name] or states
    for name in shards.slices:
        kept.masters[name] = shards.whole(name).detach().clone()
        mine = shards.state(name)
        kept.states[name] = {
            state: shards.gather(name, mine.get(state, torch.empty(0, dtype=dtype))).clone()
            for state, dtype in present[name].items()
        }
    for name, (where, view) in shards.frozen().items():
        kept.frozen[name] = shards.whole_frozen(where, view).clone()
    for technique in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(technique, Technique) and (fragments := technique.fragments()):
            kept.fragments[technique.state_key] = {
                state: {name: shards.gather(name, local).clone() for name, local in named.items()}
                for state, named in fragments.items()
            }
    return kept


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _all(mine: Any) -> list[Any]:
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [mine]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def _of_rank_0(mine: Any) -> Any:
    return _all(mine)[0]


# -- closing and opening ---------------------------------------------------------------------------------------------
def _close(trainer: pl.Trainer, module: pl.LightningModule, kept: Whole) -> None:
    """Leave a plain module with whole parameters that nobody has hooked."""
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    if engine is not None:
        engine.destroy()
        for part in module.modules():
            for mark in [key for key in vars(part) if key.startswith("ds_") or key in _MARKS]:
                del vars(part)[mark]  # the next engine would find this one's parameters and hooks there
            if (own := vars(part).pop("_original_parameters", None)) is not None:  # ZeRO-3 put its own in their place
                own.update(part._parameters)
                part._parameters = own
    trainer.strategy.model = module
    trainer._shoestring_shards = None  # type: ignore[attr-defined]
    device, old = trainer.strategy.root_device, {**kept.masters, **kept.frozen}
    names = {id(p): name for name, p in module.named_parameters()}
    fresh = renew(module, {name: tensor.to(device, copy=True) for name, tensor in old.items()})
    assert names.keys() == fresh.keys()
    if engine is None:
        _repoint(trainer.optimizers, fresh)


def _repoint(optimizers: list[Any], fresh: Mapping[int, torch.nn.Parameter]) -> None:
    """Let optimizers update the new parameters; their states come with `Whole`."""
    for optimizer in optimizers:
        if any(id(p) in fresh for group in optimizer.param_groups for p in group["params"]):
            optimizer.state.clear()
        for group in optimizer.param_groups:
            group["params"] = [fresh.get(id(p), p) for p in group["params"]]


def _open(trainer: pl.Trainer, module: pl.LightningModule, groups: Any, sharded: bool) -> None:
    strategy = trainer.strategy
    if sharded:
        schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        strategy.setup(trainer)
        for optimizer, saved in zip(trainer.optimizers, groups, strict=True):
            for group, values in zip(optimizer.param_groups, saved, strict=True):
                group.update(values)
        for config, state in zip(trainer.lr_scheduler_configs, schedulers, strict=True):
            config.scheduler.load_state_dict(state)
    elif hasattr(strategy, "configure_ddp"):
        strategy.configure_ddp()


def _restore(trainer: pl.Trainer, shards: Shards, kept: Whole) -> None:
    for name, where in shards.slices.items():
        if not where.length:
            continue
        shards.master(name).copy_(where.cut(kept.masters[name]))
        states = {state: where.cut(whole) for state, whole in kept.states[name].items()}
        shards.restore(name, states, kept.scalars[name])
    shards.publish()
    for technique in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(technique, Technique) and technique.state_key in kept.fragments:
            technique.load_fragments(
                {
                    state: shards.beside_masters({n: shards.slices[n].cut(whole).clone() for n, whole in named.items()})
                    for state, named in kept.fragments[technique.state_key].items()
                }
            )
