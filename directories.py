"""The user's own directories: one home for the ledger, a hardware file, measured peaks and built extensions."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`$SHOESTRING_HOME`, else `shoestring` in the user's data folder. Not created here.

    That folder is `$XDG_DATA_HOME` or `~/.local/share` on Linux, `~/Library/Application Support` on macOS.
    """
    if chosen := os.environ.get("SHOESTRING_HOME"):
        return Path(chosen).expanduser()
    from platformdirs import user_data_path  # 10 ms, which those who chose a home need not wait for

    return user_data_path("shoestring", appauthor=False)
