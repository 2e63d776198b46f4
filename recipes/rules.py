"""What must hold between the fields of a recipe, each rule a function that yields what is broken.

A rule names the keys it reads. It is skipped when one of them is itself in error, so that one mistake is reported once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from ..own_code import is_code
from ..spelling import did_you_mean
from . import data_rules as data_rules  # register their rules
from . import evaluation_rules as evaluation_rules
from . import preference_rules as preference_rules
from . import problem_rules as problem_rules
from . import strategy_rules as strategy_rules
from .adapters import KINDS
from .recipe import Recipe
from .rule import RULES, Broken, depends_on
from .schema import BudgetSpec

TEXT_TASKS = (
    "causal-lm", "masked-lm", "seq2seq", "sequence-classification", "token-classification", "preference",
    "reward-model",
)  # fmt: skip
REWARDS = ("val_accuracy", "val_margin", "val_chosen_reward", "val_rejected_reward")
IMAGE_KINDS = ("mlp", "cnn")
LOGGED = {  # task, or problem of a sequence-classification -> the metrics of its validation
    "causal-lm": ("val_loss", "val_perplexity"),
    "masked-lm": ("val_loss", "val_perplexity", "val_accuracy"),
    "seq2seq": ("val_loss", "val_perplexity", "val_accuracy"),
    "token-classification": ("val_loss", "val_accuracy", "val_macro_f1", "val_micro_f1", "val_entity_f1"),
    "image-classification": ("val_loss", "val_accuracy", "val_macro_f1", "val_micro_f1"),
    "single-label": ("val_loss", "val_accuracy", "val_macro_f1", "val_micro_f1"),
    "multi-label": ("val_loss", "val_exact_match", "val_macro_f1", "val_micro_f1"),
    "regression": ("val_loss", "val_mse", "val_mae", "val_r2", "val_spearman"),
    "preference": ("val_loss", *REWARDS),
    "reward-model": ("val_loss", *REWARDS),
}


def broken(recipe: Recipe, allow_code: bool, bad: Callable[[str], bool]) -> Iterator[Broken]:
    """Every rule that `recipe` breaks; `bad` says of a dotted key whether it was found in error already."""
    for reads, check in RULES:
        if not any(bad(key) for key in reads):
            yield from check(recipe)
    if not allow_code:
        yield from (rule for rule in code(recipe) if not bad(rule.key))


def code(recipe: Recipe) -> Iterator[Broken]:
    """A recipe is data: what would run somebody's code is the caller's to allow, not the file's."""
    rule, hint = "a module:attr only with --allow-code", "pass --allow-code if you trust it"
    names = [("model.task", recipe.model.task), ("data.source", recipe.data.source or "")]
    names.append(("optimizer.name", recipe.optimizer.name))
    names += [(f"techniques.{technique.name}", technique.name) for technique in recipe.techniques]
    for key, name in names:
        if is_code(name):
            yield Broken(key, rule, hint, name)
    free_form = {"model.config": recipe.model.config, "model.args": recipe.model.args, "data.args": recipe.data.args}
    for number, one in enumerate(recipe.data.sources):
        free_form[f"data.sources[{number}].args"] = one.args
    for key, values in free_form.items():
        if (values or {}).get("trust_remote_code"):
            yield Broken(f"{key}.trust_remote_code", "true only with --allow-code", hint)


@depends_on("budget")
def some_budget(recipe: Recipe) -> Iterator[Broken]:
    keys = list(BudgetSpec.model_fields)
    if all(getattr(recipe.budget, key) is None for key in keys):
        hint = 'impossible budget: the run would never end; write for example `hours: "10 min"`'
        yield Broken("budget", f"at least one of {', '.join(keys)}", hint, "no limit")


@depends_on("optimizer", "strategy", "precision")
def one_gradient_at_a_time(recipe: Recipe) -> Iterator[Broken]:
    if not recipe.optimizer.in_backward:
        return
    if recipe.optimizer.clip is not None:
        yield Broken("optimizer.clip", "null with optimizer.in_backward", "the norm of all gradients is not known then")
    if recipe.strategy.name not in ("auto", "single", "ddp"):
        hint = "ZeRO shares out gradients, and frees them by itself"
        yield Broken("strategy.name", "auto | single | ddp with optimizer.in_backward", hint)
    if recipe.precision == "fp16":
        hint = "its loss scale is judged by all gradients"
        yield Broken("precision", "auto | fp32 | bf16 with optimizer.in_backward", hint)


@depends_on("goal")
def one_bound(recipe: Recipe) -> Iterator[Broken]:
    if recipe.goal and (recipe.goal.above is None) == (recipe.goal.below is None):
        given = "neither above nor below" if recipe.goal.above is None else "both above and below"
        yield Broken("goal", "exactly one of above and below", found=given)


@depends_on("model.task", "model.name", "model.config")
def one_origin(recipe: Recipe) -> Iterator[Broken]:
    model = recipe.model
    if model.task not in TEXT_TASKS or (model.name is None) != (model.config is None):
        return
    given = "neither name nor config" if model.name is None else "both name and config"
    hint = "name starts from a trained model, config from scratch"
    if model.name is not None:
        hint += "; set the other to null"
    yield Broken("model", f"exactly one of name and config for {model.task}", hint, given)


@depends_on("model.task", "model.config")
def config_kind(recipe: Recipe) -> Iterator[Broken]:
    config = recipe.model.config
    if recipe.model.task in TEXT_TASKS and config is not None and not isinstance(config.get("model_type"), str):
        yield Broken("model.config", "a mapping with model_type, like {model_type: llama, hidden_size: 128}")


@depends_on("model.task", "model.name", "model.config")
def image_model(recipe: Recipe) -> Iterator[Broken]:
    model, choices = recipe.model, " | ".join(IMAGE_KINDS)
    if model.task != "image-classification":
        return
    config = model.config or {}
    if model.name is not None and model.config is not None:
        hint = "name starts from a trained model, config from scratch; set the other to null"
        yield Broken("model", f"one of name and config for {model.task}", hint, "both name and config")
    elif model.name is None and not config.keys() & {"kind", "model_type"}:
        yield Broken("model.config", f"a mapping with kind: {choices}, or with the model_type of a Hugging Face model")
    elif "kind" in config and model.config and model.config["kind"] not in IMAGE_KINDS:
        yield Broken("model.config.kind", choices, did_you_mean(str(model.config["kind"]), IMAGE_KINDS))


@depends_on("model.task", "model.name", "model.config", "model.tokenizer", "data.source")
def some_tokenizer(recipe: Recipe) -> Iterator[Broken]:
    model = recipe.model
    if model.task in TEXT_TASKS and model.config is not None and model.name is None:
        own = is_code(recipe.data.source)  # a data module of the user's own brings token ids already
        if model.tokenizer is None and not own:
            hint = "write tokenizer: {train: bpe, vocab_size: 4096}, or the name of one"
            yield Broken("model.tokenizer", "a tokenizer, as a model from config has none", hint, "nothing")


@depends_on("model.task", "model.adapter")
def adapter_fits(recipe: Recipe) -> Iterator[Broken]:
    if recipe.model.adapter and recipe.model.task not in TEXT_TASKS:
        hint = "remove it, or change model.task"
        yield Broken("model.adapter", f"adapters for {' | '.join(TEXT_TASKS)}, not for {recipe.model.task}", hint)


@depends_on("model.adapter", "model.dtype", "strategy.name", "strategy.offload")
def adapter_kind_fits(recipe: Recipe) -> Iterator[Broken]:
    adapter = recipe.model.adapter
    if adapter is None:
        return
    kind = KINDS[adapter.kind]
    for key in sorted(adapter.model_fields_set - {"kind", "targets", *kind.keys}):
        if getattr(adapter, key) == type(adapter).model_fields[key].default:
            continue
        named = " | ".join(name for name, each in KINDS.items() if key in each.keys)
        yield Broken(
            f"model.adapter.{key}", f"{key} for kind {named}", f"it has no effect on {adapter.kind}: remove it"
        )
    if recipe.model.dtype in ("nf4", "int8") and not kind.quantized:
        able = " | ".join(name for name, each in KINDS.items() if each.quantized)
        hint = (
            f"{adapter.kind} takes its shape or its values from the weights, of which {recipe.model.dtype} keeps codes"
        )
        yield Broken("model.adapter.kind", f"{able} beside model.dtype {recipe.model.dtype}", hint)
    if recipe.strategy.name == "zero3" and not kind.sharded:
        sharded = " | ".join(name for name, each in KINDS.items() if each.sharded)
        hint = f"{adapter.kind} uses weights outside of the layers that ZeRO-3 gathers them for: use zero2 or ddp"
        yield Broken("model.adapter.kind", f"{sharded} with strategy.name zero3", hint)


@depends_on("model.adapter", "model.dtype", "model.name")
def start_fits(recipe: Recipe) -> Iterator[Broken]:
    model = recipe.model
    if model.adapter is None or model.adapter.start != "loftq":
        return
    if model.dtype not in ("nf4", "int8"):
        hint = "it makes up for what the low-bit base has lost: use pissa"
        yield Broken("model.adapter.start", "loftq beside model.dtype nf4 | int8", hint)
    elif model.name is None:
        hint = "no file has the weights that a model from config is made with before they are rounded: use pissa"
        yield Broken("model.adapter.start", "loftq with model.name", hint)


@depends_on("model.task", "model.dtype", "model.adapter", "strategy.name", "precision")
def dtype_fits(recipe: Recipe) -> Iterator[Broken]:
    """What trains has float32 masters: an adapter's weights are its own, those of ZeRO are the optimizer's."""
    model, adapted, zero = recipe.model, recipe.model.adapter is not None, recipe.strategy.name.startswith("zero")
    if model.dtype in ("auto", "fp32"):
        return
    if model.task not in TEXT_TASKS:
        yield Broken("model.dtype", f"auto | fp32 for {model.task}")
    elif model.dtype in ("nf4", "int8"):
        if not adapted:
            hint = "nothing could be trained: write adapter: {kind: lora, rank: 8}"
            yield Broken("model.dtype", f"{model.dtype} for the frozen base of a model.adapter", hint)
    elif not adapted and not zero:
        hint = f"strategy {recipe.strategy.name} keeps no float32 masters of bf16 weights that train; use auto"
        yield Broken("model.dtype", "bf16 with a model.adapter, or with strategy.name zero1 | zero2 | zero3", hint)
    elif recipe.precision not in ("auto", "bf16"):
        yield Broken("model.dtype", "bf16 with precision bf16 or auto", "computed in bf16 is what is kept in bf16")


@depends_on("model.task", "model.args")
def args_fit(recipe: Recipe) -> Iterator[Broken]:
    if recipe.model.args and not is_code(recipe.model.task):
        yield Broken("model.args", "args only for a task that is your own module:attr", "shapes go into model.config")


@depends_on("data.validation", "data.source", "goal")
def validation_fits(recipe: Recipe) -> Iterator[Broken]:
    validation = recipe.data.validation
    if isinstance(validation, str) and re.fullmatch(r"\s*[0-9.]+\s*%?\s*", validation):
        yield Broken("data.validation", "a fraction from 0 to below 1, or a path", "a tenth is 0.1, without quotes")
    elif validation == 0 and recipe.goal and recipe.goal.metric.startswith("val_") and not is_code(recipe.data.source):
        yield Broken("goal.metric", "a metric that is measured; data.validation is 0", "hold out a fraction, like 0.05")


@depends_on("data.validation", "data.source", "checkpoint", "evaluation")
def best_is_measured(recipe: Recipe) -> Iterator[Broken]:
    kept, evaluation = recipe.checkpoint, recipe.evaluation
    if kept.patience is not None and kept.best is None:
        yield Broken("checkpoint.patience", "null without checkpoint.best", "best says by which metric, like val_loss")
    if kept.best is None:
        return
    if recipe.data.validation == 0 and not is_code(recipe.data.source):
        yield Broken("checkpoint.best", "null where data.validation is 0", "hold out a fraction, like 0.05")
    elif evaluation.every is None:
        yield Broken("checkpoint.best", "null without evaluation.every", 'evaluate more than once, like every: "10%"')


@depends_on("data.batch_size", "data.micro_batch_size")
def whole_micro_batches(recipe: Recipe) -> Iterator[Broken]:
    batch, micro = recipe.data.batch_size, recipe.data.micro_batch_size
    if isinstance(micro, int) and batch % micro:
        smaller = max(size for size in range(1, min(micro, batch) + 1) if batch % size == 0)
        hint = f"{smaller} would fit" if batch > micro else f"use {batch}, or auto"
        yield Broken("data.micro_batch_size", f"a divisor of data.batch_size ({batch}), or auto", hint)


@depends_on("model.task", "export")
def export_fits(recipe: Recipe) -> Iterator[Broken]:
    task = recipe.model.task
    if recipe.export is not None and not is_code(task) and task not in TEXT_TASKS:
        hint = "leave export out; `shoestring export` writes torch and onnx from the finished run"
        yield Broken("export.to", f"hf for {' | '.join(TEXT_TASKS)}, not for {task}", hint, recipe.export.to)


@depends_on("model.task", "model.problem", "goal", "techniques")
def goal_is_logged(recipe: Recipe) -> Iterator[Broken]:
    """What a task or a technique of the user's own logs is not known here."""
    task, problem = recipe.model.task, recipe.model.problem
    logged = LOGGED.get(problem if task == "sequence-classification" else task)
    if recipe.goal is None or logged is None or any(is_code(technique.name) for technique in recipe.techniques):
        return
    if recipe.goal.metric not in logged:
        hint = did_you_mean(recipe.goal.metric, logged)
        yield Broken("goal.metric", f"what {task} logs: {' | '.join(logged)}", hint)


@depends_on("techniques")
def techniques_once(recipe: Recipe) -> Iterator[Broken]:
    names = [technique.name for technique in recipe.techniques]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Broken(f"techniques[{index}]", "each technique once", "keep one", f"{name} a second time")
