"""The journal's line format, and reading it back.

A run's journal is a folder of segments, one per attempt and rank: `events-a0002-r00000.jsonl` is what rank 0 wrote in
the third attempt (after two restarts). Each line is one JSON object that ends in its own checksum:

    {"seq":7,"t":1763745123.104211,"mono":512.377104,"kind":"step","step":40,"loss":2.31,"crc":"5e0a91c7"}

`seq` counts from 0 within the segment, `t` is wall-clock seconds (to join segments of different machines), `mono`
monotonic seconds (for differences within one attempt), `kind` one of `KINDS`. `crc` is the CRC32, as eight lower-case
hex digits, of all bytes of the line before `,"crc":`. So any JSON tool reads a segment, and every damaged line shows.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

KINDS = frozenset({"claim", "estimate", "measurement", "verdict", "event", "step"})
RESERVED = frozenset({"seq", "t", "mono", "kind", "crc"})

_SEGMENT = re.compile(r"events-a(\d{4,})-r(\d{5,})\.jsonl")
_SUFFIX = len(',"crc":"00000000"}')
_START = re.compile(rb'\{"seq":')
_CRC = re.compile(rb',"crc":"[0-9a-f]{8}"\}')


class Row(NamedTuple):
    """One line of a journal. Order rows by (attempt, seq), never by `t`: clocks step and differ."""

    rank: int
    attempt: int
    seq: int
    t: float
    mono: float
    kind: str
    fields: dict[str, object]


class JournalProblem(NamedTuple):
    """Something a reader had to skip: `line` counts from 1 within the segment `path`."""

    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


class Segment(NamedTuple):
    """The file that one rank wrote in one attempt."""

    rank: int
    attempt: int
    path: Path


def segment_name(attempt: int, rank: int) -> str:
    return f"events-a{attempt:04d}-r{rank:05d}.jsonl"


def segments(directory: Path) -> list[Segment]:
    """The segments in a journal folder, by rank, then attempt; none if there is no such folder."""
    if not directory.is_dir():
        return []
    named = ((_SEGMENT.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted(Segment(int(match[2]), int(match[1]), path) for match, path in named if match)


def next_attempt(directory: Path) -> int:
    """The number of the attempt about to start: 0 in a new run, else one more than any rank has written.

    Ask on rank 0 and broadcast the answer: ranks that each look for themselves may see one another's new files.
    """
    return max((segment.attempt for segment in segments(Path(directory))), default=-1) + 1


def plain(value: object) -> object:
    """Convert what JSON cannot express: arrays and their scalars as numbers, sets as lists, the rest as its text."""
    if callable(tolist := getattr(value, "tolist", None)):
        return tolist()
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def finite(value: object) -> object:
    """`value` as JSON can hold it: NaN and infinities become None, keys text, foreign objects what `plain` says."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value if value is None or isinstance(value, str | int) else finite(plain(value))


def seal(head: str) -> bytes:
    """Close a line: `head` is the JSON object without its closing brace, ASCII only."""
    body = head.encode("ascii")
    return b'%b,"crc":"%08x"}\n' % (body, zlib.crc32(body))


def unseal(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line (without its newline), or None if one byte of it is not as it was written."""
    body, suffix = line[:-_SUFFIX], line[-_SUFFIX:]
    if suffix != b',"crc":"%08x"}' % zlib.crc32(body):
        return None
    row = json.loads(body + b"}")
    return row if RESERVED - row.keys() == {"crc"} else None


def resume_point(path: Path) -> tuple[int, int]:
    """Return where a reopened segment continues: (bytes up to the last newline, the next sequence number).

    What follows the last newline is a row that was never acknowledged, so it may be cut off. A damaged line that has
    its newline stays: it is evidence, and readers step over it.
    """
    length = following = 0
    for _, line, _, rows in _lines(path):
        length += len(line) if line.endswith(b"\n") else 0
        following = max([following, *(row["seq"] + 1 for row in rows)])
    return length, following


def read(directory: Path, problems: list[JournalProblem] | None = None, *, rank: int | None = None) -> Iterator[Row]:
    """All rows of a journal, rank by rank, each rank's rows ordered by (attempt, seq).

    A line whose checksum does not match is left out and noted in `problems`; so are a line cut off at the end of a
    segment and sequence numbers that are missing. `rank` reads one rank only. Safe beside a running writer.
    """
    noted = problems if problems is not None else []
    for segment in segments(Path(directory)):
        if rank is None or segment.rank == rank:
            yield from _read_segment(segment, noted)


def _read_segment(segment: Segment, problems: list[JournalProblem]) -> Iterator[Row]:
    expected = damaged = 0
    for number, line, intact, rows in _lines(segment.path):
        if not intact:
            damaged += 1
            problems.append(JournalProblem(segment.path, number, _diagnose(line)))
        for row in rows:
            seq = row.pop("seq")
            missing = seq - expected - damaged
            if seq < expected:
                problems.append(
                    JournalProblem(segment.path, number, f"row {seq} comes after row {expected - 1}; left out")
                )
                continue
            if missing > 0:
                problems.append(JournalProblem(segment.path, number, f"{missing} rows before row {seq} are lost"))
            expected, damaged = seq + 1, 0
            yield Row(segment.rank, segment.attempt, seq, row.pop("t"), row.pop("mono"), row.pop("kind"), row)


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool, list[dict[str, Any]]]]:
    """(line number from 1, its bytes, whether they are intact, the rows that can be read from it)."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            row = unseal(line[:-1]) if line.endswith(b"\n") else None
            yield number, line, row is not None, [row] if row is not None else _salvage(line)


def _diagnose(line: bytes) -> str:
    if not line.endswith(b"\n"):
        return f"the last line is cut off after {len(line)} bytes"
    return f"damaged line ({len(line)} bytes, checksum does not match)"


def _salvage(line: bytes) -> list[dict[str, Any]]:
    """Intact rows inside a damaged line: when a newline itself is damaged, the row after it is still whole.

    Each byte is looked at a few times only, however many rows stand in the line.
    """
    starts = [match.start() for match in _START.finditer(line) if match.start()]
    rows = []
    for start, end in pairwise([*starts, len(line)]):
        piece = line[start:end]
        ends = [match.end() for match in _CRC.finditer(piece)]
        if ends and (row := unseal(piece[: ends[-1]])) is not None:
            rows.append(row)
    return rows
