"""When one rank fails all do, and what the others say is noise: the first to fail is the one that a user reads.

A rank that fails says so in the store of the process group before it leaves; only then do the others lose it.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from ...exits import FAILURE, FINISHED
from ..machine.signals import launched_here

_KEY = "shoestring/failed"
_PATIENCE = timedelta(seconds=2)
# what gloo, NCCL and torch's store say when somebody has gone
_GONE = ("onnection closed by peer", "onnection reset", "roken pipe", "NCCL", "gloo", "TCPStore", "recvValue")

log = logging.getLogger("shoestring")


class RankLost(SystemExit):
    """This rank ends because it has lost another one. Exits with 1."""

    def __init__(self) -> None:
        # the launcher kills rank 0, which may still be closing its records, when another rank returns anything but 0
        super().__init__(FINISHED if launched_here() else FAILURE)


def first_to_fail(rank: int) -> int | None:
    """The rank that was the first to call this; None where that cannot be told, for the store has gone."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rank
    with suppress(Exception):
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(_PATIENCE)
        return int(store.compare_set(_KEY, "", str(rank)))
    return None


def blame(error: BaseException, rank: int) -> tuple[int | None, str]:
    """The rank whose failure has ended the fit, where that can be told, and what this `rank` writes of its `error`.

    Sets `error.told_here`: whether this rank is the one to tell the user.
    """
    said = f"{type(error).__name__}: {error}"
    if not isinstance(error, Exception):
        return None, said
    first = first_to_fail(rank)
    error.told_here = first == rank  # type: ignore[attr-defined]
    if is_lost_rank(error) and first != rank:
        said = f"rank {first} has failed" if first is not None else "rank 0 is gone"
    return first, said


def forget() -> None:
    """A new fit in the same process group begins."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        with suppress(Exception):
            dist.distributed_c10d._get_default_store().delete_key(_KEY)


def is_lost_rank(error: BaseException) -> bool:
    """Whether `error` says that another rank has gone, and nothing about this one."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _GONE)
