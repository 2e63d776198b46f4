"""The files of a pretrained model. Read through a memory map, their pages count as this process's memory until somebody
takes them back.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .weight_dtypes import Kept

_FORMATS = ("*.safetensors", "*.bin")  # transformers takes the first that is there
_MAPPED = ".safetensors"  # which are read through a map
_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4: unlike MADV_DONTNEED it loses nothing that was written
_EVERY = 0.005  # seconds
_AT_ONCE, _SHARE = 4 << 20, 100  # bytes, and parts of the files, that may have been read before they are given back


@contextmanager
def pages_given_back(suffix: str = _MAPPED) -> Iterator[None]:
    """While this lasts, the system takes back what has been read of mapped files and what was freed; without it a load
    peaks at the file and what is kept together. No error where a system has no such advice."""
    done = threading.Event()

    def repeat() -> None:
        least, at_once = _of_files(), _AT_ONCE
        while not done.wait(_EVERY):
            if _of_files() > least + at_once:
                at_once = max(_AT_ONCE, _give_back(suffix) // _SHARE)
                least = _of_files()

    thread = threading.Thread(target=repeat, daemon=True, name="pages given back")
    thread.start()
    try:
        with _without_reading_ahead():
            yield
    finally:
        done.set()
        thread.join()
        _give_back(suffix)


@contextmanager
def _without_reading_ahead() -> Iterator[None]:
    """Have transformers read a tensor when it is wanted: its threads read the whole file before it is."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _of_files() -> int:
    """Bytes of mapped files in this process's memory; 0 where it cannot be known."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGESIZE")
    return 0


def _give_back(suffix: str) -> int:
    """Bytes of the files that are mapped."""
    mapped = 0
    with suppress(OSError, AttributeError, ValueError):
        system = ctypes.CDLL(None)
        for begin, end in _maps(suffix):
            system.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(_PAGEOUT))
            mapped += end - begin
        system.malloc_trim(0)  # codes are made of many small pieces
    return mapped


def _maps(suffix: str) -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [tuple(int(n, 16) for n in line.split()[0].split("-")) for line in lines if line.endswith(suffix)]  # type: ignore[misc]


def read_from_files(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Those of the tensors that are maps of weight files, and take no memory that the system could not take back."""
    maps: list[tuple[int, int]] = []
    with suppress(OSError):
        maps = _maps(_MAPPED)
    return [tensor for tensor in tensors if any(begin <= tensor.data_ptr() < end for begin, end in maps)]


def weight_files(name: str) -> list[Path]:
    """The files with the weights of a model folder, or of a hub id that has been downloaded."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):  # of another kind of cache
            return []
    return next((files for pattern in _FORMATS if (files := sorted(folder.glob(pattern)))), [])


def all_kept_in(files: Iterable[Path], kept: Kept) -> bool:
    """Whether a map of the files is what is kept: nothing is to be quantized or cast."""
    if kept.codes is not None:
        return False
    wanted = {"fp32": "F32", "bf16": "BF16"}[kept.floats]
    for path in files:
        if path.suffix != _MAPPED:
            return False
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  # it is no mapping
        if any(dtype != wanted for dtype in dtypes if dtype in ("F64", "F32", "F16", "BF16")):
            return False
    return True
