"""Small image classifiers for the `image-classification` task: a perceptron and a convolutional network."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from .errors import TaskError, unknown

Shape = tuple[int, int, int]


class ImageModel(nn.Module):
    """Layers that take images by the name they have in a batch: `pixel_values` [B, C, H, W] -> logits [B, classes]."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes], in the dtype of the weights."""
        return self.layers(pixel_values.to(next(self.parameters()).dtype))


class MLP(ImageModel):
    """Perceptron over flattened images.

    hidden: widths of the hidden layers. dropout: after each of them.
    """

    def __init__(self, shape: Shape, classes: int, *, hidden: Sequence[int] = (128,), dropout: float = 0.0) -> None:
        widths = [shape[0] * shape[1] * shape[2], *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(widths[-1], classes))


class CNN(ImageModel):
    """Convolutions 3x3, each followed by ReLU and halving of the image, then one linear layer.

    channels: output channels of each convolution; the image's sides must survive that many halvings. No batch
    normalisation: a batch's result must not depend on how it is cut into micro-batches.
    """

    def __init__(self, shape: Shape, classes: int, *, channels: Sequence[int] = (16, 32), dropout: float = 0.0) -> None:
        height, width = (side >> len(channels) for side in shape[1:])
        if not height or not width:
            raise TaskError(
                f"model.config.channels {list(channels)}: a {shape[1:]} image cannot be halved {len(channels)} times."
            )
        depths = [shape[0], *channels]
        layers: list[nn.Module] = []
        for before, after in pairwise(depths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(depths[-1] * height * width, classes))


class Images(Dataset[dict[str, torch.Tensor]]):
    """Labelled images in memory. A sample: `pixel_values` float32 [C, H, W], `labels` int64 []."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}

    @property
    def target_counts(self) -> np.ndarray:
        """One target a sample [len(self)]."""
        return np.ones(len(self), dtype=np.int64)


KINDS: dict[str, type[nn.Module]] = {"mlp": MLP, "cnn": CNN}


def build_image_model(config: dict[str, Any] | None, shape: Shape, classes: int) -> nn.Module:
    """The model of `model.config: {kind: mlp | cnn, ...}` for images of `shape` (C, H, W)."""
    settings = dict(config or {})
    kind = settings.pop("kind", None)
    if kind not in KINDS:
        raise unknown("model.config.kind", kind, KINDS)
    allowed = set(inspect.signature(KINDS[kind]).parameters) - {"shape", "classes"}
    for name in settings:
        if name not in allowed:
            raise unknown(f"model.config of {kind}", name, allowed | {"kind"})
    return KINDS[kind](shape, classes, **settings)
