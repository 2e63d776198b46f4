"""Prompts, answers and chats as tokens, with those that are trained on: the assistant's, and the end of its turns.

A chat is rendered by the tokenizer's own template, or by `TEMPLATE` where it has none. Which characters of it are the
assistant's is told by the template itself where it marks them (`{% generation %}`); else each answer lies between what
the template writes before it (the messages so far and its generation prompt) and what it writes with it. Where the
template writes these differently once more messages follow, and the answer is not found at its place either, the chat
is refused: a guess would train on the wrong tokens.

A token is trained where any of its characters is the assistant's, as transformers counts it, and an end-of-text token
right after an answer is, always: a model that is never taught to stop does not stop. A text that spells a special
token is text: only the template writes special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ...problems import clip
from .errors import TaskError
from .tokenizers import Offsets, encode_plain, exact_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["answers", "last", "all"]
# for tokenizers without one: plain text, so that no new token needs training; it is saved with the model
TEMPLATE = (
    "{%- if tools %}{{ raise_exception('this template has no place for tools') }}{% endif -%}"
    "{%- for message in messages -%}"
    "{{ '### ' + message.role | capitalize + ':\n' }}"
    "{%- if message.role == 'assistant' -%}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{{ '\n\n' }}"
    "{%- else -%}{{ message.content + '\n\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Assistant:\n' }}{%- endif -%}"
)
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
PRIVATE = [chr(point) for point in range(0xE000, 0xF8FF)]  # of which a text that spells special tokens has not all

Span = tuple[int, int]


class Tokens(NamedTuple):
    """Token numbers of one row, and for each whether it is trained on; both of one length."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class _Rendered:
    """A row as text. spans: the characters that are trained on. opens: whether a beginning-of-text token is missing.

    parts: the text cut where it spells special tokens: (characters it stands for, text, whether it is one).
    """

    text: str
    spans: list[Span]
    opens: bool
    parts: list[tuple[int, str, bool]]


class Answers:
    """Turns canonical rows (see `shapes`) into tokens.

    Args:
        train_on: Every answer, the last one of each chat, or all tokens.

    Raises:
        TaskError: The template refuses a chat, or its answers cannot be told from the rest.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "answers") -> None:
        self.tokenizer, self.train_on = tokenizer, train_on
        if tokenizer.eos_token_id is None:
            raise TaskError(
                f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token, so a model cannot learn to stop."
            )
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        self._ends = {tokenizer.convert_tokens_to_ids(token) for token in special}
        self._exact = exact_offsets(tokenizer)

    def __call__(self, rows: list[str]) -> list[Tokens]:
        """The tokens of canonical rows."""
        rendered = [self._rendered(json.loads(row)) for row in rows]
        written = [text for row in rendered for _, text, spelled in row.parts if not spelled]
        spelled = [text for row in rendered for _, text, spelled in row.parts if spelled]
        encoded = iter(self._exact(written))
        plain = iter(encode_plain(self.tokenizer, spelled) if spelled else [])
        return [self._tokens(row, encoded, plain) for row in rendered]

    def _rendered(self, row: dict[str, Any]) -> _Rendered:
        row, marker, texts = self._without_specials(row)
        if "messages" in row:
            (text, spans), opens = self._chat(row["messages"], row.get("tools")), False
        else:
            text, spans = row["prompt"] + row["completion"], []
            if row["completion"]:
                spans = [(len(row["prompt"]), len(text))]
            opens = self.tokenizer.bos_token_id not in (None, self.tokenizer.eos_token_id)
        parts = []
        for number, part in enumerate(re.split(f"{marker}(\\d+){marker}", text) if texts else [text]):
            spelled = bool(number % 2)
            parts.append((len(part) + 2 * spelled, texts[int(part)] if spelled else part, spelled))
        return _Rendered(text, spans, opens, parts)

    def _without_specials(self, row: dict[str, Any]) -> tuple[dict[str, Any], str, list[str]]:
        """The row with numbers between markers in place of texts that spell special tokens; the marker; these texts."""
        whole = json.dumps(row, ensure_ascii=False)
        texts: list[str] = []
        if not self._special.search(whole):
            return row, "", texts
        marker = next(char for char in PRIVATE if char not in whole)

        def take(match: re.Match[str]) -> str:
            texts.append(match[0])
            return f"{marker}{len(texts) - 1}{marker}"

        def replaced(value: Any) -> Any:
            if isinstance(value, str):
                return self._special.sub(take, value)
            if isinstance(value, list):
                return [replaced(item) for item in value]
            if isinstance(value, dict):  # roles are what a template compares
                return {key: item if key == "role" else replaced(item) for key, item in value.items()}
            return value

        return replaced(row), marker, texts

    # -- which characters are the assistant's --------------------------------------------------------------------------
    def _chat(self, messages: list[dict[str, Any]], tools: Any) -> tuple[str, list[Span]]:
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [number for number in answers if messages[number].get("train", True)]
        if self.train_on == "last":
            trained = trained[-1:]
        messages = [{name: value for name, value in each.items() if name != "train"} for each in messages]
        if _MARKS.search(self.tokenizer.get_chat_template(tools=tools)):
            text, spans = self._marked(messages, tools)
            if len(spans) == len(answers):
                return text, [span for number, span in zip(answers, spans, strict=True) if number in trained]
            if len(trained) == len(answers):  # several marks an answer, as one for its thoughts
                return text, spans
        text = self._text(messages, tools)
        return text, [self._between(messages, tools, number, text) for number in trained]

    def _between(self, messages: list[dict[str, Any]], tools: Any, number: int, whole: str) -> Span:
        """Where the answer that is message `number` lies: what the template adds for it, without white space after."""
        content = messages[number]["content"]
        before = self._text(messages[:number], tools, prompt=True)
        if not whole.startswith(before):  # a prompt of its own, as one that opens thoughts
            before = self._text(messages[:number], tools)
        if whole.startswith(before):
            after = self._text(messages[: number + 1], tools)
            if whole.startswith(after) and len(after.rstrip()) > len(before):
                return len(before), len(after.rstrip())
            for said in (content, content.strip()):
                if said and whole.startswith(said, len(before)):
                    end = len(before) + len(said)
                    closing = self._special.match(whole, end)
                    return len(before), closing.end() if closing else end
        raise TaskError(
            f"the chat template of {self.tokenizer.name_or_path!r} has no {{% generation %}} marks, and writes the "
            f"answer {clip(content)!r} differently once others follow, so it cannot be told from the rest. Set "
            "data.train_on: last, or data.chat_template to a template with marks."
        )

    def _marked(self, messages: list[dict[str, Any]], tools: Any) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        specials: dict[str, Any] = self.tokenizer.special_tokens_map
        with _refusals():
            rendered: Any = render_jinja_template(
                [messages], tools, chat_template=self.tokenizer.get_chat_template(tools=tools),
                return_assistant_tokens_mask=True, **specials,
            )  # fmt: skip
        (text,), (spans,) = rendered
        return text, [(start, end) for start, end in spans if end > start]

    def _text(self, messages: list[dict[str, Any]], tools: Any, prompt: bool = False) -> str:
        if not messages:
            return ""
        with _refusals():
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        return str(text)

    # -- tokens --------------------------------------------------------------------------------------------------------
    def _tokens(self, row: _Rendered, encoded: Iterator[Offsets], plain: Iterator[list[int]]) -> Tokens:
        """The next tokens of `encoded`, and of `plain` where a text spells a special token, are this row's."""
        inside = bytearray(len(row.text))
        for start, end in row.spans:
            inside[start:end] = b"\1" * (end - start)
        ids, trained, at = [], [], 0
        if row.opens:
            ids, trained = [self.tokenizer.bos_token_id], [False]
        for length, _, spelled in row.parts:
            new = [(number, 0, length) for number in next(plain)] if spelled else next(encoded)
            for number, first, last in new:
                ids.append(number)
                trained.append(inside.find(1, at + first, at + max(last, first + 1)) >= 0)
            at += length
        closes = bool(row.spans) and not row.text[row.spans[-1][1] :].strip()
        self._end(ids, trained, closes)
        return Tokens(ids, [True] * len(ids) if self.train_on == "all" else trained)

    def _end(self, ids: list[int], trained: list[bool], closes: bool) -> None:
        """Teach to stop. closes: nothing but white space follows the last answer."""
        end = self.tokenizer.eos_token_id
        for i in range(1, len(ids)):
            trained[i] |= trained[i - 1] and ids[i] == end and ids[i - 1] != end
        if not closes or not any(trained):
            return
        last = max(i for i, one in enumerate(trained) if one)
        if ids[last] not in self._ends:
            del ids[last + 1 :], trained[last + 1 :]  # white space that would stand between the answer and its end
            ids.append(end)
            trained.append(True)


@contextmanager
def _refusals() -> Iterator[None]:
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        raise TaskError(f"the chat template refuses a chat: {error}") from error
    except (TypeError, ValueError) as error:
        raise TaskError(f"the chat template cannot be used: {error}") from error


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer with a template for chats: the one given, its own, or `TEMPLATE`."""
    if template is not None:
        tokenizer.chat_template = template
    elif not tokenizer.chat_template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer
