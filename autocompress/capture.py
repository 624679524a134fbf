"""Training steps as CUDA graphs, for networks whose kernels are shorter than their launches.

A step of ResNet-20 with distillation is some 700 kernels of a few microseconds each; a GPU waits
for Python most of that time. A graph (torch.cuda.CUDAGraph) launches all of them at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from autocompress.batch import Batch, tensors_in

logger = logging.getLogger("autocompress")

WARM_UP = 3
"""Steps that are run as usual first: libraries choose their kernels and take their memory."""

Gradient = Callable[[Batch], Tensor]
"""`gradient(batch)` leaves the gradients of the batch's loss on the parameters and returns it."""


class CapturedGradient:
    """A `Gradient` that is recorded once and then replayed, with the same results.

    Batches of another shape than the first are computed as usual, and so is everything if the
    network does what a graph can't hold, such as reading a value back.

    Args:
        gradient: What to record. It must do the same operations for each batch of one shape: no
            Python code in it may depend on the batch's values, or on chance.
        parameters: Those that get gradients, on one GPU.
    """

    def __init__(self, gradient: Gradient, parameters: Sequence[nn.Parameter]) -> None:
        self._gradient, self._parameters = gradient, parameters
        self._side = _side_stream(parameters[0].device)
        self._warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failed = False
        self._inputs: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        self._loss: Tensor | None = None

    @property
    def captured(self) -> bool:
        """Whether steps are replayed by now."""
        return self._graph is not None

    def __call__(self, batch: Batch) -> Tensor:
        """Leave the gradients of `batch` on the parameters and return its loss."""
        if self._graph is None and not self._failed and self._warm >= WARM_UP:
            self._capture(batch)
        given = list(tensors_in(batch))
        if self._graph is None or not _alike(given, self._inputs):
            return self._as_usual(batch)
        for place, value in zip(self._inputs, given, strict=True):
            place.copy_(value)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        assert self._loss is not None
        return self._loss.clone()

    def _as_usual(self, batch: Batch) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        if self._failed or self._graph is not None:
            return self._gradient(batch)
        self._warm += 1
        current = torch.cuda.current_stream(self._side.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            loss = self._gradient(batch)
        current.wait_stream(self._side)
        return loss

    def _capture(self, batch: Batch) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        static = _copied(batch)
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread may fetch and pin the next batch meanwhile.
            with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                self._loss = self._gradient(static)
        except RuntimeError as error:
            self._failed = True
            logger.info("Training steps are not captured as a CUDA graph: %s", error)
            return
        self._inputs = list(tensors_in(static))
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._graph = graph

    def release(self) -> None:
        """Give the graph's memory back; gradients are gone after that."""
        for parameter in self._parameters:
            parameter.grad = None
        self._graph, self._loss, self._inputs, self._gradients = None, None, [], []
        self._failed = True
        # The memory of a graph is its own, and would pile up from trial to trial.
        torch.cuda.empty_cache()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for all captures on a device; libraries keep memory for each stream they see."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _copied(batch: Batch) -> Batch:
    if isinstance(batch, Tensor):
        return batch.clone()
    return tuple(_copied(part) for part in batch)


def _alike(batch: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return [(value.shape, value.dtype) for value in batch] == [
        (value.shape, value.dtype) for value in other
    ]
