"""What real images show of each layer: its inputs, and what the network makes of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
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
SOME = 4
"""Means over the places of an image are kept for one in so many patches."""


@dataclass(frozen=True)
class Means:
    """What the places of an image have in common, where a layer sees several of them.

    Attributes:
        patches: Mean input over all places of an image, `n x in x kh x kw` or `n x in`.
        gradients: Mean derivative over them, `n x out`, in the unit of `Observations.gradients`.
        places: Their number.
    """

    patches: Tensor
    gradients: Tensor
    places: float


@dataclass(frozen=True)
class Observations:
    """What one pass over training images showed of each layer, on the CPU.

    Attributes:
        patches: Layer name to real inputs, `n x in x kh x kw` (conv2d) or `n x in` (linear).
        gradients: Layer name to derivatives of a random projection of the network's outputs by the
            layer's outputs at the same places, `n x out`, times the square root of the number of
            places in an image; no entry where the network has no derivative there.
        means: Layer name to the means over the places of some images; no entry where a layer sees
            one place of each, or there is no derivative.
    """

    patches: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    means: Mapping[str, Means] = field(default_factory=dict)

    @cached_property
    def slopes(self) -> dict[str, Slopes]:
        """Layer name to what the network makes of a change of its outputs, where that is known."""
        return {name: Slopes(found, self.means.get(name)) for name, found in self.gradients.items()}

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
        {name: means for name, one in listeners.items() if (means := one.means()) is not None},
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
        rows: Number of parts that they lie in: images, as a rule.
        means: Mean inputs of some of these parts.
        gradient: Derivatives at the random places; None until they are known.
        mean_gradient: Mean derivatives of those parts.
    """

    patches: Tensor
    places: int
    rows: int
    means: Tensor
    gradient: Tensor | None = None
    mean_gradient: Tensor | None = None


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
        self._means: list[tuple[Tensor, Tensor, float]] = []
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
            chosen = self._draw(count, x)
            rows = len(output) if output.ndim > 1 else 1
            some = self._draw(rows, x)[: self._some]
            call = _Call(
                x.reshape(-1, x.shape[-1])[chosen].float(),
                count,
                rows,
                x.reshape(rows, -1, x.shape[-1])[some].float().mean(1),
            )
            self._keep(
                call,
                output,
                lambda g: g.reshape(count, -1)[chosen],
                lambda g: g.reshape(rows, -1, g.shape[-1])[some].float().mean(1),
            )
            return
        assert isinstance(module, nn.Conv2d)
        channels, height, width = output.shape[-3:]
        count = output.numel() // (channels * height * width)
        image, row, column = (self._draw(n, x) for n in (count, height, width))
        x = x.reshape(-1, *x.shape[-3:])
        some = image[: self._some]
        call = _Call(
            _cut(module, self._layer, x, image, row, column),
            count * height * width,
            count,
            _mean_patches(module, self._layer, x[some], height, width),
        )
        self._keep(
            call,
            output,
            lambda g: g.reshape(-1, channels, height, width)[image, :, row, column],
            lambda g: g.reshape(-1, channels, height, width)[some].float().mean((2, 3)),
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
            self._means.clear()
        places = sum(call.places for call in derived or calls)
        for call in derived or calls:
            rows = -(-self._share * call.places // places)
            self.patches.append(call.patches[:rows])
            if call.gradient is None or call.mean_gradient is None:
                continue
            scale = (places / self.images) ** 0.5
            self.gradients.append(call.gradient[:rows] * scale)
            if call.places > call.rows:
                some = -(-rows // SOME)
                mean = call.mean_gradient[:some] * scale
                self._means.append((call.means[:some], mean, call.places / call.rows))

    @property
    def share_derived(self) -> float:
        """Share of the passes in which there were derivatives by the layer."""
        return sum(self._passes) / len(self._passes)

    def means(self) -> Means | None:
        """The means over places, on the CPU; None where there are none."""
        if not self._means:
            return None
        patches, gradients, places = zip(*self._means, strict=True)
        derived = _first(gradients, sum(map(len, gradients))) * self.share_derived**0.5
        return Means(_first(patches, len(derived)), derived, sum(places) / len(places))

    @property
    def _some(self) -> int:
        return -(-self._share // SOME)

    def _draw(self, limit: int, like: Tensor) -> Tensor:
        return torch.randint(limit, (self._share,), generator=self._generator).to(like.device)

    def _keep(
        self,
        call: _Call,
        output: Tensor,
        at: Callable[[Tensor], Tensor],
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        """Note a call, and the derivative by its output once it is known."""
        self._calls.append(call)

        def note(gradient: Tensor) -> None:
            call.gradient, call.mean_gradient = at(gradient).float(), mean(gradient)

        if output.requires_grad:
            output.register_hook(note)  # type: ignore[no-untyped-call]


class Slopes:
    """What the network's outputs make of a change of one layer's outputs, to first order.

    An output changes by the sum of derivative times change over all places and channels. Changes
    and derivatives are taken as independent of each other, and so are places, but for what all
    places of an image have in common: before a global pooling all derivatives of a channel are
    alike, and the mean change of an image's places counts as often as there are places.

    Args:
        gradients: Derivatives of the network's outputs at some places, `n x out`, as in
            `Observations`.
        means: Those that the places of an image have in common; None where it has one place.
    """

    def __init__(self, gradients: Tensor, means: Means | None = None) -> None:
        self._all = _root(gradients)
        self._common = None if means is None else _root(means.gradients)
        self._places = 1.0 if means is None else means.places

    def change(
        self, of_places: Callable[[Tensor], Tensor], of_means: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """Mean squared change of the outputs for one image, summed over them.

        Args:
            of_places: The mean square of a layer's changes at single places in the metric of a
                root: of `changes @ root.T`.
            of_means: Likewise of their means over an image's places; None where there are none.
        """
        whole = of_places(self._all)
        if self._common is None or of_means is None:
            return whole
        both = of_means(self._common)
        single = whole - of_means(self._all) - of_places(self._common) + both
        return single.clamp_min(0.0) + self._places * both


def output_change(
    exact: Tensor,
    approximate: Tensor,
    slopes: Slopes,
    means: tuple[Tensor, Tensor] | None = None,
) -> float:
    """Predict the squared change of the network's outputs from that of a layer's.

    A change that a batch norm or a bias takes back (another scale or mean of a channel) is no
    change.

    Args:
        exact: The layer's outputs at some places, `n x out`.
        approximate: Those of its replacement.
        slopes: What the network makes of a change.
        means: The outputs of both for the mean inputs of some images, where there are such.
    """
    exact, approximate = exact - exact.mean(dim=0), approximate - approximate.mean(dim=0)
    scale = (exact * approximate).sum(dim=0) / approximate.square().sum(dim=0).clamp_min(1e-30)
    change = partial(_mean_square, approximate * scale - exact)
    if means is None:
        return float(slopes.change(change, None))
    one, other = (part - part.mean(dim=0) for part in means)
    return float(slopes.change(change, partial(_mean_square, other * scale - one)))


def _root(rows: Tensor) -> Tensor:
    """A matrix whose square is the mean of the rows' outer products."""
    root: Tensor = torch.linalg.qr(rows / len(rows) ** 0.5, mode="r")[1]
    return root


def _mean_square(rows: Tensor, root: Tensor) -> Tensor:
    return (rows @ root.T).square().sum(dim=1).mean()


def _mean_patches(
    module: nn.Conv2d, layer: LayerSpec, x: Tensor, height: int, width: int
) -> Tensor:
    """The mean of what the kernel sees over all places of its output: `n x in x kh x kw`."""
    padded = _padded(module, x)
    down, right = layer.kernel_size
    taps = [
        padded[
            :,
            :,
            i * layer.dilation[0] :: layer.stride[0],
            j * layer.dilation[1] :: layer.stride[1],
        ][:, :, :height, :width]
        .float()
        .mean((2, 3))
        for i in range(down)
        for j in range(right)
    ]
    return torch.stack(taps, dim=2).reshape(len(x), -1, down, right)


def _cut(
    module: nn.Conv2d, layer: LayerSpec, x: Tensor, image: Tensor, row: Tensor, column: Tensor
) -> Tensor:
    """What the kernel sees at some places of its output: `n x in x kh x kw`, float32."""
    padded = _padded(module, x)
    rows, columns = (
        place[:, None] * stride + torch.arange(kernel, device=x.device)[None] * dilation
        for place, stride, kernel, dilation in zip(
            (row, column), layer.stride, layer.kernel_size, layer.dilation, strict=True
        )
    )
    # Advanced indices around the channel slice put the channels last.
    found = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return found.permute(0, 3, 1, 2).float()


def _padded(module: nn.Conv2d, x: Tensor) -> Tensor:
    # nn.Conv2d keeps its padding in the order that F.pad takes.
    before = list(module._reversed_padding_repeated_twice)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, before, mode=mode) if any(before) else x
