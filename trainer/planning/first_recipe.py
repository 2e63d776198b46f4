"""A first recipe for a model, data and a budget: the cheapest way to train that fits this machine and the budget.

Full fine-tuning, LoRA and LoRA beside a base in 4 bits are planned one after the other. The first is taken that fits in
memory and sees all of the data once within the budget; where none does, the one that sees most of it.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ... import ShoestringError
from ...problems import clip
from ...recipes import load_recipe
from ...spelling import did_you_mean
from ...units import UnitError, quantity
from ..data.look import Look, look_at, purposes
from ..data.paths import model_folder
from ..machine.facts import Machine
from .configurations import configuration_of
from .fitting import CannotFit
from .planner import Plan, plan

SCHEMA = "recipe.schema.json"  # beside the recipe
TASKS = {"chat": "causal-lm", "text": "causal-lm", "classify": "sequence-classification"}
# the base unit of an amount -> the budget's key
KEYS = {"$": "usd", "s": "hours", "kWh": "kwh", "epochs": "epochs", "steps": "steps", "tokens": "tokens",
        "samples": "samples", "flops": "flops"}  # fmt: skip
EXAMPLES = '"$5", "30 min", "3 epochs", "500 steps" or "0.2 kWh"'
WAYS = ("full", "lora", "qlora")
CHARACTERS = 3.5  # of a token of English
# parameters below which -> the rate of full fine-tuning, and that of adapters
RATES = ((5e7, "1e-3", "3e-3"), (1e9, "1e-4", "5e-4"), (math.inf, "1e-5", "2e-4"))


class CannotStart(ShoestringError):
    """No recipe can be written for what was asked."""


@dataclass(frozen=True, kw_only=True)
class RecipeRequest:
    """Four answers: a folder or hub name of a model; files, a folder, a glob or a carried source; an amount; a purpose.

    `CannotStart`, or `TaskError` of the data, where one of them is nothing to start with.
    """

    model: str
    data: str
    budget: str
    purpose: str
    look: Look

    @classmethod
    def of(cls, model: str, data: str, budget: str, purpose: str | None) -> RecipeRequest:
        """Look at the data, and check the rest. purpose None: the likeliest for such data."""
        look = look_at(data, key="--data")
        legal = list(purposes(look))
        if purpose is not None and purpose not in legal:
            what = (
                f"{data} holds {look.kind}, for {' or '.join(legal)}."
                if purpose in TASKS
                else did_you_mean(purpose, TASKS)
            )
            raise CannotStart(f"--for {purpose}: {what or 'there are ' + ', '.join(TASKS)}")
        if purpose is None and look.kind == "unknown":
            raise CannotStart(f"--for: {data} is looked up on the hub; say what it is for: {', '.join(TASKS)}.")
        budget_key(budget)
        model_folder(model, "--model")
        return cls(model=model, data=data, budget=budget, purpose=purpose or legal[0], look=look)


@dataclass(frozen=True, kw_only=True)
class FirstRecipe:
    """A recipe's text, its plan, how it trains, and how often it sees the rows looked at; None: not known."""

    text: str
    plan: Plan
    way: str
    passes: float | None


def budget_key(budget: str) -> str:
    """The key of a recipe's budget that an amount belongs to."""
    try:
        amount, base = quantity(budget)
    except UnitError as error:
        raise CannotStart(
            f"--budget {clip(budget)!r}: {error.hint or 'an amount is needed'}, like {EXAMPLES}."
        ) from None
    if base not in KEYS or amount <= 0:
        raise CannotStart(f"--budget {clip(budget)!r}: an amount above 0 with its unit is needed, like {EXAMPLES}.")
    return KEYS[base]


def first_recipe(request: RecipeRequest, name: str, machine: Machine | None = None) -> FirstRecipe:
    """The recipe `name` for this request, planned on this machine, or on `machine`.

    `CannotStart` where no way to train fits in its memory.
    """
    best: FirstRecipe | None = None
    refused: ShoestringError | None = None
    known = configuration_of(request.model) is not None
    for way in WAYS if known else ("lora",):  # of a model that is still to be downloaded, nobody knows the size
        if way == "qlora" and request.purpose == "classify":
            continue
        try:
            made = _planned(request, name, way, machine)
        except CannotFit as error:
            refused = error
            continue
        if best is None or (made.passes or 0) > 1.05 * (best.passes or 0):
            best = made
        if made.passes is None or made.passes >= 1:
            break
    if best is None:
        why = str(refused).partition(f": {name}: ")[2] or refused  # its place is a file that nobody has seen
        raise CannotStart(f"nothing fits on this machine, not even adapters beside a low-bit base; it {why}")
    return best


def _planned(request: RecipeRequest, name: str, way: str, machine: Machine | None) -> FirstRecipe:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.yaml"
        file.write_text("\n".join(_lines(request, name, way, None)))
        made = plan(load_recipe(file), machine)
    passes = _passes(request, made)
    return FirstRecipe(text="\n".join(_lines(request, name, way, made)) + "\n", plan=made, way=way, passes=passes)


def _passes(request: RecipeRequest, made: Plan) -> float | None:
    """How often the budget's steps see every row, as far as the rows are known: all, or at least so many."""
    steps, data = made.predictions.get("steps"), made.recipe.data
    if steps is None or not request.look.rows:
        return None
    per_step = data.batch_size * (data.sequence_length if data.pack else request.look.characters / CHARACTERS)
    return float(steps * per_step / (request.look.rows * max(1.0, request.look.characters / CHARACTERS)))


def _lines(request: RecipeRequest, name: str, way: str, made: Plan | None) -> Iterator[str]:
    """The recipe's text. made: its plan, where there is one already."""
    yield f"# yaml-language-server: $schema={SCHEMA}"
    yield f"# {_title(request)}"
    yield f"#   shoestring plan {name}.yaml      what it needs and costs; starts nothing"
    yield f"#   shoestring data {name}.yaml      what is learnt from: samples, with the trained tokens marked"
    yield f"#   shoestring train {name}.yaml     any key may be changed there: optimizer.lr=1e-4"
    for section in (_model(request, way), _data(request), _budget(request), _optimizer(way, made)):
        yield ""
        yield from (f"{line:31} # {why}" if why else line for line, why in section)
    yield from ("", "evaluation:", "  at_end: true")


Lines = Iterator[tuple[str, str]]  # a line, and what is to be said of it


def _model(request: RecipeRequest, way: str) -> Lines:
    yield "model:", ""
    yield f"  task: {TASKS[request.purpose]}", ""
    yield f"  name: {_quoted(request.model)}", ""
    if way == "qlora":
        yield "  dtype: nf4", "the frozen base in 4 bits"
    if way != "full":
        yield "  adapter:", "small updates are trained beside frozen weights"
        yield "    kind: lora", ""
        yield "    rank: 16", "more learns more, and takes more memory"
        yield "    alpha: 32", ""


def _data(request: RecipeRequest) -> Lines:
    yield "data:", ""
    yield f"  source: {_quoted(request.data)}", ""
    if request.look.text_column != "text":
        yield f"  text_column: {_quoted(request.look.text_column)}", ""
    if request.purpose == "classify":
        yield f"  label_column: {_quoted(request.look.label_column or 'label')}", ""
    yield "  validation: 0.05", "the share that is held out, or a path"
    if request.purpose == "chat":
        yield "  train_on: answers", "or last, or all"
    longer = "goes on in the next sample" if request.purpose == "text" else "is cut"
    yield f"  sequence_length: {_window(request)}", f"tokens; what is longer {longer}"
    yield f"  batch_size: {_batch(request)}", "samples of a step, over all devices"


def _budget(request: RecipeRequest) -> Lines:
    yield "budget:", "the first limit that is reached ends the run, annealed and saved"
    yield f"  {budget_key(request.budget)}: {_quoted(request.budget)}", ""


def _optimizer(way: str, made: Plan | None) -> Lines:
    size = (made.predictions.get("parameters") if made else None) or 1e12
    full, adapted = next((full, adapted) for most, full, adapted in RATES if size < most)
    yield "optimizer:", ""
    if way == "full":
        yield f"  lr: {full}", "pretrained weights are easily spoiled by large steps"
        yield "  weight_decay: 0.01", ""
    else:
        yield f"  lr: {adapted}", "adapters like about ten times the rate of full fine-tuning"
        yield "  weight_decay: 0.0", ""
    yield "  schedule: linear", "down to zero at the end of the budget"
    yield '  warmup: "5%"', ""


def _title(request: RecipeRequest) -> str:
    model = Path(request.model).name if request.model.startswith((".", "/", "~")) else request.model
    does = {"chat": "answers as", "text": "goes on with the texts of", "classify": "tells the classes of"}
    return f"{model} {does[request.purpose]} {request.data}" + (" does" if request.purpose == "chat" else "")


def _window(request: RecipeRequest) -> int:
    """Tokens of a sample: what 95 % of the rows need, within what the model reads."""
    longest = (configuration_of(request.model) or {}).get("max_position_embeddings") or 1024
    if request.purpose == "text":
        return min(int(longest), 512)
    need = (request.look.characters or 1500) / CHARACTERS + 32  # what a template adds
    return min(int(longest), 2048, max(64, 2 ** math.ceil(math.log2(need))))


def _batch(request: RecipeRequest) -> int:
    """Samples of a step: at least twenty steps a pass, where there are few rows."""
    return 16 if not request.look.rows else max(2, min(16, 2 ** int(math.log2(max(2, request.look.rows / 20)))))


def _quoted(text: str) -> str:
    """As YAML reads it back."""
    return (
        text
        if re.fullmatch(r"[A-Za-z./~][\w./~-]*", text)
        else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    )
