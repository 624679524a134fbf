"""What every transform is: a frozen dataclass that says what it costs before it acts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from autocompress.errors import UnsupportedLayer
from autocompress.layers import Cost, LayerSpec, Pair

Factors = tuple[Tensor, ...]
"""A factorization at full rank: what `factorize` of a transform returns and `kernels` cuts."""


@runtime_checkable
class Transform(Protocol):
    """One choice for one layer: the method is the class, the ranks are its fields.

    Instances are hashable, compare by value and round-trip through JSON (`plan.py`).
    """

    name: ClassVar[str]
    """The name used in study files, trial parameters and plans."""

    @classmethod
    def refusal(cls, layer: LayerSpec) -> str | None:
        """Why this method can't act on `layer`; None if it can."""
        ...

    @classmethod
    def ladder(cls, layer: LayerSpec, points: int = 16) -> Sequence[Self]:
        """Rank choices that save both params and MACs, smallest first, at most `points` of them.

        Empty if none saves anything. Ranks are multiples of 8 where the layer is wide enough.
        """
        ...

    @classmethod
    def full(cls, layer: LayerSpec) -> Self:
        """The choice of full rank, which reproduces the layer."""
        ...

    @classmethod
    def factorize(cls, weight: Tensor, groups: int, patches: Tensor | None) -> Factors:
        """Factor a weight once, at full rank.

        Args:
            weight: `out x in/groups x kh x kw` kernel, or `out x in` matrix of a Linear.
            groups: Groups of the convolution.
            patches: Real inputs of the layer, `n x in x kh x kw` (or `n x in`), which weight the
                approximation error where the method can use them; None for the plain weights.
        """
        ...

    def cost(self, layer: LayerSpec) -> Cost:
        """Params and MACs of the replacement, by formula."""
        ...

    def build(self, module: nn.Module) -> nn.Module:
        """The replacement with the right shapes and untrained weights; never edits `module`.

        The dtype and device are those of `module`.
        """
        ...

    def kernels(self, factors: Factors) -> tuple[Tensor, ...]:
        """The weights of the replacement's layers, in order, cut from `factors` to this rank."""
        ...


T = TypeVar("T", bound=Transform)

NO_SAVING = "no rank saves both params and MACs"


def climb(
    layer: LayerSpec, make: Callable[[float], T], points: int, least: float = 1 / 16
) -> tuple[T, ...]:
    """A ladder: choices at geometrically spread shares of full rank that save params and MACs.

    Args:
        layer: The layer.
        make: The choice at a share of full rank, in (0, 1].
        points: Most choices to return.
        least: The smallest share.
    """
    shares = [least ** (1 - step / 63) for step in range(64)]
    whole = layer.cost
    rungs: dict[int, T] = {}
    # Ranks are rounded, so most shares of a narrow layer mean the same choice.
    for choice in dict.fromkeys(make(share) for share in shares):
        cost = choice.cost(layer)
        if cost.params < whole.params and cost.macs < whole.macs:
            rungs.setdefault(cost.params, choice)
    ordered = [rungs[params] for params in sorted(rungs)]
    if len(ordered) <= points:
        return tuple(ordered)
    step = (len(ordered) - 1) / max(1, points - 1)
    return tuple(ordered[len(ordered) - 1 - round(index * step)] for index in range(points))[::-1]


def round_rank(rank: float, width: int) -> int:
    """`rank` as hardware likes it: a multiple of 8 or 4 where `width` is large enough."""
    multiple = 8 if width >= 64 else 4 if width >= 32 else 1
    return max(1, min(width, multiple * max(1, round(rank / multiple))))


def per_group(weight: Tensor, groups: int) -> Tensor:
    """A kernel as `groups x out/groups x in/groups x kh x kw`."""
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])


def patches_of_group(patches: Tensor | None, groups: int, group: int) -> Tensor | None:
    """The input channels of one group, in double precision."""
    if patches is None:
        return None
    return patches.chunk(groups, dim=1)[group].double()


def principal_outputs(matrix: Tensor, patches: Tensor | None) -> Tensor:
    """Orthonormal directions of a layer's outputs, the most important first.

    With patches they are the eigenvectors of the outputs' covariance, so that cutting them loses
    least of the real outputs (the closed form of whitened SVD, e.g. BALF, arXiv 2509.25136). A
    share of the plain weights' covariance keeps directions that the patches never excite in order.

    Args:
        matrix: `out x in`, in double precision.
        patches: `n x in`, or None for the plain weights, as in truncated SVD.

    Returns:
        `out x out`.
    """
    plain = matrix @ matrix.T
    covariance = plain
    if patches is not None:
        outputs = patches @ matrix.T
        real = outputs.T @ outputs
        covariance = real / real.trace().clamp_min(1e-30) + 0.02 * plain / plain.trace().clamp_min(
            1e-30
        )
    _, vectors = torch.linalg.eigh(covariance)
    return fix_signs(vectors.flip(1))


def fix_signs(vectors: Tensor) -> Tensor:
    """Columns with their largest entry positive: eigenvectors are only given up to sign."""
    largest = vectors.abs().argmax(dim=0)
    signs = vectors.gather(0, largest[None]).sign()
    return vectors * torch.where(signs == 0, torch.ones_like(signs), signs)


def balance(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Scale rank components so that both factors have equal norms: gentler to fine-tune.

    Args:
        first: Factor whose dimension 0 is the rank.
        second: Factor whose dimension 1 is the rank.
    """
    rank = first.shape[0]
    one = first.reshape(rank, -1).norm(dim=1).clamp_min(1e-12)
    other = second.transpose(0, 1).reshape(rank, -1).norm(dim=1).clamp_min(1e-12)
    scale = (other / one).sqrt()
    shape_one = (rank, *[1] * (first.ndim - 1))
    shape_two = (1, rank, *[1] * (second.ndim - 2))
    return first * scale.reshape(shape_one), second / scale.reshape(shape_two)


def like(
    module: nn.Conv2d,
    channels_in: int,
    channels_out: int,
    *,
    kernel: Pair = (1, 1),
    stride: Pair = (1, 1),
    padding: Pair | str = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    bias: bool = False,
    padded: bool = False,
) -> nn.Conv2d:
    """A convolution of the type and place of `module`; `padded` ones take its padding mode."""
    return nn.Conv2d(
        channels_in,
        channels_out,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        padding_mode=module.padding_mode if padded else "zeros",
        device=module.weight.device,
        dtype=module.weight.dtype,
    )


_SETTINGS = (
    "in_channels out_channels kernel_size stride padding dilation groups padding_mode "
    "in_features out_features"
).split()


class StandIn(nn.Module):
    """What stands for a layer answers for its settings, too.

    Forward passes ask layers for more than outputs: for the `kernel_size` to pad by (timm's DaViT),
    or for the type of the weight to cast to (its EdgeNeXt).
    """

    def answer_for(self, module: nn.Module) -> None:
        """Take over the settings of a Conv2d or Linear."""
        self.weight_shape = tuple(module.get_parameter("weight").shape)
        for setting in _SETTINGS:
            if setting in vars(module):
                setattr(self, setting, getattr(module, setting))

    @property
    def weight(self) -> Tensor:
        """Shape, type and device of the weight that is no more; its values are all NaN."""
        own = next(self.parameters())
        return torch.full((), torch.nan, dtype=own.dtype, device=own.device).expand(
            self.weight_shape
        )


class Replacement(StandIn, nn.Sequential):
    """Layers in a row that stand for one."""

    @property
    def bias(self) -> Tensor | None:
        """The bias, which the last layer has."""
        bias = self[-1].bias
        return bias if isinstance(bias, Tensor) else None


def finish(module: nn.Module, layers: Sequence[nn.Module]) -> nn.Sequential:
    """The layers in a row, in the mode of `module` and with its bias in the last one."""
    bias = getattr(module, "bias", None)
    last = layers[-1]
    if isinstance(bias, Tensor) and isinstance(last.bias, Tensor):
        with torch.no_grad():
            last.bias.copy_(bias)
    row = Replacement(*layers)
    row.answer_for(module)
    return row.train(module.training)


def need_conv(module: nn.Module, name: str) -> nn.Conv2d:
    """`module` as a Conv2d.

    Raises:
        UnsupportedLayer: If it is none. A subclass is none either: its forward pass may do more,
            such as timm's Conv2dSame, which pads by the input's size.
    """
    if type(module) is not nn.Conv2d:
        raise UnsupportedLayer(f"{name} acts on plain Conv2d only, got {type(module).__name__}.")
    return module


def need_rank(name: str, field: str, rank: int, most: int) -> None:
    """Check a rank.

    Raises:
        UnsupportedLayer: If it is not in 1..most.
    """
    if not 1 <= rank <= most:
        raise UnsupportedLayer(f"{name} needs 1 <= {field} <= {most}, got {rank}.")


def pair(value: tuple[int, ...] | str) -> Pair | str:
    """A convolution's stride, padding or dilation with its type narrowed."""
    return value if isinstance(value, str) else (value[0], value[1])


def split_padding(value: tuple[int, ...] | str) -> tuple[Pair | str, Pair | str]:
    """The padding of a kh x 1 and of a 1 x kw convolution that stand for one of kh x kw."""
    return (value, value) if isinstance(value, str) else ((value[0], 0), (0, value[1]))


def even_norms(factors: Sequence[Tensor]) -> list[Tensor]:
    """Scale factors of a product to equal norms: gentler to fine-tune."""
    norms = torch.stack([factor.norm() for factor in factors]).clamp_min(1e-12)
    target = norms.log().mean().exp()
    return [factor * (target / norm) for factor, norm in zip(factors, norms, strict=True)]
