"""`shoestring init`: four questions, or flags, and a recipe is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import as_json_text

if TYPE_CHECKING:
    from ..planning.first_recipe import FirstRecipe, RecipeRequest

CARRIED = "runs/quickstart/model"  # what the first recipe of the tutorial leaves
WAYS = {"full": "all weights are trained", "lora": "LoRA adapters", "qlora": "LoRA adapters beside a base in 4 bits"}


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option("--model", help="A folder, or a name of the Hugging Face hub.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Files, a folder, a glob, a source that is carried.")
    ] = None,
    budget: Annotated[str | None, typer.Option("--budget", help='Like "$5", "30 min" or "3 epochs".')] = None,
    purpose: Annotated[str | None, typer.Option("--for", help="chat, text or classify.")] = None,
) -> None:
    """Write a first recipe from a model, your data, a budget and a purpose. What no flag says is asked.

    It looks at the data and at this machine, takes the first way of training that fits memory and budget, and says the
    next command. A file that is there is never replaced.
    """
    from ..planning.first_recipe import SCHEMA, CannotStart, RecipeRequest, first_recipe

    if file.suffix not in (".yaml", ".yml"):
        raise CannotStart(f"{file}: a recipe's name ends in .yaml; did you mean {file}.yaml?")
    if file.exists():
        raise CannotStart(f"{file} is there already, and is not replaced. Give another name: shoestring init NAME.yaml")
    interactive = any(each is None for each in (model, data, budget))
    there = Path(CARRIED, "config.json").exists()
    model = model or _ask("--model", "Which model? A folder, or a name of the hub", CARRIED if there else None)
    data = data or _ask("--data", "Which data? A file, folder or glob; python-docstrings is on every machine", None)
    budget = budget or _ask("--budget", "How much may it spend? Like $5, 30 min or 3 epochs", "10 min")
    request = RecipeRequest.of(model, data, budget, purpose)
    typer.echo(f"data         {_seen(request)}")
    if purpose is None and interactive:
        request = RecipeRequest.of(
            model, data, budget, _ask("--for", "What for? chat, text or classify", request.purpose)
        )
    made = first_recipe(request, file.stem)
    from ...recipes import recipe_schema

    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(made.text)
    (file.parent / SCHEMA).write_text(as_json_text(recipe_schema()) + "\n")
    _tell(made, file, counted=request.look.all)


def _ask(flag: str, question: str, default: str | None) -> str:
    """An answer from the keyboard or a pipe; empty takes the default."""
    from ..planning.first_recipe import CannotStart

    try:
        answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip()
    except EOFError:
        answer = ""
        if default is None:
            raise CannotStart(f"{flag} is missing, and nobody answers: give it on the command line.") from None
    if not answer and default is None:
        raise CannotStart(f"{flag}: an answer is needed. {question}.")
    return answer or str(default)


def _seen(request: RecipeRequest) -> str:
    look = request.look
    if look.kind == "unknown":
        return f"{request.data}: a name of the hub, which is read when it is trained on"
    rows = f"{look.rows:,} rows" if look.all else f"more than {look.rows:,} rows"
    kind = {"chats": "questions and answers", "texts": "texts", "labels": f"texts, each with its {look.label_column}"}
    form = f" ({look.shape})" if look.shape else ""
    return f"{rows} of {kind[look.kind]}{form}, 95 % of at most {look.characters:,} characters"


def _tell(made: FirstRecipe, file: Path, *, counted: bool) -> None:
    from .display import dollars, number, seconds

    predicted = made.plan.predictions
    typer.echo(f"machine      {made.plan.devices} x {made.plan.hardware}, {made.plan.strategy}")
    typer.echo(f"way          {WAYS[made.way]}" + _of(predicted.get("trainable"), predicted.get("parameters"), number))
    if predicted.get("steps") is not None:
        cost = f"{seconds(predicted['seconds'])}, {dollars(predicted['usd'])}"
        typer.echo(f"estimate     {predicted['steps']:,.0f} steps, {cost}{_passes(made.passes, counted)}")
    for warning in made.plan.warnings:
        typer.echo(f"note         {warning}")
    typer.echo(f"written      {file}\nnext         shoestring train {file}")


def _of(trained: int | None, parameters: int | None, number: Callable[[float | None], str]) -> str:
    return f": {number(trained)} of {number(parameters)} parameters" if trained and parameters else ""


def _passes(passes: float | None, counted: bool) -> str:
    if passes is None:
        return ""
    said = f", {'about' if counted else 'at most'} {passes:.1f} passes over the data"
    return said if passes >= 1 else f"{said}: the budget is short of one"
