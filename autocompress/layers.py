"""What a layer looks like from outside: shapes, sizes and costs, with no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from autocompress.errors import ConfigError, did_you_mean
from autocompress.flow import Flow

Pair = tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """Cost of a layer or a network for one image.

    Attributes:
        params: Number of weights and biases.
        macs: Multiply-adds, one multiply-add counted once; biases are not counted.
        ms: Milliseconds of a batch on the runtime of the study, as measured; None if not known.
    """

    params: int
    macs: int
    ms: float | None = None

    def __add__(self, other: Cost) -> Cost:
        ms = None if self.ms is None or other.ms is None else self.ms + other.ms
        return Cost(self.params + other.params, self.macs + other.macs, ms)


@dataclass(frozen=True)
class LayerSpec:
    """A Conv2d or Linear layer as it is used in one forward pass of one image.

    Attributes:
        name: Name in `model.named_modules()`.
        kind: Which of the two kinds of layer this is.
        in_channels: Input channels (input features of a Linear).
        out_channels: Output channels (output features of a Linear).
        kernel_size: Height and width; (1, 1) for a Linear.
        stride: As in Conv2d; (1, 1) for a Linear.
        padding: As in Conv2d, "same" and "valid" included; (0, 0) for a Linear.
        dilation: As in Conv2d; (1, 1) for a Linear.
        groups: As in Conv2d; 1 for a Linear.
        padding_mode: As in Conv2d; "zeros" for a Linear.
        bias: Whether the layer has a bias.
        in_size: Height and width of the input. Where a network folds several views of an image into
            the batch (frames, crops), that of all views, one above the other. (positions, 1) for a
            Linear, where positions is the number of vectors per image that go through it (1 for a
            classifier head).
        out_size: Height and width of the output; like `in_size` for a Linear.
    """

    name: str
    kind: Literal["conv2d", "linear"]
    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: Pair | str
    dilation: Pair
    groups: int
    padding_mode: str
    bias: bool
    in_size: Pair
    out_size: Pair

    @property
    def weights(self) -> int:
        """Number of weights, the bias not counted."""
        kh, kw = self.kernel_size
        return self.out_channels * (self.in_channels // self.groups) * kh * kw

    @property
    def cost(self) -> Cost:
        """Cost of the layer as it is."""
        positions = self.out_size[0] * self.out_size[1]
        return Cost(self.weights + self.out_channels * self.bias, self.weights * positions)


def is_depthwise(layer: LayerSpec | nn.Conv2d) -> bool:
    """Whether each channel of a convolution goes through by itself."""
    return 1 < layer.groups == layer.in_channels == layer.out_channels


def without_channels(layer: LayerSpec, in_channels: int, out_channels: int) -> LayerSpec:
    """A layer with fewer input and output channels; a depthwise one has as many groups."""
    groups = out_channels if is_depthwise(layer) else layer.groups
    return replace(layer, in_channels=in_channels, out_channels=out_channels, groups=groups)


def spec_of(
    name: str, module: nn.Module, in_shape: Sequence[int], out_shape: Sequence[int]
) -> LayerSpec:
    """Describe a Conv2d or Linear from its module and the shapes it saw.

    Args:
        name: Name in the network.
        module: A Conv2d or Linear.
        in_shape: Shape of its input for one image, the batch of one included.
        out_shape: Shape of its output, likewise.
    """
    if isinstance(module, nn.Conv2d):
        padding = module.padding
        views = prod(in_shape[:-3])
        return LayerSpec(
            name=name,
            kind="conv2d",
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel_size=_pair(module.kernel_size),
            stride=_pair(module.stride),
            padding=padding if isinstance(padding, str) else _pair(padding),
            dilation=_pair(module.dilation),
            groups=module.groups,
            padding_mode=module.padding_mode,
            bias=module.bias is not None,
            in_size=(views * in_shape[-2], in_shape[-1]),
            out_size=(views * out_shape[-2], out_shape[-1]),
        )
    assert isinstance(module, nn.Linear)
    positions = prod(in_shape[:-1])
    return LayerSpec(
        name=name,
        kind="linear",
        in_channels=module.in_features,
        out_channels=module.out_features,
        kernel_size=(1, 1),
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        groups=1,
        padding_mode="zeros",
        bias=module.bias is not None,
        in_size=(positions, 1),
        out_size=(positions, 1),
    )


def inspect_layers(
    model: nn.Module,
    example: tuple[Tensor, ...],
    forward: Callable[[nn.Module, tuple[Tensor, ...]], Any] | None = None,
    include: Sequence[str] | None = ("*",),
    exclude: Sequence[str] = (),
) -> tuple[tuple[LayerSpec, ...], dict[str, str]]:
    """Find the layers that may be transformed, in one forward pass of one image.

    Args:
        model: The network; left in the mode it was in.
        example: Its inputs for one image.
        forward: Runs the network on the example, where that is not `model(*example)`.
        include: Shell patterns of layer names to look at; None for all but the first layers, which
            read the network's input, and the classifiers, which make its output.
        exclude: Shell patterns of layer names to leave alone.

    Returns:
        The layers in execution order, and the layers left alone with the reason. Modules without a
        kernel or matrix, such as batch norm, are not mentioned.
    """
    weighted = {n: m for n, m in model.named_modules() if isinstance(m, _WITH_WEIGHTS)}
    calls, flow = _calls(model, weighted, example, forward)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])

    found: dict[str, LayerSpec] = {}
    left_alone: dict[str, str] = {}
    for name, module in weighted.items():
        shapes = calls.get(name, [])
        reason = _unfit(module, owners) or _unwanted(name, include, exclude)
        reason = reason or _unplaced(name, shapes, flow)
        if reason is None and include is None:
            reason = _at_an_end(name, flow)
        if reason is not None:
            left_alone[name] = reason
        else:
            found[name] = spec_of(name, module, *shapes[0])
    return tuple(found[name] for name in calls if name in found), left_alone


def check_patterns(model: nn.Module, patterns: Mapping[str, Sequence[str]]) -> None:
    """Refuse a pattern that names no layer of the network: it is probably misspelt.

    Args:
        model: The network.
        patterns: Setting, such as "search.exclude", to its shell patterns of layer names.

    Raises:
        ConfigError: Naming the first such pattern.
    """
    names = [n for n, module in model.named_modules() if isinstance(module, _WITH_WEIGHTS)]
    for key, own in patterns.items():
        for pattern in own:
            if any(fnmatchcase(name, pattern) for name in names):
                continue
            inside = f"{pattern}.*"
            if any(fnmatchcase(name, inside) for name in names):
                raise ConfigError(f"{key}: '{pattern}' holds layers but is none; give '{inside}'.")
            raise ConfigError(f"{key}: no layer matches '{pattern}'.{did_you_mean(pattern, names)}")


_WITH_WEIGHTS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.MultiheadAttention,
)

_Shapes = tuple[torch.Size, torch.Size]


def _calls(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    example: tuple[Tensor, ...],
    forward: Callable[[nn.Module, tuple[Tensor, ...]], Any] | None,
) -> tuple[dict[str, list[_Shapes]], Flow]:
    """Shapes of input and output of each call of the modules, in the order of first calls.

    Returns:
        They, and how values flowed from layer to layer.
    """
    calls: dict[str, list[_Shapes]] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
        ) -> None:
            x = args[0] if args else kwargs["input"]
            calls.setdefault(name, []).append((x.shape, output.shape))

        return hook

    hooks = [
        module.register_forward_hook(listen(name), with_kwargs=True)
        for name, module in modules.items()
        # nn.Bilinear and the like are only here to be named.
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    # What a table of embeddings gives was made by a layer, too.
    tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    flow = Flow({**modules, **tables})
    modes = {module: module.training for module in model.modules()}
    device = next((parameter.device for parameter in model.parameters()), None)
    try:
        model.eval()
        moved = tuple(value.to(device) for value in example)
        with torch.no_grad(), flow.following(moved) as end:
            end(model(*moved) if forward is None else forward(model, moved))
    finally:
        # One by one: a part may be kept in another mode than the whole, such as frozen batch norm.
        for module, mode in modes.items():
            module.training = mode
        for handle in hooks:
            handle.remove()
    return calls, flow


def _unfit(module: nn.Module, owners: Mapping[int, Sequence[str]]) -> str | None:
    """Why no transform can act on a layer of this kind; None if one may."""
    if is_parametrized(module):
        return "its weight is parametrized (torch.nn.utils.parametrize)"
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"{_kind(module)} is neither a plain Conv2d nor a plain Linear"
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is computed by a hook"
    if not module.weight.is_floating_point():
        return f"its weight is of type {module.weight.dtype}"
    shared = owners[id(module.weight)]
    if len(shared) > 1:
        return f"its weight is shared by {', '.join(shared)}"
    return None


def _kind(module: nn.Module) -> str:
    """The module's class; with its place where it isn't torch's, for it may have the same name."""
    kind = type(module)
    ours = kind.__module__.startswith("torch.")
    return kind.__name__ if ours else f"{kind.__module__}.{kind.__name__}"


def _unwanted(name: str, include: Sequence[str] | None, exclude: Sequence[str]) -> str | None:
    """Why the settings leave a layer alone; None if they don't."""
    if include is not None and not any(fnmatchcase(name, pattern) for pattern in include):
        return "search.include does not name it"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return "search.exclude names it"
    return None


def _unplaced(name: str, calls: Sequence[_Shapes], flow: Flow) -> str | None:
    """Why a layer can't be replaced where it stands in the network; None if it can."""
    if not calls:
        if name in flow.read_outside:
            return "its weight is used without calling the layer, which a replacement can't serve"
        return "it was not called in the forward pass"
    if len(calls) > 1:
        return f"it was called {len(calls)} times in one forward pass"
    if not all(shape.numel() for shape in calls[0]):
        return "it got nothing of the example image, so its costs are not known"
    if name in flow.read_outside:
        return "its weight is also used outside of the layer, which a replacement can't serve"
    return None


def _at_an_end(name: str, flow: Flow) -> str | None:
    """Why a layer is left alone unless it is asked for; None if it isn't."""
    if name in flow.first:
        end = "first layer"
    elif name in flow.last:
        end = "classifier"
    else:
        return None
    return f"excluded by default: the {end}; search.include = ['*'] lets all layers change"


def _pair(values: Sequence[int]) -> Pair:
    return int(values[0]), int(values[1])
