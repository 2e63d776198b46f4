"""One home for everything that is kept for the user."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shoestring.directories import home
from shoestring.trainer.ledger import Ledger


def test_what_is_chosen_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.setenv("SHOESTRING_HOME", "~/kept")
    assert home() == Path.home() / "kept"


@pytest.mark.skipif(sys.platform != "linux", reason="paths of Linux")
def test_the_default_is_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SHOESTRING_HOME")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".local" / "share" / "shoestring"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert home() == tmp_path / "data" / "shoestring"
    assert Ledger().path == home() / "ledger.sqlite"
    assert not list(tmp_path.iterdir()), "asking makes nothing"
