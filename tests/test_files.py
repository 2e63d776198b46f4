"""A file that is replaced is the old one or the new one, whatever fails on the way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shoestring.files import replace_file, sync_directory


def test_the_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.json"
    replace_file(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    replace_file(path, b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_what_fails_leaves_the_old_content(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    path = tmp_path / "summary.json"
    replace_file(path, "old")
    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_cannot_sync_directories_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(os, "fsync", lambda descriptor: refuse(errno.EINVAL))
    sync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: refuse(errno.EIO))
    with pytest.raises(OSError, match="refused"):
        sync_directory(tmp_path)
