"""What must hold between a recipe's task, its problem and its loss; see `rules`."""

from __future__ import annotations

from collections.abc import Iterator

from .recipe import Recipe
from .rule import Broken, depends_on

CLASSIFIERS = ("sequence-classification", "image-classification")
ONE_CLASS = ("python-packages",)  # data that every machine has, with labels
WHOLE_LOGITS = ("masked-lm", "seq2seq", "sequence-classification", "token-classification", "image-classification")


@depends_on("model.task", "model.problem", "data.source")
def problem_fits(recipe: Recipe) -> Iterator[Broken]:
    model, source = recipe.model, recipe.data.source
    if model.problem == "single-label":
        return
    if model.task != "sequence-classification":
        yield Broken("model.problem", f"single-label for {model.task}", "only sequence-classification has others")
    elif source in ONE_CLASS:
        yield Broken("model.problem", f"single-label for {source}", "each of its rows has one class")


@depends_on("model.task", "model.problem", "model.class_weights")
def class_weights_fit(recipe: Recipe) -> Iterator[Broken]:
    model = recipe.model
    if model.class_weights is not None and (model.task not in CLASSIFIERS or model.problem != "single-label"):
        hint = f"they are for {' and '.join(CLASSIFIERS)} with problem single-label"
        yield Broken("model.class_weights", f"null for {model.task} with problem {model.problem}", hint)


@depends_on("model.task", "model.chunked_loss")
def chunks_fit(recipe: Recipe) -> Iterator[Broken]:
    if recipe.model.chunked_loss is True and recipe.model.task in WHOLE_LOGITS:
        hint = "only causal-lm computes its loss in chunks"
        yield Broken("model.chunked_loss", f"auto | false for {recipe.model.task}", hint)


@depends_on("model.task", "techniques")
def labels_are_of_their_places(recipe: Recipe) -> Iterator[Broken]:
    task = recipe.model.task
    for technique in recipe.techniques if task in ("masked-lm", "seq2seq", "token-classification") else ():
        if technique.name == "distillation" and technique.settings.get("shift", True) is not False:
            hint = "a position predicts its own label, not the next one: write {shift: false} among its settings"
            yield Broken("techniques.distillation", f"shift: false for {task}", hint, "shift: true")


@depends_on("model.task", "data.train_on", "data.chat_template", "techniques")
def sources_have_targets(recipe: Recipe) -> Iterator[Broken]:
    """What is meant for one text with some of its tokens trained on."""
    data = recipe.data
    if recipe.model.task != "seq2seq":
        return
    if data.train_on != "answers":
        yield Broken("data.train_on", "answers for seq2seq", "a target is trained on, and nothing of its source")
    if data.chat_template is not None:
        yield Broken("data.chat_template", "null for seq2seq", "a source is what was asked, as it stands")
    for number, technique in enumerate(recipe.techniques):
        if technique.name == "sequence_length_warmup":
            hint = "it would cut a source and leave its target: sort them by length with data.group_by_length"
            yield Broken(f"techniques[{number}]", "no sequence_length_warmup for seq2seq", hint, technique.name)
