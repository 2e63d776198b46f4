"""Chats and prose that the machine has already."""

from __future__ import annotations

import json

from shoestring.trainer.data.installed import package_descriptions, python_docstrings


def test_docstrings_are_chats_of_one_question_and_a_sentence() -> None:
    found = python_docstrings(limit=300)
    chats = [json.loads(row)["messages"] for row in found.texts]
    assert found.shaped and len(chats) == 300 == len(found.groups or ())
    assert all([message["role"] for message in chat] == ["user", "assistant"] for chat in chats)
    said = {asked["content"]: answer["content"] for asked, answer in chats}
    asked = "What is `Coroutine.close(self)` of the module _collections_abc for?"
    assert said.get(asked) == "Raise GeneratorExit inside coroutine."
    assert all(answer.endswith((".", "!", "?")) and "\n" not in answer for answer in said.values())
    assert not any("`_" in question or "._" in question.split(" of the module ")[0] for question in said)
    assert found.fingerprint == python_docstrings(limit=300).fingerprint != python_docstrings(limit=299).fingerprint


def test_packages_describe_themselves() -> None:
    found = package_descriptions()
    described = dict(zip(found.groups or (), found.texts, strict=True))
    assert "lightning" in described["pytorch-lightning"].lower() and len(described["numpy"]) > 500
    assert list(described) == sorted(described) and not any(
        text.strip() in ("", "UNKNOWN") for text in described.values()
    )
    assert list(package_descriptions(limit=3).texts) == list(found.texts)[:3]
