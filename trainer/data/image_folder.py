"""Images in folders, one for each class, as torchvision's ImageFolder has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .cache import file_digest
from .carried import resolve_name
from .errors import TaskError
from .paths import find_images, model_folder
from .split import split_indices

if TYPE_CHECKING:
    from ...recipes import Recipe

SIZE = 64  # pixels of a side, where neither recipe nor model says


class ImageFolder(Dataset[dict[str, torch.Tensor]]):
    """Labelled image files, read when they are asked for.

    A sample: `pixel_values` float32 [3, size, size] in RGB, `labels` int64 []. An image is resized to a square,
    whatever its shape, scaled to [0, 1], and normalised by mean and std of each channel.
    """

    deterministic = True

    def __init__(
        self, files: Sequence[Path], labels: Sequence[int], size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.files, self.labels, self.size = list(files), torch.tensor(labels), size
        self.mean, self.std = (np.array(values, dtype=np.float32)[:, None, None] for values in (mean, std))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = _opened(self.files[index]).convert("RGB").resize((self.size, self.size))
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
        return {"pixel_values": torch.from_numpy((pixels - self.mean) / self.std), "labels": self.labels[index]}

    @property
    def target_counts(self) -> np.ndarray:
        """One target a sample [len(self)]."""
        return np.ones(len(self), dtype=np.int64)


def image_folders(recipe: Recipe, cache: Path) -> tuple[ImageFolder, ImageFolder | None, list[str]]:
    """The (training, validation) images of a recipe and the names of their classes.

    Every file is opened once, so that one that is no image is named before the first step. Raises `TaskError`.
    """
    data = recipe.data
    by_class = find_images(str(data.source), key="data.source")
    classes = list(by_class)
    files, labels = _listed(by_class, classes, data.limit)
    held: tuple[list[Path], list[int]] | None = None
    if isinstance(data.validation, str):
        others = find_images(data.validation, key="data.validation")
        if new := others.keys() - by_class.keys():
            raise TaskError(f"data.validation has classes that training data lacks: {sorted(new)}.")
        held = _listed(others, classes, data.limit)
    elif data.validation:
        digests = [file_digest(file, cache) for file in files]
        outside, inside = split_indices(digests, labels, data.validation, len(files))
        held = [files[i] for i in inside], [labels[i] for i in inside]
        files, labels = [files[i] for i in outside], [labels[i] for i in outside]
    for file in (*files, *(held[0] if held else ())):
        _opened(file).close()
    size, mean, std = _form(recipe)
    sets = [ImageFolder(*part, size, mean, std) for part in ((files, labels), held) if part is not None]
    return sets[0], sets[1] if held is not None else None, classes


def _listed(by_class: dict[str, list[Path]], classes: Sequence[str], limit: int | None) -> tuple[list[Path], list[int]]:
    """Files with the numbers of their classes. limit: so many, the classes taking turns."""
    turns = [(place, number, file) for number, name in enumerate(classes)
             for place, file in enumerate(by_class.get(name, ()))]  # fmt: skip
    kept = sorted(sorted(turns, key=lambda each: each[:2])[:limit], key=lambda each: (each[1], each[0]))
    return [file for _, _, file in kept], [number for _, number, _ in kept]


def _form(recipe: Recipe) -> tuple[int, Sequence[float], Sequence[float]]:
    """Size, mean and std that a recipe's model takes: its own preprocessing, where its folder has some."""
    model, size = recipe.model, recipe.data.image_size
    processor: dict[str, Any] = {}
    if model.name is not None:
        folder = Path(model_folder(resolve_name(model.name), "model.name"))
        for name in ("config.json", "preprocessor_config.json"):
            if (folder / name).exists():
                processor |= json.loads((folder / name).read_text())
    own = processor.get("image_size") or (model.config or {}).get("image_size")
    half = (0.5, 0.5, 0.5)
    return int(size or own or SIZE), processor.get("image_mean", half), processor.get("image_std", half)


def _opened(file: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise TaskError("images in files need Pillow: pip install shoestring[images]") from error
    try:
        return Image.open(file)
    except (UnidentifiedImageError, OSError) as error:
        raise TaskError(f"data.source: {file} is no image that can be read: {type(error).__name__}.") from error
