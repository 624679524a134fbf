"""What real images show of each layer: its inputs, and what the network makes of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.batch import samples_in, split_batch, tensors_in
from autocompress.errors import ConfigError
from autocompress.layers import LayerSpec
from autocompress.surgery import FactorCache
from autocompress.task import Task

CHUNK = 32
"""Images in a backward pass."""


@dataclass(frozen=True)
class Observations:
    """What one pass over training images showed of each layer, on the CPU.

    Attributes:
        patches: Layer name to real inputs, `n x in x kh x kw` (conv2d) or `n x in` (linear).
        gradients: Layer name to derivatives of a random projection of the network's outputs by the
            layer's outputs at the same places, `n x out`, times the square root of the number of
            places in an image; no entry where the network has no derivative there.
    """

    patches: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]

    def factor_cache(self, model: nn.Module) -> FactorCache:
        """A cache whose factorizations of `model` are weighted by what was seen."""
        return FactorCache(model, self.patches, self.output_weights)

    @cached_property
    def output_weights(self) -> dict[str, Tensor]:
        """Layer name to how much the network's outputs make of each of its output channels.

        `out` numbers: the root of the mean squared derivative, 1 in the mean square. A channel that
        made nothing of 1,000 images counts a little still.
        """
        found = {}
        for name, gradients in self.gradients.items():
            squares = gradients.square().mean(dim=0)
            found[name] = (squares / squares.mean().clamp_min(1e-30)).clamp_min(1e-3).sqrt()
        return found


def observe_layers(
    model: nn.Module,
    task: Task,
    layers: Sequence[LayerSpec],
    *,
    images: int = 1024,
    patches: int = 1024,
    seed: int = 0,
) -> Observations:
    """Sample real inputs of each layer, and derivatives at its outputs, in one pass.

    Batch norms work on the statistics of the batch, as they do after recalibration: what a shift of
    a whole channel does is then no part of the derivative.

    Args:
        model: The baseline, on the task's device; not edited.
        task: Gives the data and the forward pass.
        layers: Which layers to listen to.
        images: About how many training images to read.
        patches: How many patches to keep of each layer.
        seed: Fixes the places and the projections.

    Raises:
        ConfigError: If no image came to a layer.
    """
    generator = torch.Generator().manual_seed(seed)
    loader = task.calibrating
    per_batch = max(1, samples_in(next(iter(loader))))
    batch_count = max(1, min(len(loader), -(-images // per_batch)))
    share = -(-patches // (batch_count * -(-per_batch // CHUNK)))
    model = deepcopy(model).eval().requires_grad_(True)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    listeners = {layer.name: _Listener(layer, share, generator) for layer in layers}
    modules = dict(model.named_modules())
    for name, listener in listeners.items():
        modules[name].register_forward_hook(listener, with_kwargs=True)
    with torch.enable_grad():
        for batch in task.calibration_batches(batch_count):
            # Small ones, which bounds the memory of the backward passes.
            for chunk in split_batch(batch, CHUNK):
                count = samples_in(chunk)
                for norm in norms:
                    norm.train(count > 1)
                for listener in listeners.values():
                    listener.images = count
                _backward(task.forward(model, chunk), generator)
                model.zero_grad(set_to_none=True)
                for listener in listeners.values():
                    listener.end_pass()
    unseen = [name for name, listener in listeners.items() if not listener.patches]
    if unseen:
        raise ConfigError(
            f"No training image, of about {images}, came to layer '{unseen[0]}', so nothing tells "
            f"what may be done to it. Leave it alone: search.exclude = {unseen}."
        )
    return Observations(
        {name: _first(one.patches, patches) for name, one in listeners.items()},
        {
            # Where an image did not come to the layer, nothing depends on it.
            name: _first(one.gradients, patches) * one.share_derived**0.5
            for name, one in listeners.items()
            if one.gradients
        },
    )


def _first(parts: Sequence[Tensor], count: int) -> Tensor:
    """The first rows of all parts, on the CPU."""
    # Moved in one go, for each move waits for the GPU.
    return torch.cat(list(parts))[:count].cpu().clone()


def _backward(output: Any, generator: torch.Generator) -> None:
    """Derive a random projection of all outputs: its square is on average their summed square."""
    parts = [part for part in tensors_in(output) if part.is_floating_point() and part.requires_grad]
    if not parts:
        return
    signs = [torch.randn(part.shape, generator=generator).to(part) for part in parts]
    total = sum((part * sign).sum() for part, sign in zip(parts, signs, strict=True))
    assert isinstance(total, Tensor)
    total.backward()  # type: ignore[no-untyped-call]


@dataclass
class _Call:
    """One call of a layer.

    Attributes:
        patches: Inputs at random places of it.
        places: Number of its places.
        gradient: Derivatives at the random ones; None until they are known.
    """

    patches: Tensor
    places: int
    gradient: Tensor | None = None


class _Listener:
    """A forward hook that keeps inputs and derivatives of a layer at random places.

    A layer may see something else than one row for each image: windows of an image, or frames, that
    a network folds into the batch; the few images that no early exit took; one image after the
    other.

    Attributes:
        images: Images in the forward pass that runs.
        patches: Real inputs, one tensor for each call.
        gradients: Derivatives at the same places; empty where there are none.
    """

    def __init__(self, layer: LayerSpec, share: int, generator: torch.Generator) -> None:
        self._layer, self._share, self._generator = layer, share, generator
        self._calls: list[_Call] = []
        self._passes: list[bool] = []
        self.images = 1
        self.patches: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        if not output.numel():
            return
        x = (args[0] if args else kwargs["input"]).detach()
        if self._layer.kind == "linear":
            count = output.numel() // output.shape[-1]
            rows = self._draw(count, x)
            call = _Call(x.reshape(-1, x.shape[-1])[rows].float(), count)
            self._keep(call, output, lambda g: g.reshape(count, -1)[rows])
            return
        assert isinstance(module, nn.Conv2d)
        channels, height, width = output.shape[-3:]
        count = output.numel() // (channels * height * width)
        image, row, column = (self._draw(n, x) for n in (count, height, width))
        x = x.reshape(-1, *x.shape[-3:])
        call = _Call(_cut(module, self._layer, x, image, row, column), count * height * width)
        self._keep(
            call, output, lambda g: g.reshape(-1, channels, height, width)[image, :, row, column]
        )

    def end_pass(self) -> None:
        """Close a forward pass and its backward pass."""
        calls, self._calls = self._calls, []
        # Activation checkpointing calls a layer twice, and only one of the calls is derived.
        derived = [call for call in calls if call.gradient is not None]
        self._passes.append(bool(derived))
        if self.gradients and not derived:
            return
        if derived and not self.gradients:
            self.patches.clear()  # of passes whose outputs didn't depend on the layer
        places = sum(call.places for call in derived or calls)
        for call in derived or calls:
            rows = -(-self._share * call.places // places)
            self.patches.append(call.patches[:rows])
            if call.gradient is not None:
                self.gradients.append(call.gradient[:rows] * (places / self.images) ** 0.5)

    @property
    def share_derived(self) -> float:
        """Share of the passes in which there were derivatives by the layer."""
        return sum(self._passes) / len(self._passes)

    def _draw(self, limit: int, like: Tensor) -> Tensor:
        return torch.randint(limit, (self._share,), generator=self._generator).to(like.device)

    def _keep(self, call: _Call, output: Tensor, at: Callable[[Tensor], Tensor]) -> None:
        """Note a call, and the derivative by its output once it is known."""
        self._calls.append(call)

        def note(gradient: Tensor) -> None:
            call.gradient = at(gradient).float()

        if output.requires_grad:
            output.register_hook(note)  # type: ignore[no-untyped-call]


def output_change(exact: Tensor, approximate: Tensor, gradients: Tensor) -> float:
    """Predict the squared change of the network's outputs from that of a layer's.

    To first order an output changes by the sum of derivative times change; changes at different
    places and channels are taken as independent of each other and of the derivatives. A change that
    a batch norm or a bias takes back (another scale or mean of a channel) is no change.

    Args:
        exact: The layer's outputs at some places, `n x out`.
        approximate: Those of its replacement.
        gradients: Derivatives of the network's outputs there, as in `Observations`.

    Returns:
        Sum over the channels of mean squared change times mean squared derivative.
    """
    exact, approximate = exact - exact.mean(dim=0), approximate - approximate.mean(dim=0)
    scale = (exact * approximate).sum(dim=0) / approximate.square().sum(dim=0).clamp_min(1e-30)
    change = approximate * scale - exact
    return float((gradients.square().mean(dim=0) * change.square().mean(dim=0)).sum())


def _cut(
    module: nn.Conv2d, layer: LayerSpec, x: Tensor, image: Tensor, row: Tensor, column: Tensor
) -> Tensor:
    """What the kernel sees at some places of its output: `n x in x kh x kw`, float32."""
    # nn.Conv2d keeps its padding in the order that F.pad takes.
    before = list(module._reversed_padding_repeated_twice)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, before, mode=mode) if any(before) else x
    rows, columns = (
        place[:, None] * stride + torch.arange(kernel, device=x.device)[None] * dilation
        for place, stride, kernel, dilation in zip(
            (row, column), layer.stride, layer.kernel_size, layer.dilation, strict=True
        )
    )
    # Advanced indices around the channel slice put the channels last.
    found = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return found.permute(0, 3, 1, 2).float()
