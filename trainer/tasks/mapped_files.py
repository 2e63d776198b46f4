"""The files of a pretrained model. Read through a memory map, their pages count as this process's memory until somebody
takes them back.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FORMATS = ("*.safetensors", "*.bin")  # transformers takes the first that is there
_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4: unlike MADV_DONTNEED it loses nothing that was written
_EVERY = 0.05  # seconds: half a gigabyte is read in it at most


@contextmanager
def pages_given_back(suffix: str = ".safetensors") -> Iterator[None]:
    """While this lasts, the system takes back what has been read of mapped files; without it a load peaks at the file
    and what is kept together. No error where a system has no such advice."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(_EVERY):
            _give_back(suffix)

    thread = threading.Thread(target=repeat, daemon=True, name="pages given back")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _give_back(suffix)


def _give_back(suffix: str) -> None:
    with suppress(OSError, AttributeError, ValueError):
        advise = ctypes.CDLL(None).madvise
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith(suffix):
                begin, end = (int(number, 16) for number in line.split()[0].split("-"))
                advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(_PAGEOUT))


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
