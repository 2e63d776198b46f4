"""Rows that say which answer is better, or whether an answer is wanted, in the shapes that TRL reads.

Their canonical forms (see `shapes`), where a prompt and its answers are texts, or lists of messages:

    {"prompt": …, "chosen": …, "rejected": …}
    {"prompt": …, "completion": …, "label": true}

Without a prompt, what both answers begin with is their prompt: all messages that are alike, or the text up to the first
difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from .errors import BadRow, TaskError
from .rows import Place, kind_of
from .shapes import Shape, json_of, messages_of

Said = str | list[dict[str, Any]]  # a text, or messages
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}  # as csv files spell them


def _pair(place: Place, row: Mapping[str, Any]) -> dict[str, Any]:
    chosen, rejected = (_said(place, name, row.get(name)) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(
            f"data.source: {place}: of chosen and rejected one is a text and the other a list of messages.",
            "answers of two kinds",
        )
    given = row.get("prompt")
    shared = 0 if isinstance(chosen, str) and given is not None else _shared(chosen, rejected)
    prompt: Said = chosen[:shared]
    if given is not None and not shared:
        prompt = _said(place, "prompt", given)
        if isinstance(prompt, str) and not isinstance(chosen, str):
            prompt = [{"role": "user", "content": prompt}]
    elif given is not None and isinstance(given, list):  # the answers repeat it, or begin alike themselves
        prompt = _said(place, "prompt", given)
        shared = len(prompt) if chosen[: len(prompt)] == prompt else 0
    read = {"prompt": prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}
    if chosen == rejected:
        raise BadRow(
            f"data.source: {place}: chosen and rejected are alike, so there is nothing to prefer.", "answers alike"
        )
    for name in ("chosen", "rejected"):
        _check_answer(place, name, read["prompt"], read[name])
    return {**read, **_tools(place, row)}


def _judged(place: Place, row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, completion = (_said(place, name, row.get(name)) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and not isinstance(completion, str):
        prompt = [{"role": "user", "content": prompt}]
    _check_answer(place, "completion", prompt, completion)
    label = row.get("label")
    liked = label if isinstance(label, bool) else LABELS.get(str(label).strip().lower())
    if liked is None:
        raise BadRow(f"data.source: {place}, label, is {label!r}; true (wanted) or false is needed.", "without a label")
    return {"prompt": prompt, "completion": completion, "label": liked, **_tools(place, row)}


PREFERENCES = {
    "preference": Shape(("chosen", "rejected"), _pair, ("prompt", "tools")),
    "unpaired-preference": Shape(("prompt", "completion", "label"), _judged, ("tools",)),
}


def exchange(row: Mapping[str, Any], completion: Said) -> dict[str, Any]:
    """One answer to the prompt of a row, as `chats.Answers` takes it; the prompt is not trained on."""
    prompt = row["prompt"]
    if isinstance(completion, str):
        return {"prompt": prompt, "completion": completion}
    tools = {"tools": row["tools"]} if "tools" in row else {}
    return {"messages": [{**message, "train": False} for message in prompt] + completion, **tools}


def answers_of(row: Mapping[str, Any]) -> Iterator[tuple[Said, bool]]:
    """The answers of a row, and whether each is wanted."""
    if "completion" in row:
        yield row["completion"], row["label"]
    else:
        yield row["chosen"], True
        yield row["rejected"], False


# -- reading -----------------------------------------------------------------------------------------------------------
def _said(place: Place, column: str, value: Any) -> Said:
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        return value
    if not isinstance(value, str | list):
        raise BadRow(
            f"data.source: {place}, {column}, is {kind_of(value)}; a text or a list of messages is needed.",
            "neither text nor messages",
        )
    try:
        return messages_of(place, column, value)
    except TaskError:
        if isinstance(value, str):  # a text that only begins like messages in JSON
            return value
        raise


def _shared(chosen: Said, rejected: Said) -> int:
    """What both begin with: so many messages, or characters, of which a last space belongs to the answers."""
    alike = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    spaced = isinstance(chosen, str) and chosen[:alike].endswith(" ")
    return alike - spaced


def _check_answer(place: Place, column: str, prompt: Said, answer: Said) -> None:
    if isinstance(prompt, str) != isinstance(answer, str):
        raise BadRow(
            f"data.source: {place}: the prompt is a list of messages, and {column} is a text.", "answers of two kinds"
        )
    texts = [answer] if isinstance(answer, str) else [
        message["content"] or str(message.get("tool_calls", "")) for message in answer if message["role"] == "assistant"
    ]  # fmt: skip
    if not any(text.strip() for text in texts):
        raise BadRow(
            f"data.source: {place}: {column} has an empty answer, so nothing to train on.", "without an answer"
        )


def _tools(place: Place, row: Mapping[str, Any]) -> dict[str, Any]:
    tools = json_of(place, "tools", row.get("tools"))
    return {"tools": tools} if tools else {}
