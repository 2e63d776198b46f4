"""What a row teaches, whatever the shape it comes in: a text, a prompt and its completion, or a chat.

Rows of other people's data sets are recognised by their columns, or named in `data.format`. Each becomes one line of
JSON, its *canonical* form, which is what is held out, kept on disk and turned into tokens:

    {"prompt": "…", "completion": "…"}                 the completion is trained on
    {"messages": [{"role": …, "content": …}, …]}       the assistant's messages are, with "tools" where there are some

Source of the shapes: the OpenAI fine-tuning format, FastChat's ShareGPT, Stanford Alpaca.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ...problems import clip
from ...spelling import nearest
from .errors import BadRow, TaskError, unknown
from .labels import Kind
from .rows import Columns, Place, kind_of, text_of

ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "bing": "assistant",
    "chatgpt": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "developer": "developer",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
NO_BREAK = "\N{NO-BREAK SPACE}"
KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")  # of a message, for its template


@dataclass(frozen=True)
class Shape:
    """One shape of rows. needs, takes: the columns that it must have, and those that it reads where they are."""

    needs: tuple[str, ...]
    read: Callable[[Place, Mapping[str, Any]], dict[str, Any]]
    takes: tuple[str, ...] = ()

    def canonical(self, place: Place, row: Mapping[str, Any]) -> str:
        """The row as one line of JSON; raises `BadRow` where it cannot be trained on."""
        return json.dumps(self.read(place, row), ensure_ascii=False, separators=(",", ":"))


def _prompt_completion(place: Place, row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):  # both as messages
        prompts = messages_of(place, "prompt", prompt)
        answered = messages_of(place, "completion", completion)
        return _chat(place, [{**message, "train": False} for message in prompts] + answered, row)
    pair = {name: text_of(place, row, name, key="data.format: prompt-completion") for name in ("prompt", "completion")}
    return _answered(place, pair, pair["completion"])


def _question_answer(place: Place, row: Mapping[str, Any]) -> dict[str, Any]:
    return _exchange(place, row, "question", "answer", "data.format: question-answer")


def _alpaca(place: Place, row: Mapping[str, Any]) -> dict[str, Any]:
    key = "data.format: alpaca"
    if given := _optional(place, row, "input", key):
        row = {**row, "instruction": f"{text_of(place, row, 'instruction', key=key)}\n\n{given}"}
    return _exchange(place, row, "instruction", "output", key)


def _exchange(place: Place, row: Mapping[str, Any], question: str, answer: str, key: str) -> dict[str, Any]:
    """One question and its answer, with the turns before them in `history` and a `system` message."""
    messages = []
    if system := _optional(place, row, "system", key):
        messages.append({"role": "system", "content": system})
    for pair in row.get("history") or ():
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow(f"{key}: {place}, history, found {clip(str(pair))}; a pair of texts is needed.", "no history")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    text = text_of(place, row, answer, key=key)
    messages.append({"role": "user", "content": text_of(place, row, question, key=key)})
    messages.append({"role": "assistant", "content": text})
    return _answered(place, {"messages": messages}, text)


def _optional(place: Place, row: Mapping[str, Any], column: str, key: str) -> str:
    """A text that may be missing; "" for one without a word. Raises `BadRow` for what is no text."""
    text = "" if row.get(column) is None else text_of(place, row, column, key=key)
    return text if text.strip() else ""


def _of_messages(column: str) -> Callable[[Place, Mapping[str, Any]], dict[str, Any]]:
    return lambda place, row: _chat(place, messages_of(place, column, row.get(column)), row)


SHAPES: dict[str, Shape] = {
    "messages": Shape(("messages",), _of_messages("messages"), ("tools",)),
    "sharegpt": Shape(("conversations",), _of_messages("conversations"), ("tools", "system")),
    "alpaca": Shape(("instruction", "output"), _alpaca, ("input", "system", "history")),
    "prompt-completion": Shape(("prompt", "completion"), _prompt_completion, ("tools",)),
    "question-answer": Shape(("question", "answer"), _question_answer, ("system",)),
}


def shape_of(columns: Collection[str], text_column: str | None, shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of rows with these columns; None: of texts, or of none that is known.

    text_column: None where rows of texts are none to choose from.

    Raises `TaskError` where there are several, as a column of texts beside one of chats.
    """
    present = set(columns)
    fits = [name for name, shape in shapes.items() if present.issuperset(shape.needs)]
    texts = ["text"] if text_column in present else []
    if len(fits) + len(texts) > 1:
        raise TaskError(
            f"data.format: auto: rows could be read as {' or '.join([*texts, *fits])} (their columns are "
            f"{', '.join(sorted(present))}). Set data.format to {' or '.join(['plain'] * bool(texts) + fits)}."
        )
    return shapes[fits[0]] if fits else None


class Reading:
    """How the rows of one source are read: what they are is settled by the first one.

    Args:
        text_column: Of rows that are a text.
        label: The column of labels, where they are wanted.
        wanted: The shape that `data.format` names; None: what the columns say.
        chats: Whether rows may be more than a text.
        named: Our name of a column -> the file's, where that is another.
        only: The shapes that rows must have one of, where a text alone teaches nothing.
        kind: What labels are.

    Raises:
        TaskError: `wanted` is none of the shapes that there are to choose from.
    """

    def __init__(
        self, text_column: str, label: str | None, wanted: str | None, *, chats: bool, named: Mapping[str, str] = {},
        only: Mapping[str, Shape] | None = None, kind: Kind = "single-label",
    ) -> None:  # fmt: skip
        self.text_column = named.get("text", text_column)
        self.label = None if label is None else named.get("label", label)
        self._only, self.kind = only, kind
        known = {"plain": None, **SHAPES} if only is None else only
        if wanted is not None and wanted not in known:
            raise unknown("data.format", wanted, ["auto", *known])
        self.shape = known.get(wanted or "")
        self._open = chats and wanted is None
        unlabelled = {ours: theirs for ours, theirs in named.items() if ours != "label" or label is not None}
        self._named, self._renamed = unlabelled, {k: v for k, v in unlabelled.items() if k not in ("text", "label")}

    def columns(self, present: Collection[str]) -> Columns:
        """The columns to read of those that a file has."""
        theirs = self._renamed.values()
        ours = {name for name in present if name not in theirs and name not in self._renamed}
        ours |= {name for name, their in self._renamed.items() if their in present}
        if self._open:
            self.shape, self._open = self._recognised(ours), False
        if self.shape is None:
            return Columns(self.text_column, self.label, named=self._named)
        names = [self._renamed.get(name, name) for name in self.shape.needs]
        names += [self._renamed.get(name, name) for name in self.shape.takes if name in ours]
        return Columns(names[0], self.label, tuple(names[1:]), self._named)

    def _recognised(self, present: Collection[str]) -> Shape | None:
        if self._only is None:
            return shape_of(present, self.text_column, SHAPES)
        shape = shape_of(present, None, self._only)
        if shape is None:
            known = "; or ".join(" and ".join(each.needs) for each in self._only.values())
            raise TaskError(f"data.source: rows have the columns {', '.join(sorted(present))}; needed are {known}.")
        return shape

    def text(self, place: Place, row: Mapping[str, Any]) -> str:
        """The row as a text, or in its canonical form; raises `BadRow`."""
        if self.kind == "words":
            return words_of(place, row, self.text_column)
        if self.shape is None:
            return text_of(place, row, self.text_column)
        if self._renamed:
            kept = {name: value for name, value in row.items() if name not in self._renamed.values()}
            row = kept | {ours: row[theirs] for ours, theirs in self._renamed.items() if theirs in row}
        return self.shape.canonical(place, row)

    @property
    def key(self) -> str:
        """What it asks for, as a part of a cache's key."""
        needs, others = self.shape.needs if self.shape else "", " ".join(self._only or ())
        named = sorted(self._named.items())
        return f"{self.text_column} {self.label or ''} {needs} {self._open} {named} {others} {self.kind}"


def words_of(place: Place, row: Mapping[str, Any], column: str) -> str:
    """A row's words with a space between each two; a space within a word becomes one that does not part words."""
    words = json_of(place, column, row.get(column))
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise BadRow(
            f"data.text_column {column!r}: {place} is {kind_of(words)}; a list of words is needed.", "no list of words"
        )
    return " ".join(word.replace(" ", NO_BREAK) or NO_BREAK for word in words)


# -- messages ----------------------------------------------------------------------------------------------------------
def _chat(place: Place, messages: list[dict[str, Any]], row: Mapping[str, Any]) -> dict[str, Any]:
    system = _optional(place, row, "system", "data.source")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if not any(message["role"] == "assistant" and message.get("train", True) for message in messages):
        raise BadRow(f"data.source: {place} has no message of the assistant to train on.", "without an answer")
    tools = json_of(place, "tools", row.get("tools"))
    return {"messages": messages, **({"tools": tools} if tools else {})}


def messages_of(place: Place, column: str, value: Any) -> list[dict[str, Any]]:
    value = json_of(place, column, value)
    if not isinstance(value, list) or not value:
        description = "an empty list" if value == [] else kind_of(value)
        raise BadRow(f"data.source: {place}, {column!r} is {description}; a list of messages is needed.", "no messages")
    return [_message(f"{place}, message {number}", message) for number, message in enumerate(value, 1)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRow(f"data.source: {where} is {kind_of(message)}; {{role: …, content: …}} is needed.", "no message")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if role is None:
        raise BadRow(f"data.source: {where} has no role (it has {', '.join(map(repr, message))}).", "without a role")
    if not isinstance(role, str) or role not in ROLES:
        near = nearest(str(role), ROLES)
        guess = f" Did you mean {near!r}?" if near else ""
        raise BadRow(f"data.source: {where} has the role {role!r}.{guess} Known: {', '.join(ROLES)}.", "unknown role")
    read = {"role": ROLES[role], "content": _content(where, content, silent=bool(message.get("tool_calls")))}
    kept = {name: message[name] for name in KEPT if message.get(name) is not None}
    trained = message.get("train", message.get("weight", 1))
    return {**read, **kept} if trained in (True, 1, None) else {**read, **kept, "train": False}


def _content(where: str, content: Any, *, silent: bool) -> str:
    """The text of a message. silent: it calls tools, and need not say anything."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type", "?") if isinstance(part, Mapping) else kind_of(part)
                said = f"data.source: {where} has a part of type {kind!r}; only parts of text are read."
                raise BadRow(said, "a part that is no text")
        return "".join(part["text"] for part in content)
    if content is None and silent:
        return ""
    if not isinstance(content, str):
        raise BadRow(f"data.source: {where}, content, is {kind_of(content)}; a text is needed.", "content is no text")
    return content


def json_of(place: Place, column: str, value: Any) -> Any:
    """A value that may be spelled as JSON in a column of text, as csv files have it."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow(f"data.source: {place}, {column!r} is a text and no JSON: {error}", "not JSON") from error


def _answered(place: Place, canonical: dict[str, Any], answer: str) -> dict[str, Any]:
    if not answer.strip():
        raise BadRow(f"data.source: {place} has an empty answer, so nothing to train on.", "empty answer")
    return canonical
