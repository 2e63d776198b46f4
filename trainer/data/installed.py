"""Chats and prose that every machine with Python has: questions about docstrings, and the descriptions of packages."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from .corpora import Corpus, of_texts, stdlib_trees

LONGEST = 400  # characters of an answer
UNDESCRIBED = re.compile(r"^(UNKNOWN\s*)?$")


def python_docstrings(limit: int | None = None) -> Corpus:
    """Chats about the running Python's standard library: what is asked is a signature, the answer its docstring's
    first paragraph. About 6,000 for CPython 3.11, one turn each; the group is the file.

    limit: at most so many, from the files in their order.
    """
    rows = list(islice(_questions(), limit))
    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for _, question, answer in rows
    ]
    texts = [json.dumps(chat, ensure_ascii=False, separators=(",", ":")) for chat in chats]
    corpus = of_texts(texts, groups=[path for path, _, _ in rows])
    return Corpus(corpus.texts, None, corpus.groups, corpus.fingerprint, shaped=True)


def package_descriptions(limit: int | None = None) -> Corpus:
    """What the packages that are installed here say of themselves: their long descriptions, mostly Markdown.

    They are sorted by name, and differ from machine to machine as the packages do. limit: at most so many.
    """
    from importlib.metadata import distributions

    described: dict[str, str] = {}
    for package in distributions():
        about: Any = package.metadata
        text = about["Description"] or str(about.get_payload())
        if about["Name"] and not UNDESCRIBED.match(text):
            described.setdefault(about["Name"].lower(), text)
    names = sorted(described)[:limit]
    return of_texts([described[name] for name in names], groups=names)


def _questions() -> Iterator[tuple[str, str, str]]:
    """(file, question, answer) of every public function, method and class that says in words what it does."""
    for path, _, tree in stdlib_trees():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name, node in _documented(tree, ()):
            answer = _first_paragraph(ast.get_docstring(node, clean=False) or "")
            if answer:
                yield path, f"What is {name} of the module {module} for?", answer


Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _documented(node: ast.AST, within: tuple[str, ...]) -> Iterator[tuple[str, Documented]]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Documented) or child.name.startswith("_"):
            continue
        path = (*within, child.name)
        signature = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
        yield f"`{'.'.join(path)}{signature}`", child
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, path)


def _first_paragraph(docstring: str) -> str:
    """On one line; empty where it is long, or does not end as a sentence does."""
    text = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    return text if len(text) <= LONGEST and text.endswith((".", "!", "?")) and " " in text else ""
