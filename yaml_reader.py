"""A strict YAML reader that remembers where everything stands: the one for recipes, cluster files and hardware files.

The loaders that come with YAML libraries read `off` as False and `1e-4` as text, keep the last of two equal keys
without a word, build Python objects on request, expand nested aliases without limit and forget the line numbers. This
one reads parser events and builds a tree of `YamlNode`s: scalars as in YAML 1.2, no tags, no duplicate keys, and every
alias counted at its full size before anything is expanded.

Why not ruamel.yaml, which reads YAML 1.2 and keeps lines: its loader that does so bounds neither depth nor what aliases
expand to, and takes 10 ms for quickstart.yaml and 96 ms for hardware.yaml, where PyYAML's events take 5 and 40 ms
(ruamel's own events: 6 and 55 ms). The limits would have to be kept here all the same, and PyYAML is there anyway:
datasets, transformers and wandb need it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from .problems import Malformed, Problem, clip

MAX_BYTES = 256 * 1024
MAX_NODES = 10_000  # with every alias counted at the size of what it stands for
MAX_DEPTH = 32
MAX_DIGITS = 40

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(?:inf|Inf|INF)")
_TAG = re.compile(r"![^\s,\[\]{}]*")


@dataclass(frozen=True, slots=True)
class YamlNode:
    """A value and where it stands.

    `value` is a scalar, a list of nodes, or nodes by name; `where` is the `file:line` of its key (of the item in a
    list); `text` is a scalar's spelling, quotes included; `size` and `height` count its nodes and levels, aliases
    expanded; `flawed` says that a problem with it was reported already, so that nothing more is said about it.
    """

    value: Any
    where: str
    text: str = ""
    size: int = 1
    height: int = 1
    flawed: bool = False


def scalar(text: str) -> bool | int | float | str | None:
    """The value of an unquoted word, by the rules of YAML 1.2: `1e-4` is a number, `off` and `yes` are text.

    Raises `ValueError` with a sentence for what is no usable number: `.nan`, `1e999`, thousands of digits.
    """
    if text in _WORDS:
        return _WORDS[text]
    if infinite := _INFINITE.fullmatch(text):
        return -math.inf if infinite[1] == "-" else math.inf
    if text in (".nan", ".NaN", ".NAN"):
        raise ValueError("a number")
    if not (_INTEGER.fullmatch(text) or _FLOAT.fullmatch(text)):
        return text
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of at most {MAX_DIGITS} characters")
    if _INTEGER.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if math.isinf(float(text)):
        raise ValueError("a number that fits 64 bits, at most about 1.8e308")
    return float(text)


def is_text(word: str) -> bool:
    """Whether an unquoted `word` is that very text, and no number, truth value or null."""
    try:
        return scalar(word) == word
    except ValueError:
        return False


def collection(value: list[YamlNode] | dict[str, YamlNode], where: str) -> YamlNode:
    """The node of a list or a mapping, its size and height counted from its children."""
    children = value if isinstance(value, list) else list(value.values())
    size = 1 + sum(child.size for child in children)
    return YamlNode(value, where, "", size, 1 + max((child.height for child in children), default=0))


def plain(node: YamlNode) -> Any:
    """The values alone, as `yaml.safe_load` would give them; None for what was refused."""
    if node.flawed:
        return None
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def dotted(parts: Sequence[str]) -> str:
    """The path of a key as messages show it: `optimizer.betas[1]`."""
    return ".".join(parts).replace(".[", "[")


def read_text(path: Path) -> str:
    """The text of the file `path`, at most `MAX_BYTES` of which are ever read.

    Raises:
        Malformed: It is larger, or not UTF-8.
        OSError: It cannot be read at all.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        size = f"{MAX_BYTES // 1024} KiB"
        raise Malformed([Problem(f"{path}:1", "", f"more than {size}", f"at most {size}")])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        bad_byte = f"the byte 0x{content[error.start]:02x}, which is not UTF-8"
        raise Malformed([Problem(f"{path}:{line}", "", bad_byte, "text in UTF-8", "save the file as UTF-8")]) from None


def read_yaml(
    text: str, place: Callable[[int], str], *, key: str = "", what: str = "file", least: str = ""
) -> tuple[YamlNode, list[Problem]]:
    """The one document of `text` as a tree, and the problems it has that do not stop the reading.

    Args:
        text: The document.
        place: Turns a line number (from 1) into what messages show.
        key: Where the document belongs, if not on top.
        what: What messages call the file.
        least: What has to be in it, for the message where nothing is. Empty: nothing has to be, it may be empty.

    Raises:
        Malformed: No tree can be had: broken syntax, more than one document, more than `MAX_NODES` nodes or
            `MAX_DEPTH` levels.
    """
    return _Builder(text, place, key, what, least).document()


class _Builder:
    def __init__(self, text: str, place: Callable[[int], str], key: str, what: str, least: str) -> None:
        self.text, self.place, self.what, self.least = text, place, what, least
        self.problems: list[Problem] = []
        self.anchors: dict[str, YamlNode | None] = {}  # None while the anchored node is still being built
        self.path = [key] if key else []
        self.nodes = 0

    def document(self) -> tuple[YamlNode, list[Problem]]:
        try:
            self.events = yaml.SafeLoader(self.text)
            self.next()  # the start of the stream
            if isinstance(event := self.next(), yaml.StreamEndEvent):
                if not self.least:
                    return collection({}, self.where(event)), []
                raise self.fatal(event, "an empty file", self.least)
            node = self.node(self.next())
            self.next()  # the end of the document
            if not isinstance(event := self.next(), yaml.StreamEndEvent):
                raise self.fatal(event, "a second document", "one document; remove the line ---")
        except yaml.reader.ReaderError as error:
            where = self.place(self.text.count("\n", 0, error.position) + 1)
            bad_character = f"the character {chr(error.character)!r}"
            raise Malformed([Problem(where, "", bad_character, "printable text")]) from None
        except yaml.MarkedYAMLError as error:
            raise self.syntax(error) from None
        return node, self.problems

    def node(self, event: Any) -> YamlNode:
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        self.count(1, 1, event)
        if event.anchor:
            self.anchors[event.anchor] = None
        node = self.content(event)
        if event.tag is not None:
            node = self.tagged(event, node)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def content(self, event: Any) -> YamlNode:
        where = self.where(event)
        if isinstance(event, yaml.ScalarEvent):
            return self.leaf(event, where)
        value: Any = self.items() if isinstance(event, yaml.SequenceStartEvent) else self.entries()
        return collection(value, where)

    def leaf(self, event: Any, where: str) -> YamlNode:
        if event.style is not None:
            return YamlNode(event.value, where, self.text[event.start_mark.index : event.end_mark.index])
        try:
            return YamlNode(scalar(event.value), where, event.value)
        except ValueError as error:
            self.report(where, clip(event.value), str(error))
            return YamlNode(None, where, event.value, flawed=True)

    def items(self) -> list[YamlNode]:
        children: list[YamlNode] = []
        while not isinstance(event := self.next(), yaml.SequenceEndEvent):
            children.append(self.child(f"[{len(children)}]", event))
        return children

    def entries(self) -> dict[str, YamlNode]:
        entries: dict[str, YamlNode] = {}
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            key, where = self.key(event), self.where(event)
            node = replace(self.child(key or "?", self.next()), where=where)
            if key in entries:
                hint = f"remove one; the first stands at {entries[key].where}"
                self.report(where, f"{key} a second time", "each key once", hint, key)
            elif key is not None:
                entries[key] = node
        return entries

    def child(self, part: str, event: Any) -> YamlNode:
        self.path.append(part)
        node = self.node(event)
        self.path.pop()
        return node

    def key(self, event: Any) -> str | None:
        if not isinstance(event, yaml.ScalarEvent):
            raise self.fatal(event, "a key that is no word", "keys that are plain words, like `seed:`")
        node = self.node(event)
        if node.flawed or isinstance(node.value, str):
            return None if node.flawed else str(node.value)
        self.report(node.where, clip(node.text) or "an empty key", "keys that are text", f'quote it: "{node.text}"')
        return None

    def alias(self, event: Any) -> YamlNode:
        name = event.anchor
        if name not in self.anchors:
            raise self.fatal(event, f"*{name}", f"an alias of an anchor that stands above it; there is no &{name}")
        node = self.anchors[name]
        if node is None:
            raise self.fatal(event, f"*{name} inside &{name}", "an alias that does not contain itself")
        self.count(node.size, node.height, event)
        return replace(node, where=self.where(event))

    def tagged(self, event: Any, node: YamlNode) -> YamlNode:
        tag = _TAG.search(self.text, event.start_mark.index)
        described = f"the tag {clip(tag[0])}" if tag else "a tag"
        self.report(self.where(event), described, "values without a tag", f"remove it: a {self.what} has no tags")
        return replace(node, value=None, flawed=True)

    def count(self, nodes: int, levels: int, event: Any) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            size = f"{self.nodes} nodes or more, aliases expanded"
            raise self.fatal(event, size, f"at most {MAX_NODES} nodes in a file")
        if len(self.path) + levels > MAX_DEPTH:
            size = f"{len(self.path) + levels} levels of nesting or more"
            raise self.fatal(event, size, f"at most {MAX_DEPTH} levels")

    def next(self) -> Any:
        return self.events.get_event()

    def where(self, event: Any) -> str:
        return self.place(event.start_mark.line + 1)

    def report(self, where: str, found: str, allowed: str, hint: str = "", key: str = "") -> None:
        path = clip(dotted([*self.path, key] if key else self.path))
        self.problems.append(Problem(where, path, found, allowed, hint))

    def fatal(self, event: Any, found: str, allowed: str) -> Malformed:
        self.report(self.where(event), found, allowed)
        return Malformed(self.problems)

    def syntax(self, error: yaml.MarkedYAMLError) -> Malformed:
        mark, said = error.problem_mark or error.context_mark, str(error.problem)
        number = mark.line if mark else 0
        line = self.text.split("\n")[number]
        hint = ""
        if "\\t" in said:
            hint = "indent with spaces, not with tabs"
        elif "mapping values are not allowed" in said:
            hint = "put quotes around a value that contains a colon"
        described = clip(line.replace("\t", "\\t")) or "the end of the file"
        return Malformed([*self.problems, Problem(self.place(number + 1), "", described, f"YAML ({said})", hint)])
