"""The meter: what a run costs, in named windows.

Windows add up to the wall time of the run: start-up, train (waiting for data is listed inside it), evaluation,
checkpoint, report (what the final weights are used for), other. `tokens_per_second` is over train time only; MFU is
counted FLOPs (no recomputation) over the peak. Tokens are those of the data: what pads rows is counted apart.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch


class Windows:
    """Wall time by kind of work. Exactly one window is open at a time, so they sum to the whole."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open = "startup"
        self._since = perf_counter()

    @property
    def current(self) -> str:
        """The window that is open."""
        return self._open

    def enter(self, window: str) -> float:
        """Close the open window and open `window`; returns the moment."""
        now = perf_counter()
        self.seconds[self._open] = self.seconds.get(self._open, 0.0) + now - self._since
        self._open, self._since = window, now
        return now

    def spent(self, window: str) -> float:
        """Seconds in `window` so far, the open one included."""
        return self.seconds.get(window, 0.0) + (perf_counter() - self._since if self._open == window else 0.0)

    def so_far(self) -> dict[str, float]:
        """Seconds by window, the open one included."""
        return {**self.seconds, self._open: self.spent(self._open)}

    def total(self) -> float:
        return sum(self.seconds.values()) + perf_counter() - self._since


class EvaluationTimer:
    """The time of a whole evaluation, from the evaluations so far."""

    def __init__(self) -> None:
        self.seconds = 0.0  # of a whole one; 0 while none has run
        self._times = [0.0]

    def begin(self, now: float) -> None:
        self._times = [now]

    def batch(self) -> None:
        """A batch has ended."""
        self._times.append(perf_counter())

    @property
    def batches(self) -> int:
        return len(self._times) - 1

    def mean(self) -> float:
        """Seconds a batch of this evaluation has taken."""
        return (self._times[-1] - self._times[0]) / max(1, self.batches)

    def end(self, now: float, whole: float) -> None:
        """The evaluation has ended; a complete one has `whole` batches."""
        if not self.batches:
            return
        # the first batch also warms up: those not run now would have cost what later ones did
        each = (self._times[-1] - self._times[1]) / (self.batches - 1) if self.batches > 1 else self.mean()
        seconds = now - self._times[0] + each * max(0.0, whole - self.batches)
        self.seconds = (seconds + (self.seconds or seconds)) / 2  # one alone may be a freak


def whole_batches(loaders: Sequence[float]) -> int:
    """Batches of one evaluation over all `loaders`; 0 where nobody knows."""
    return int(sum(n for n in loaders if n != float("inf")))


def batch_size(batch: Any) -> tuple[int, int, tuple[int, ...], torch.Tensor | None]:
    """(samples, positions, shape, mask) of a batch: positions are elements of `input_ids`, padding included, else 0.

    The shape is that of `input_ids` or of the first tensor found. The mask is an `attention_mask` of the same shape, 1
    where a position is a token of the data. Of sources with targets, the positions of a row are those of both.
    """
    if isinstance(batch, torch.Tensor):
        return (batch.shape[0] if batch.ndim else 1), 0, tuple(batch.shape), None
    if hasattr(batch, "get"):
        ids = batch.get("input_ids")
        if isinstance(ids, torch.Tensor):
            mask = batch.get("attention_mask")
            shape = ids.shape
            target = batch.get("decoder_input_ids")
            if isinstance(target, torch.Tensor) and mask is not None and "labels" in batch:
                ids = torch.cat([ids, target], 1)
                shape, mask = ids.shape, torch.cat([mask, (batch["labels"] >= 0).to(mask.dtype)], 1)
            return shape[0], ids.numel(), shape, mask if mask is not None and mask.shape == shape else None
        batch = list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        for part in batch:
            sizes = batch_size(part)
            if sizes[0]:
                return sizes
    return 0, 0, (), None


class Later:
    """A number that a device computes, read without waiting for what has been asked of the device since.

    Args:
        number: of one element.
    """

    def __init__(self, number: torch.Tensor) -> None:
        self._host = number.to("cpu", non_blocking=True)
        self._copied = None
        if number.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> int:
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._host)


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: on the accelerator where there is one, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def communication_bytes(
    strategy: str, parameters: int, bytes_each: int, world: int, accumulate: int, gradient_bytes: int | None = None
) -> float:
    """Bytes each rank sends per optimizer step, from the strategy's collectives (ZeRO, arXiv 1910.02054 §7).

    DDP and ZeRO-1 all-reduce or reduce-scatter + all-gather 2P; DeepSpeed's ZeRO-2 reduce-scatters every micro-batch,
    (A + 1)P; ZeRO-3 and FSDP2 gather twice and scatter once per micro-batch, 3PA. Times the ring factor (N - 1) / N.
    What is scattered are gradients, of `gradient_bytes` if they are not as large as weights; DDP sends nothing else.
    """
    times = {"ddp": (2, 0), "zero1": (1, 1), "zero2": (accumulate, 1), "zero3": (accumulate, 2 * accumulate)}
    times["fsdp2"] = times["zero3"]
    gradients, weights = times.get(strategy, (0, 0))
    sent = gradients * (gradient_bytes or bytes_each) + weights * bytes_each
    return float(sent * parameters * (world - 1) / world)
