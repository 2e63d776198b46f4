"""The five commands of the tutorial that begin with a model and end in a chat, as they stand there."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import chatting
import pytest
from command_line import command

pytestmark = pytest.mark.filterwarnings("ignore")
TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"


def five_commands() -> list[list[str]]:
    section = TUTORIAL.read_text().split("## 5. Teach it to answer")[1].split("\n## ")[0]
    block = re.search(r"```sh\n(.*?)```", section, re.S)
    assert block
    return [shlex.split(line)[1:] for line in block[1].splitlines()]


def test_from_init_to_chat_without_an_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what costs minutes is smaller: another model in the place of the first command's, steps for minutes."""
    first, *rest = five_commands()
    assert first == ["train", "quickstart"] and [words[0] for words in rest] == ["init", "data", "train", "chat"]
    monkeypatch.chdir(tmp_path)
    chatting.base(tmp_path / "runs" / "quickstart" / "model", max_position_embeddings=512)
    said = {}
    for words in rest:
        monkeypatch.setattr("sys.stdin", io.StringIO("What is a stack for?\n"))
        few = ["--max-tokens", "8"] if words[0] == "chat" else []
        given = ["8 steps" if word == "2 min" else word for word in words]
        assert command(monkeypatch, *given, *few) == 0, capsys.readouterr().err
        said[words[0]] = capsys.readouterr().out
    assert "next         shoestring train chat.yaml" in said["init"]
    assert "of them trained on" in said["data"] and "runs/chat" in said["train"]
    assert said["chat"].endswith("\n") and len(said["chat"].strip()) > 0
