"""What the baseline answers to training images, kept from one fine-tuning to the next.

A student of a third of the operations needs no more of them for its forward and backward pass than
the network that it imitates needs to answer. All trials learn from the same images, so that one is
asked about each view of an image but once (Shen & Xing, "A Fast Knowledge Distillation Framework
for Visual Recognition", ECCV 2022, store answers to crops beforehand).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autocompress.batch import Batch, KnownBatch

VIEWS = 32
"""Different augmented views of each image that a network learns from where answers are kept."""

LIMIT = 2**29
"""Bytes that are kept in a process at most; views beyond are asked about each time."""

FEWEST = 8
"""Samples that are asked about at a time at least: libraries round in other ways for fewer."""


class Answers:
    """The answers of one network to the samples of `KnownBatch`es, by one forward pass.

    Args:
        limit: Bytes to keep at most.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._room = self._limit = limit
        self._source: Tensor | None = None
        self._kept: dict[tuple[Hashable, int], _Kept | None] = {}

    def recall(self, batch: Batch, ask: Callable[[Batch], Any], way: Hashable = None) -> Any:
        """The network's output for a batch; it is asked only about samples that are new.

        Args:
            batch: Of a batch that is no `KnownBatch` nothing is kept.
            ask: Gives the output for a batch. One that is no tensor with a row for each sample is
                not kept.
            way: How it is asked: answers of different ways, such as precisions, are kept apart.
        """
        if not isinstance(batch, KnownBatch):
            return ask(batch)
        if batch.source is not self._source:
            self._source, self._room = batch.source, self._limit
            self._kept.clear()
        key = way, batch.view
        if key not in self._kept:
            answer = ask(batch)
            self._kept[key] = self._begin(batch, answer)
            return answer
        kept = self._kept[key]
        if kept is None:
            return ask(batch)
        new = kept.new_in(batch.places)
        if len(new):
            some = batch.pick(new)
            kept.put(some.places, ask(some))
        return kept.rows[batch.places].to(batch[0].device)

    def _begin(self, batch: KnownBatch, answer: Any) -> _Kept | None:
        """Room for the answers to a view, with the first of them; None where there can't be."""
        if not isinstance(answer, Tensor) or answer.shape[:1] != batch.places.shape:
            return None
        count = len(batch.source)
        size = count * answer[0].numel() * answer.element_size()
        if size > self._room:
            return None
        self._room -= size
        rows = torch.empty((count, *answer.shape[1:]), dtype=answer.dtype)
        kept = _Kept(rows, torch.zeros(count, dtype=torch.bool))
        kept.put(batch.places, answer)
        return kept


@dataclass
class _Kept:
    """The answers to one view.

    Attributes:
        rows: One for each of the source's samples, on the CPU.
        known: Which of them are answers.
    """

    rows: Tensor
    known: Tensor

    def new_in(self, places: Tensor) -> Tensor:
        """The positions in `places` of samples to ask about; empty if all are known."""
        known = self.known[places]
        count = int((~known).sum())
        return known.int().argsort(stable=True)[: max(count, FEWEST) if count else 0]

    def put(self, places: Tensor, answer: Tensor) -> None:
        """Keep the answers to some samples."""
        self.rows[places] = answer.detach().to("cpu")
        self.known[places] = True
