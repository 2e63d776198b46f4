"""A page for every registered technique: its card, settings, docstring, neighbours and measured figures."""

from __future__ import annotations

import inspect
from itertools import combinations

from shoestring import ShoestringError
from shoestring.callbacks.catalog.compose import compose
from shoestring.callbacks.catalog.registry import TECHNIQUES, names, technique_class
from shoestring.callbacks.contract import Technique
from shoestring.trainer.cli.technique_table import technique_table

from .markdown import cell, code, directive, page, table
from .results import about

Verdict = tuple[str, str]  # refused | warned | ordered | free, and the sentence that `compose` says


def pages() -> dict[str, str]:
    together = verdicts()
    made = {f"techniques/{name}.md": _page(name, together) for name in names()}
    return {"techniques/index.md": _index(), **made}


def verdicts() -> dict[tuple[str, str], Verdict]:
    """What `compose` says of every pair: on a machine that has what both need."""
    examples = {name: technique_class(name).example() for name in names()}
    return {pair: _verdict(*(examples[name] for name in pair)) for pair in combinations(names(), 2)}


def _verdict(first: Technique, second: Technique) -> Verdict:
    try:
        composition = compose([first, second], first.needs() | second.needs())
    except ShoestringError as error:
        return "refused", str(error)
    if composition.warnings:
        return "warned", composition.warnings[0]
    return ("ordered", composition.reasons[0]) if composition.reasons else ("free", "")


def _index() -> str:
    rows = technique_table().replace("| `", "| {doc}`").splitlines()
    return page(
        "# Techniques",
        "Every technique is an ordinary Lightning callback with a *card*: what it does, what it saves, what it keeps. "
        "`keeps` says how close the result is to that of a run without it: `bits` is the same weights bit for bit, "
        "`result` the same up to rounding, `quality` another path to the same goal.",
        "What a card says is a claim. The figures that were measured here are linked from each page.",
        "\n".join(rows),
        "```{toctree}\n:hidden:\n\n" + "\n".join(names()) + "\n```",
    )


def _page(name: str, together: dict[tuple[str, str], Verdict]) -> str:
    cls = technique_class(name)
    return page(
        f"# {name}",
        f"{cls.card.does[:1].upper()}{cell(cls.card.does[1:])}.",
        _card(cls),
        "## Settings",
        _settings(cls),
        f"In a recipe:\n\n```yaml\ntechniques:\n  - {_as_written(name, cls)}\n```",
        "## In Python",
        _documented(name, cls),
        "## Together with other techniques",
        _neighbours(name, together),
        "## Measured",
        _measured(name, cls),
    )


def _card(cls: type[Technique]) -> str:
    card = cls.card
    paper = f"[arXiv {card.paper}](https://arxiv.org/abs/{card.paper})" if card.paper else "none"
    sets = ("saves", "reads", "writes", "needs", "refuses")
    rows = [[kind, ", ".join(map(code, sorted(getattr(card, kind)))) or "nothing"] for kind in sets]
    return table(["card", ""], [["paper", paper], ["keeps", code(card.keeps)], *rows])


def _settings(cls: type[Technique]) -> str:
    given = [p for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_KEYWORD]
    if not given:
        return "It has none."
    rows = [[code(p.name), _default(p), code(p.annotation) if p.annotation is not p.empty else ""] for p in given]
    return table(["setting", "default", "type"], rows)


def _default(parameter: inspect.Parameter) -> str:
    return "*must be given*" if parameter.default is parameter.empty else code(repr(parameter.default))


def _as_written(name: str, cls: type[Technique]) -> str:
    """One line of YAML: the name, and one setting that differs from its default, if any."""
    settings = cls.example().settings()
    defaults = {p.name: p.default for p in inspect.signature(cls).parameters.values()}
    own = {k: v for k, v in settings.items() if v != defaults.get(k) and isinstance(v, int | float | str)}
    inside = ", ".join(f"{key}: {value}" for key, value in list(own.items())[:2])
    return f"{name}: {{{inside}}}" if inside else name


def _documented(name: str, cls: type[Technique]) -> str:
    """The class as Sphinx reads it, and the class that its settings come from, where that is another."""
    package = "shoestring.callbacks" if name in TECHNIQUES else cls.__module__
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    parts = [directive("autoclass", f"{package}.{cls.__name__}")]
    if owner is not cls and owner.__doc__ and issubclass(owner, Technique):
        parts.append(f"Its settings are those of `{owner.__name__}`:")
        parts.append(directive("autoclass", f"{owner.__module__}.{owner.__name__}", ":no-index:"))
    return "\n\n".join(parts)


def _neighbours(name: str, together: dict[tuple[str, str], Verdict]) -> str:
    by_verdict: dict[str, list[tuple[str, str]]] = {"refused": [], "warned": [], "ordered": [], "free": []}
    for pair, (verdict, sentence) in together.items():
        if name in pair:
            other = pair[1] if pair[0] == name else pair[0]
            by_verdict[verdict].append((other, sentence))
    meanings = {"refused": "refused", "warned": "allowed, with a warning", "ordered": "allowed, in this order"}
    rows = [
        [f"[`{other}`]({other}.md)", meaning, cell(sentence)]
        for verdict, meaning in meanings.items()
        for other, sentence in by_verdict[verdict]
    ]
    independent = ", ".join(f"[`{other}`]({other}.md)" for other, _ in by_verdict["free"])
    return page(
        "This is what `compose` says of each pair before anything is spent.",
        table(["with", "verdict", "why"], rows) if rows else "",
        f"No rule is needed with {independent}." if independent else "",
    )


def _measured(name: str, cls: type[Technique]) -> str:
    links = [f"- [{title}](../results/{path})" for path, title in about(name, cls.__name__)]
    if not links:
        return "No benchmark of this repository names it yet. The card's claim is the paper's."
    return page("Pages of the benchmarks that name it, with date, machine, seeds and intervals:", "\n".join(links))
