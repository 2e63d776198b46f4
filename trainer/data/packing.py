"""Samples filled with whole documents: no chat is cut in two, and few positions are padding.

Best fit decreasing, as in Fewer Truncations Improve Language Modeling (arXiv 2404.10830): the longest documents first,
each into the sample with the least room that it fits. What a sample holds depends on the data alone; the first to ask
leaves it beside the store.
"""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .cache import build_once
from .token_store import IGNORED, TokenStore
from .tokens import Blocks, Documents, Sample


class Packed(Dataset[Sample]):
    """Whole documents in samples of one length, kept apart by their `position_ids`.

    A sample: `input_ids`, `labels` and, when isolated, `position_ids`, each [T]. A document's first token is no target.
    A document longer than T is cut, and left out where it has no target before that. pad: the token that fills a sample
    up; it is no target and, where documents are isolated, seen by none.

    `token_counts` and `target_counts` [len(self)] are the tokens and the targets of each sample; `cut` is how many
    documents were longer than T, and `without_target` how many are left out.
    """

    deterministic = True  # a sample is the same each time it is read

    def __init__(self, store: TokenStore, length: int, *, isolate: bool = True, pad: int = 0) -> None:
        self.store, self.length, self.isolate, self.pad = store, length, isolate, pad
        whole = np.diff(store.offsets)
        self.cut = int((whole > length).sum())
        lengths, targets = np.minimum(whole, length), store.target_counts(length)
        self.rows = np.flatnonzero(targets)  # documents
        self.without_target = len(targets) - len(self.rows)

        def build(folder: Path) -> None:
            groups = best_fit(lengths[self.rows], length)
            np.save(folder / "order.npy", self.rows[np.concatenate([np.empty(0, dtype=np.int64), *groups])])
            np.save(folder / "bounds.npy", np.cumsum([0, *map(len, groups)]))

        folder = build_once(store.folder.with_name(f"{store.folder.name}-packed-{length}"), build)
        self._order, self._bounds = np.load(folder / "order.npy"), np.load(folder / "bounds.npy")
        before = np.concatenate([[[0], [0]], np.cumsum([lengths[self._order], targets[self._order]], axis=1)], axis=1)
        self.token_counts, self.target_counts = np.diff(before[:, self._bounds]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def documents(self, index: int) -> np.ndarray:
        """The documents of a sample, by their numbers in the store."""
        return self._order[self._bounds[index] : self._bounds[index + 1]]

    def __getitem__(self, index: int) -> Sample:
        ids, labels = np.full(self.length, self.pad), np.full(self.length, IGNORED)
        positions, at = np.arange(self.length), 0
        for row in self.documents(index):
            document = self.store.document(row, self.length)
            end = at + len(document)
            ids[at:end] = document
            labels[at + 1 : end] = self.store.labels(row, self.length)[1:]
            positions[at:] -= positions[at]
            at = end
        if at < self.length:
            positions[at:] -= positions[at]
        sample = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        return {**sample, "position_ids": torch.from_numpy(positions)} if self.isolate else sample

    def targets(self, index: int) -> np.ndarray:
        """The tokens that a sample predicts."""
        labels = np.concatenate([self.store.labels(row, self.length)[1:] for row in self.documents(index)])
        return labels[labels != IGNORED]


Texts = Blocks | Documents | Packed  # data sets of tokens


def best_fit(lengths: np.ndarray, room: int) -> list[np.ndarray]:
    """Items of these lengths, none above `room`, in groups of at most `room` together; each group in order of items.

    Groups come in the order of their first items. Takes O(N log room).
    """
    by_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []  # that groups have left, in order, without 0
    groups: list[list[int]] = []
    for item in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[item])
        at = bisect_left(rooms, size)
        if at < len(rooms):
            left = rooms[at]
            group = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[at]
        else:
            left, group = room, []
            groups.append(group)
        group.append(item)
        if left := left - size:
            if left not in by_room:
                by_room[left] = []
                rooms.insert(bisect_left(rooms, left), left)
            by_room[left].append(group)
    return [np.array(group) for group in sorted(map(sorted, groups))]
