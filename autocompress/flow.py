"""How values flow through a network: which layers read its input and which make its output.

One forward pass of one image is followed operation by operation, so that it does not matter how the
forward pass is written. What is learned is how layers depend on each other, not on their names: the
stem may be called `conv1`, `features.0` or `patch_embed.proj`, and there may be several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from autocompress.batch import tensors_in

_INPUT = 1
"""The mark of what depends on the network's input; layers have the bits above it."""


class Flow(TorchDispatchMode):
    """Notes in a forward pass which layers each value depends on.

    Args:
        layers: The layers with weights, by name.

    Attributes:
        read_outside: Layers whose weight is read by something else than their own call.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read_outside: set[str] = set()
        self._layers = layers
        self._bits = {name: 2 << i for i, name in enumerate(layers)}
        # Weak: activations may go, and the address of one that is gone is not given out again.
        self._marks: dict[StorageWeakRef, int] = {}
        self._weights = _weights(layers)
        self._inside: list[str] = []
        self._before: dict[str, int] = {}
        self._result = 0

    @contextmanager
    def following(self, inputs: Any) -> Iterator[Callable[[Any], None]]:
        """Follow a forward pass of `inputs`; what is yielded takes its result."""
        for value in tensors_in(inputs):
            self._mark(value, _INPUT)
        handles = []
        try:
            for name, module in self._layers.items():
                handles.append(
                    module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
                )
                handles.append(module.register_forward_hook(self._leave(name), with_kwargs=True))
            with self:
                yield self._end
        finally:
            for handle in handles:
                handle.remove()

    @property
    def first(self) -> set[str]:
        """Layers that read the network's input, and nothing that another layer made."""
        return {
            name
            for name, marks in self._before.items()
            if marks & _INPUT and not marks & ~(_INPUT | self._bits[name])
        }

    @property
    def last(self) -> set[str]:
        """Layers that the network's output depends on, and no other layer."""
        used = 0
        for name, marks in self._before.items():
            used |= marks & ~self._bits[name]
        return {n for n in self._before if self._bits[n] & self._result & ~used}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        marks = 0
        for value in tensors_in((args, kwargs or {})):
            key = _storage(value)
            marks |= self._marks.get(key, 0)
            owner = self._weights.get(key)
            if owner is not None and owner not in self._inside:
                self.read_outside.add(owner)
        output = func(*args, **(kwargs or {}))
        if marks:
            for value in tensors_in(output):
                self._mark(value, marks)
        return output

    def _mark(self, value: Tensor, marks: int) -> None:
        key = _storage(value)
        self._marks[key] = self._marks.get(key, 0) | marks

    def _marks_of(self, values: Any) -> int:
        marks = 0
        for value in tensors_in(values):
            marks |= self._marks.get(_storage(value), 0)
        return marks

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._inside.append(name)
            self._before[name] = self._before.get(name, 0) | self._marks_of((args, kwargs))

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._inside.pop()
            for value in tensors_in(output):
                self._mark(value, self._bits[name])

        return hook

    def _end(self, output: Any) -> None:
        self._result = self._marks_of(output)


def _storage(value: Tensor) -> StorageWeakRef:
    return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]


def _weights(layers: Mapping[str, nn.Module]) -> dict[StorageWeakRef, str]:
    """Whose weight is where; not the places that several layers share."""
    found: dict[StorageWeakRef, str] = {}
    shared = set()
    for name, module in layers.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            key = _storage(weight)
            if found.setdefault(key, name) != name:
                shared.add(key)
    return {key: name for key, name in found.items() if key not in shared}
