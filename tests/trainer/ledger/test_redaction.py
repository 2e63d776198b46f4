"""Secrets in what tasks write down: in each of the spellings in which they come up."""

from __future__ import annotations

import io
import json

import pytest

from shoestring.cluster.environment import TaskStream, redacted, redacted_values

KEY = "-----BEGIN KEY-----\nMIIB'q\"x\\y\nend of it"


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SHOESTRING_SECRETS": "KEY,TOKEN", "KEY": KEY, "TOKEN": "abc", "OTHER": "plain"}.items():
        monkeypatch.setenv(name, value)


def test_a_secret_is_hidden_as_it_is_as_repr_as_json_and_line_by_line() -> None:
    for text in (KEY, repr({"key": KEY}), json.dumps([KEY]), f"first {KEY.splitlines()[0]} alone", "token=abc"):
        said = redacted(text)
        assert "***" in said
        assert not [part for part in ("BEGIN", "MIIB", "end of it", "abc") if part in said], said
    assert redacted("plain OTHER text") == "plain OTHER text"
    assert redacted_values({"a": ["abc", 1, {"b": ("xabcx",)}]}) == {"a": ["***", 1, {"b": ["x***x"]}]}


def test_what_a_task_prints_is_redacted_and_may_be_read_by_nobody() -> None:
    kept = io.StringIO()
    stream = TaskStream(kept)
    print("with", "abc", file=stream, flush=True)
    stream.writelines(["one abc\n", "two\n"])
    assert kept.getvalue() == "with ***\none ***\ntwo\n"
    assert not stream.isatty()

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    print("goes on", file=TaskStream(Broken()), flush=True)
