"""The command line, called in this process."""

from __future__ import annotations

import sys

import pytest

from shoestring.trainer.cli.app import main


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `shoestring *words`."""
    monkeypatch.setattr(sys, "argv", ["shoestring", *words])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
