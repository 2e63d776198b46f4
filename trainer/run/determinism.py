"""The same bits from the same run on a GPU, too: torch's deterministic algorithms, for as long as a run lasts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ... import ShoestringError

# read by cuBLAS when it is first used, and by transformers when flash attention is
_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


class NotDeterministic(ShoestringError):
    """The model uses an operation that has no deterministic form."""


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Inside, every operation gives the same bits for the same input, or is refused.

    Kernels that add in the order in which threads arrive are replaced: above all the backward of attention, of
    embeddings and of indexing, which then take longer. A CPU adds in one order anyway.

    Args:
        wanted: False leaves everything as it is.

    Raises:
        NotDeterministic: The model uses an operation that torch has no deterministic form of.
    """
    if not wanted:
        yield
        return
    import torch

    memory: Any = torch.utils.deterministic  # whose setting type checkers do not see
    filled = memory.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    tries = torch.backends.cudnn.benchmark  # whichever kernel happens to be the fastest
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    memory.fill_uninitialized_memory = False  # finds bugs, at the price of writing all memory twice
    try:
        yield
    except RuntimeError as error:
        if match := re.match(r"(\S+) does not have a deterministic implementation", str(error)):
            raise NotDeterministic(
                f"deterministic: true, and the model uses {match[1]}, which torch has no deterministic form of. "
                "Replace it, or set deterministic: false."
            ) from error
        raise
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = tries
        memory.fill_uninitialized_memory = filled
