"""What a loader yields, and how samples are counted in it, cut out of it and moved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = Any
"""What a loader yields: a tensor, or (nested) tuples, lists and dicts of tensors, each with a place
for each sample. Where samples have parts of their own, such as the boxes of each image, these are a
list with a dict for each sample."""


class KnownBatch(tuple[Tensor, Tensor]):
    """Images and labels of samples that are known by name: what was found about them can be kept.

    Attributes:
        source: All images, of which these are views; samples of the same object are the same.
        view: Which of the source's augmented views they are of.
        places: `n`, on the CPU: where in the source each sample is.
    """

    source: Tensor
    view: int
    places: Tensor

    def __new__(
        cls, images: Tensor, labels: Tensor, source: Tensor, view: int, places: Tensor
    ) -> KnownBatch:
        batch = super().__new__(cls, (images, labels))
        batch.source, batch.view, batch.places = source, view, places
        return batch

    def pick(self, chosen: Tensor) -> KnownBatch:
        """Some samples, by their positions in this batch (on the CPU)."""
        images, labels = (part[chosen.to(part.device)] for part in self)
        return KnownBatch(images, labels, self.source, self.view, self.places[chosen])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` with every tensor in it on `device`; images keep their memory format."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, KnownBatch):
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        return KnownBatch(images, labels, batch.source, batch.view, batch.places)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return _like(batch, (to_device(value, device) for value in batch))
    return batch


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a tensor, or in (nested) sequences and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from tensors_in(part)


def samples_in(batch: Batch) -> int:
    """Number of samples in a batch: of the dicts in a list of them, else of the first tensor."""
    records = _records_in(batch)
    return len(next(tensors_in(batch))) if records is None else records


def first_samples(batch: Batch, count: int) -> Batch:
    """The first `count` samples of `batch`; what has no samples, such as a number, stays."""
    return _cut(batch, slice(count), samples_in(batch))


def split_batch(batch: Batch, size: int) -> Iterator[Batch]:
    """`batch` in parts of at most `size` samples."""
    count = samples_in(batch)
    for start in range(0, count, size):
        yield _cut(batch, slice(start, start + size), count)


def part_of(batch: Batch, index: int, count: int, samples: int | None = None) -> Batch:
    """Part `index`, from 0, of `count` parts of `batch` that are as even as can be.

    Args:
        batch: A batch, or what belongs to the samples of one.
        index: Which part.
        count: Number of parts.
        samples: Number of samples, where the batch itself doesn't tell.
    """
    size = samples_in(batch) if samples is None else samples
    return _cut(batch, slice(index * size // count, (index + 1) * size // count), size)


def _records_in(batch: Batch) -> int | None:
    """The length of a list of dicts, by itself or beside others; None where there is none."""
    for value in (batch, *(batch if _is_list(batch) else ())):
        if _is_list(value) and value and all(isinstance(one, Mapping) for one in value):
            return len(value)
    return None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _cut(batch: Batch, place: slice, count: int) -> Batch:
    if isinstance(batch, Tensor):
        return batch[place] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, place, count) for key, value in batch.items()}
    if not _is_list(batch):
        return batch
    records = bool(batch) and all(isinstance(one, Mapping) for one in batch)
    if (records and len(batch) == count) or not any(True for _ in tensors_in(batch)):
        return batch[place]
    return _like(batch, (_cut(value, place, count) for value in batch))


def _like(batch: Any, parts: Iterable[Any]) -> tuple[Any, ...]:
    """The parts as a tuple, with the names that the batch's own have."""
    made = tuple(parts)
    if not hasattr(batch, "_fields"):
        return made
    named: tuple[Any, ...] = type(batch)(*made)
    return named
