"""Every section of a recipe: what may be written, what it means, what holds if it is left out.

Each field's description is the sentence that an error message shows after `allowed:`; where there is none, the field's
choices are shown. All sections together are `recipe.py`; rules between fields stand in `rules.py`, the translation of
errors in `check.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer
from pydantic_core import PydanticCustomError

from ..own_code import CODE
from ..section import Section as Section
from . import amounts
from .data_schema import ColumnsSpec as ColumnsSpec
from .data_schema import Format
from .data_schema import SourceSpec as SourceSpec
from .field_types import Count, Positive, Share, Text, amount, duration, judged
from .model_schema import AdapterSpec as AdapterSpec
from .model_schema import ModelSpec as ModelSpec


class DataSpec(Section):
    """The source of the samples, and their batches. `batch_size` is global: samples per optimizer step."""

    source: Text | None = Field(
        None,
        description="python-stdlib | python-packages | python-docstrings | docstring-preferences | "
        "package-descriptions | digits | a path or glob | a hub name | your own module:attr; null where data.sources "
        "says",
    )
    sources: Annotated[tuple[SourceSpec, ...], Field(strict=False)] = Field(
        (), description="a list, each item a mapping like {source: ./chats.jsonl, weight: 0.9}: drawn from by weight"
    )
    format: Format = Field(
        "auto",
        description="auto | text | json | csv | parquet | arrow | hub | builtin: where rows come from; or what they "
        "are: plain (a column of texts) | messages | sharegpt | alpaca | prompt-completion | question-answer | "
        "preference | unpaired-preference",
    )
    split: Text = Field("train", description="the name of a split")
    text_column: Text = Field("text", description="the name of a column")
    label_column: Text = Field("label", description="the name of a column")
    columns: ColumnsSpec = ColumnsSpec.model_construct()
    bad_rows: Literal["refuse", "skip"] = Field(
        "refuse",
        description="refuse | skip: a row that cannot be read ends the run before it begins, or is left out and "
        "counted",
    )
    train_on: Literal["answers", "last", "all"] = Field(
        "answers",
        description="answers | last | all: of chats and of prompts with completions, which tokens are trained on",
    )
    chat_template: Text | None = Field(
        None, description="null (the tokenizer's own, or a simple one), or a chat template in Jinja"
    )
    validation: Share | Text = Field(0.05, description="the fraction held out, from 0 to below 1, or a path")
    sequence_length: Count = Field(256, description="a whole number of tokens from 1")
    pack: bool = Field(True, description="true | false")
    mask_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="a number above 0 and below 1: the share of a text's tokens that masked-lm hides and predicts"
    )
    image_size: Count | None = Field(
        None, description="null (the model's, or 64), or a whole number of pixels from 1: of both sides of image files"
    )
    group_by_length: bool = Field(
        True, description="true | false: rows of alike length share a batch where rows are padded"
    )
    batch_size: Count = Field(32, description="a whole number from 1: samples per optimizer step, over all ranks")
    micro_batch_size: Literal["auto"] | Count = Field(
        "auto", description="auto, or a whole number from 1: samples per rank and forward pass"
    )
    workers: int = Field(0, ge=0, le=1024, description="a whole number from 0")
    limit: Count | None = Field(None, description="null, or a whole number of rows or files from 1")
    args: dict[str, Any] = Field(default={}, description="a mapping of keyword arguments")

    def each(self) -> list[tuple[float, DataSpec]]:
        """The sources by their weights, each with what holds for it in place of `source` and `sources`."""
        if self.source is not None:
            return [(1.0, self)]
        return [(one.weight, self.model_copy(update=one.settings(self.columns))) for one in self.sources]


class Goal(Section):
    """The quality that the run is for: a metric `above` or `below` a number. Reached first, it ends the run early."""

    metric: Text = Field(description="the name of a logged metric, like val_loss or val_accuracy")
    above: float | None = Field(None, description="a number")
    below: float | None = Field(None, description="a number")


class BudgetSpec(Section):
    """Limits of what the run may spend; the first limit that is reached ends it. None: not limited.

    Units: US dollars, hours of the clock, hours times devices, tokens, samples, optimizer steps, passes over the
    training data (parts of one too), FLOPs, kWh.
    """

    usd: Annotated[float | None, amount("$")] = None
    hours: Annotated[float | None, amount("s", 3600)] = None
    device_hours: Annotated[float | None, amount("s", 3600)] = None
    tokens: Annotated[float | None, amount("tokens", whole=True)] = None
    samples: Annotated[float | None, amount("samples", whole=True)] = None
    steps: Annotated[float | None, amount("steps", whole=True)] = None
    epochs: Annotated[float | None, amount("epochs")] = None
    flops: Annotated[float | None, amount("flops")] = None
    kwh: Annotated[float | None, amount("kWh")] = None


TECHNIQUE = "a technique's name, or one name with a mapping of settings: `- gradual_pruning: {sparsity: 0.5}`"
TechniqueAsWritten = str | dict[str, dict[str, Any] | None]
TECHNIQUE_NAME = rf"^[a-z][a-z0-9_]*$|{CODE}"


def technique_item(item: object) -> object:
    """`"lr_scaling"` and `{"lr_scaling": {...}}` as the two fields of a `TechniqueSpec`."""
    if isinstance(item, TechniqueSpec):
        return item
    if isinstance(item, dict) and len(item) > 1 and next(iter(item.values())) is None:
        hint = f"indent the settings deeper than the name: {next(iter(item))}"
        raise PydanticCustomError("technique", "{allowed}", {"allowed": TECHNIQUE, "hint": hint})
    pairs = list(item.items()) if isinstance(item, dict) else [(item, None)]
    name, settings = pairs[0] if len(pairs) == 1 else (None, None)
    if not isinstance(name, str) or not re.match(TECHNIQUE_NAME, name) or not isinstance(settings, dict | None):
        raise PydanticCustomError("technique", "{allowed}", {"allowed": TECHNIQUE, "hint": ""})
    return {"name": name, "settings": settings or {}}


class TechniqueSpec(Section):
    """One technique by name with its settings. Neither is resolved here: recipes know no techniques."""

    name: Annotated[str, Field(pattern=TECHNIQUE_NAME)]
    settings: dict[str, Any]

    @model_serializer
    def _as_written(self) -> dict[str, dict[str, Any]]:
        return {self.name: self.settings}


class OptimizerSpec(Section):
    """The optimizer and its learning rate's course: `warmup` up to `lr`, then `schedule` down to the budget's end.

    What averages its path instead, as schedule_free_adamw does, has a constant rate unless `schedule` is given."""

    name: Annotated[str, Field(pattern=TECHNIQUE_NAME)] = "adamw"
    lr: Positive = Field(3e-4, description="a number above 0")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="null (0.1; 0 for sgd and adam), or a number from 0"
    )
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = Field(
        (0.9, 0.95), description="two numbers from 0 to below 1, like [0.9, 0.95]"
    )
    eps: Positive = Field(1e-8, description="a number above 0")
    momentum: Share = Field(0.0, description="a number from 0 to below 1")
    clip: Positive | None = Field(1.0, description="null, or a number above 0: the largest gradient norm")
    nonfinite_steps: Count = Field(
        10, description="a whole number from 1: so many steps without a finite loss or gradients end the run"
    )
    in_backward: bool = Field(
        False, description="true | false: each parameter steps in backward, and one gradient is alive at a time"
    )
    schedule: Literal["linear", "cosine", "wsd", "rex", "constant"] = "linear"
    warmup: Annotated[str, duration(zero=True)] = Field("2%", description=amounts.DURATION)


class StrategySpec(Section):
    """The distribution of the model and its state over devices. `auto` leaves the choice to the plan."""

    name: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp2"] = "auto"
    devices: Literal["auto"] | Count = Field("auto", description="auto, or a whole number from 1: devices per node")
    nodes: Count = Field(1, description="a whole number from 1")
    offload: Literal["none", "optimizer", "parameters"] = "none"
    nvme: str | None = Field(
        None,
        min_length=1,
        description="null, or a folder on a local drive: optimizer state lies there in place of host memory, under "
        "zero3 with offload optimizer",
    )
    gradient_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="fp32 | bf16: what gradients are summed in, over micro-batches and ranks, under zero1 | zero2 | "
        "zero3 in bf16; ddp, single and fsdp2 sum them in what the weights are kept in",
    )
    overlap: bool | Literal["auto"] = Field(
        "auto",
        description="auto | true | false: gradients are reduced while backward goes on, under zero1 | zero2 | zero3. "
        "auto: with zero3 on GPUs; with zero1 and zero2 it costs a second bucket",
    )
    reduce_bucket: Literal["auto"] | Count = Field(
        "auto",
        description="auto, or a whole number of elements from 1: gradients reduced together, under zero1 | zero2 | "
        "zero3; allocated whole. auto: all that are trained, at most 100 million",
    )
    allgather_bucket: Literal["auto"] | Count = Field(
        "auto",
        description="auto, or an even number of elements: weights gathered together after a step, under zero1 | zero2. "
        "auto: all that are trained, at most 100 million",
    )
    prefetch: Literal["auto"] | Count = Field(
        "auto",
        description="auto (50 million), or a whole number of elements from 1: weights gathered ahead of their use, "
        "under zero3",
    )
    hpz: Count = Field(
        1,
        description="a whole number of ranks from 1, that divides all of them: so many neighbours hold a second copy "
        "of the weights among them, which backward gathers from within their node, under zero3",
    )
    quantized_weights: bool = Field(
        False, description="true | false: weights are gathered in 8 bits, under zero3 on GPUs"
    )
    hang_after: Literal["auto", "off"] | Annotated[str, duration(zero=False)] = Field(
        "auto",
        description='auto (20 times the slowest of the last batches, at least 2 min), off, or a time such as "10 min": '
        "a run that has not moved for so long ends, and says which rank stands where",
    )


class ClusterSpec(Section):
    """The device and its price; null takes the catalogue's figure for `hardware`."""

    hardware: Text = Field("auto", description="auto, or a name of the hardware catalogue")
    usd_per_device_hour: Annotated[float, Field(ge=0)] | None = Field(None, description="null, or a number from 0")
    watts_per_device: Positive | None = Field(None, description="null, or a number above 0")
    host_memory_gib: Positive | None = Field(
        None, description="null (this machine's, where it has the hardware), or GiB of host memory a node"
    )


class TrackingSpec(Section):
    """The records of the run: our ledger, and Weights & Biases if wished."""

    ledger: bool = Field(True, description="true | false")
    wandb: Literal["off", "offline", "online"] = "off"
    project: Text = Field("shoestring", description="a project's name")
    log_every: Count = Field(10, description="a whole number of steps from 1")
    profile: Annotated[float | None, amount("steps", whole=True)] = Field(
        None, description="null, or a number of steps to trace into the run's folder, like 3 steps"
    )


class CheckpointSpec(Section):
    """How often the run is saved (null: only at its end), and how many of the newest checkpoints stay.

    `every: auto` weighs what saving costs against what an interruption loses (Young 1974, doi 10.1145/361147.361115).
    `best` keeps the weights of the best evaluation, too, in best/.
    """

    every: Annotated[str | None, duration(zero=False, word="auto")] = Field(
        "300 s", description=f"auto, or {amounts.DURATION}"
    )
    mtbf: Annotated[float | None, amount("s")] = Field(
        None,
        description="null (a day for each node, and what the run itself has met), or the mean time between failures "
        "and preemptions, like 4 h: for every: auto",
    )
    keep: Count = Field(2, description="a whole number from 1")
    best: Annotated[str | None, judged()] = Field(None, description=amounts.JUDGED)
    patience: Count | None = Field(
        None,
        description="null, or how many evaluations without a better one by `best` end the run: a whole number from 1",
    )


class EvaluationSpec(Section):
    """When validation runs, over how many batches (null: all), what follows it, and what follows training."""

    every: Annotated[str | None, duration(zero=False)] = Field(None, description=amounts.DURATION)
    batches: Count | None = Field(None, description="null, or a whole number from 1")
    at_end: bool = Field(True, description="true | false")
    generate: Text | Annotated[tuple[Text, ...], Field(min_length=1, strict=False)] | None = Field(
        None, description="null, a prompt to complete, or a list of prompts; a model that learns chats is asked them"
    )
    prompts: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        (), description="a list of prompts, completed after each validation by the likeliest tokens; see generate"
    )
    prompt_tokens: Count = Field(64, description="a whole number of tokens from 1: of such a completion, at most")


class ExportSpec(Section):
    """The export: `hf` writes a folder that transformers loads; path null puts it into the run's folder."""

    to: Literal["hf"] = "hf"
    path: Text | None = Field(None, description="null, or a folder")
