"""What a recipe says of a module and data of the user's own: used, or refused by its key before the first step."""

from __future__ import annotations

import pytorch_lightning as pl
from torch.utils.data import RandomSampler, SequentialSampler

from ...own_code import is_code
from ...recipes import Recipe, RecipeError
from ...recipes.schema import OptimizerSpec
from .optimizers.make import build_optimizer

# of the optimizer section: the rest, schedule, warmup and clip, act on any optimizer
OF_OPTIMIZER = ("name", "lr", "weight_decay", "betas", "eps", "momentum")


def makes_optimizer(module: pl.LightningModule) -> bool:
    """Whether the module has a `configure_optimizers` of its own."""
    return type(module).configure_optimizers is not pl.LightningModule.configure_optimizers


def give_optimizer(module: pl.LightningModule, optimizer: OptimizerSpec) -> None:
    """Let a module that makes none train with the recipe's."""
    module.configure_optimizers = lambda: build_optimizer(module.named_parameters(), optimizer)  # type: ignore[method-assign]


def check_own_module(recipe: Recipe, module: pl.LightningModule) -> None:
    """Raise `RecipeError` where keys of the recipe would have no effect on the user's module, or fail at its end."""
    if not is_code(recipe.model.task):
        return
    problems, name = [], recipe.model.task
    for key in OF_OPTIMIZER if makes_optimizer(module) else ():
        if (value := getattr(recipe.optimizer, key)) != OptimizerSpec.model_fields[key].default:
            rule = f"nothing: {name} makes its own optimizer in configure_optimizers"
            hint = "set it there (model.args can hand it over), or remove that method"
            problems.append(recipe.problem(f"optimizer.{key}", value, rule, hint))
    if recipe.export is not None and not hasattr(getattr(module, "model", None), "save_pretrained"):
        rule = f"hf for modules whose attribute `model` is a Hugging Face model, which that of {name} is not"
        problems.append(recipe.problem("export.to", recipe.export.to, rule, "leave export out"))
    if problems:
        raise RecipeError(problems)


class CheckBatch(pl.Callback):
    """Refuses, before the first step, a datamodule whose loader makes other global batches than the recipe says."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        order, wanted = trainer.monitor.epochs.order, self.recipe.data.batch_size  # type: ignore[attr-defined]
        # of a stream, and of a batch sampler of the user's own, nobody knows
        if order is None or not isinstance(order.base, RandomSampler | SequentialSampler):
            return
        if order.global_batch != wanted:
            made = f"{order.micro} samples x {order.world} ranks x {order.accumulate} accumulated"
            rule = f"{order.global_batch}, which the loader of {self.recipe.data.source} makes: {made}"
            hint = "write that, or give the loader another batch_size"
            raise RecipeError([self.recipe.problem("data.batch_size", wanted, rule, hint)])
