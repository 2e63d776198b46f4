"""Preferences that every machine already has: docstrings as they were written, and as they were not."""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from .cache import digest
from .corpora import Corpus, of_texts, stdlib_trees

LONGEST = 400  # characters of the lines that open a function


class Documented(NamedTuple):
    """A function of the standard library: its file, the lines that open it, and the first line of its docstring."""

    path: str
    opening: str
    docstring: str


def docstring_preferences(limit: int | None = None) -> Corpus:
    """Functions of the standard library, each with its docstring's first line and the same words in another order.

    The prompt is the function's opening up to the quotes, what was written is chosen. Rows are in the canonical form of
    pairs (see `preference_shapes`), at most `limit` of them, and held out by file.
    """
    documented = list(islice(_documented(), limit))
    rows = [
        json.dumps({"prompt": each.opening, "chosen": each.docstring, "rejected": _mixed(each)}, ensure_ascii=False)
        for each in documented
    ]
    made = of_texts(rows, groups=[each.path for each in documented])
    return Corpus(made.texts, None, made.groups, made.fingerprint, shaped=True)


def _mixed(function: Documented) -> str:
    """Its docstring's words in an order that its text decides, and that is another one."""
    words = function.docstring.split()
    draw = random.Random(digest([function.path, function.opening, function.docstring]))
    order = list(words)
    while order == words:
        draw.shuffle(order)
    return " ".join(order)


def _documented() -> Iterator[Documented]:
    for path, text, tree in stdlib_trees():
        lines = text.split("\n")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (said := ast.get_docstring(node)):
                first = " ".join(said.split("\n", 1)[0].split())
                opening = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]) + '\n    """'
                if len(set(first.split())) >= 3 and len(opening) <= LONGEST:
                    yield Documented(path, opening.lstrip(), first)
