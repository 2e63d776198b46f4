"""Chats and prose that the machine has already."""

from __future__ import annotations

import json

from shoestring.trainer.data.installed import package_descriptions, python_docstrings


def test_docstrings_are_chats_of_one_question_and_a_sentence() -> None:
    corpus = python_docstrings(limit=300)
    chats = [json.loads(row)["messages"] for row in corpus.texts]
    assert corpus.shaped and len(chats) == 300 == len(corpus.groups or ())
    assert all([message["role"] for message in chat] == ["user", "assistant"] for chat in chats)
    said = {question["content"]: answer["content"] for question, answer in chats}
    question = "What is `Coroutine.close(self)` of the module _collections_abc for?"
    assert said.get(question) == "Raise GeneratorExit inside coroutine."
    assert all(answer.endswith((".", "!", "?")) and "\n" not in answer for answer in said.values())
    assert not any("`_" in question or "._" in question.split(" of the module ")[0] for question in said)
    assert corpus.fingerprint == python_docstrings(limit=300).fingerprint != python_docstrings(limit=299).fingerprint


def test_packages_describe_themselves() -> None:
    corpus = package_descriptions()
    described = dict(zip(corpus.groups or (), corpus.texts, strict=True))
    assert "lightning" in described["pytorch-lightning"].lower() and len(described["numpy"]) > 500
    assert list(described) == sorted(described) and not any(
        text.strip() in ("", "UNKNOWN") for text in described.values()
    )
    assert list(package_descriptions(limit=3).texts) == list(corpus.texts)[:3]
