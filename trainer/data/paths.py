"""What a recipe names on this machine: files of data by path, folder or glob, and folders of models. No torch."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from .errors import TaskError

# sources that every machine has
CARRIED = (
    "python-stdlib", "python-packages", "python-docstrings", "docstring-preferences", "package-descriptions", "digits",
)  # fmt: skip
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SUFFIXES = {
    "text": (".txt", ".text", ".md", ".markdown", ".rst", ".py", ".tex"),
    "json": (".json", ".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
}
# what rows are, in files of any kind that has columns; see `shapes`
SHAPED = ("plain", "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "preference",
          "unpaired-preference")  # fmt: skip


def file_format(wanted: str) -> str | None:
    """The format of files that `data.format` names; None where it names none: files then tell by their endings."""
    return wanted if wanted in SUFFIXES else None


def format_of(path: Path) -> str | None:
    """text, json, csv, parquet or arrow, by the end of the name in any case; None for other names."""
    return next((name for name, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes), None)


def find_files(source: str, wanted: str | None = None, *, key: str = "data.source") -> list[Path]:
    """The files that a path, a folder or a glob names, sorted; empty where it names a hub data set.

    What exists under the very name is taken as it is: brackets and stars in it are no pattern. Something that looks
    like a path (`./x`, `/x`, `x/*.txt`, `x.csv`) and matches nothing is an error, so that a typing error is not looked
    up on the hub. wanted: the format to take from a folder; None: all known ones.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        formats = SUFFIXES if wanted is None else {wanted}
        files = sorted(p for p in path.rglob("*") if p.is_file() and format_of(p) in formats)
        if not files:
            endings = ", ".join(suffix for name in formats for suffix in SUFFIXES[name])
            raise TaskError(f"{key}: no file in the folder {source!r} ends in one of {endings}.")
        return files
    files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not files and (_is_path(source) or any(c in source for c in "*?[") or format_of(path) is not None):
        raise TaskError(f"{key} {source!r} matches no file here (looked from {Path.cwd()}).")
    return files


def find_images(source: str, *, key: str) -> dict[str, list[Path]]:
    """The image files of each class, which is a folder's name, in a folder of folders; both sorted.

    Raises `TaskError` where there is no such folder, fewer than two classes, or a class without an image.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise TaskError(
            f"{key} {source!r} is no folder here (looked from {Path.cwd()}); image-classification reads digits, a "
            "folder that has a folder of images for each class, or your own module:attr."
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes = {
        folder.name: sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and p.is_file())
        for folder in folders
    }
    if len(classes) < 2:
        raise TaskError(
            f"{key}: {source!r} has {len(classes)} folders; each class needs one, and there are two or more."
        )
    if empty := [name for name, files in classes.items() if not files]:
        raise TaskError(f"{key}: the folder {root / empty[0]} has no image; images end in {', '.join(IMAGES)}.")
    return classes


def one_format(files: Iterable[Path], source: str) -> str:
    """The format of all of `files`, by their names."""
    by_format: dict[str | None, list[Path]] = {}
    for file in files:
        by_format.setdefault(format_of(file), []).append(file)
    kinds = list(by_format)
    if len(kinds) == 1 and kinds[0] is not None:
        return kinds[0]
    counts = ", ".join(
        f"{len(some)} {kind or 'of no known ending'} ({some[0].name}{', …' if len(some) > 1 else ''})"
        for kind, some in by_format.items()
    )
    raise TaskError(
        f"data.format: auto cannot determine the format of {source!r}: found {counts}. "
        f"Set data.format to the one to read: {', '.join(SUFFIXES)}."
    )


def model_folder(name: str, key: str) -> str:
    """A hub id as it is, or the folder that a path names; a path that leads nowhere is an error."""
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    if _is_path(name):
        raise TaskError(f"{key}: {name!r} is no folder here (looked from {Path.cwd()}).")
    return name


def _is_path(name: str) -> bool:
    """Whether a name can only be a path: hub ids are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
