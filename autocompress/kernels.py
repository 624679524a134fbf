"""How a network lies in memory while it is trained, and which layers then leave mixed precision.

All of it is about the kernels of cuDNN and oneDNN: what they do best, and what is to be avoided.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

NARROW = 16
"""Floats in the longest vector of a CPU."""


@contextmanager
def fast_kernels(
    model: nn.Module, device: torch.device, amp_dtype: torch.dtype | None
) -> Iterator[None]:
    """While it lasts, `model` is in the form in which it trains fastest; then in plain order again.

    Args:
        model: On `device`.
        device: Where it is trained.
        amp_dtype: Its mixed precision, if any.
    """
    _lay_out(model, _fastest_format(model, device))
    slow = _slow_in_bfloat16(model) if device.type == "cpu" and amp_dtype is not None else []
    try:
        for layer in slow:
            layer.__class__ = _FullPrecision
        yield
    finally:
        for layer in slow:
            layer.__class__ = nn.Conv2d
        _lay_out(model, torch.contiguous_format)


class _FullPrecision(nn.Conv2d):
    """A convolution that computes in float32 under autocast; it takes and gives what is usual."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            output = super().forward(input.float())
        return output.to(torch.get_autocast_dtype("cpu"))


def _slow_in_bfloat16(model: nn.Module) -> list[nn.Module]:
    """Depthwise convolutions that aren't plain.

    Their weights' gradient has no bfloat16 kernel in oneDNN (PyTorch 2.14): with a stride of 2, 32
    channels and 128 images of 32 x 32 pixels it takes 55 ms, and 5 in float32.
    """
    return [
        layer
        for layer in model.modules()
        if type(layer) is nn.Conv2d
        and layer.weight.dtype == torch.float32  # autocast leaves float64 alone
        and layer.groups == layer.in_channels > 1
        and (
            max(layer.stride) > 1
            or max(layer.dilation) > 1
            or layer.out_channels != layer.in_channels
        )
    ]


def _fastest_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last, save where that crashes.

    The gradient of a 1 x 1 convolution with a stride and fewer input channels than a vector has
    floats is written beyond its memory by oneDNN, in PyTorch 2.14 on the CPU with channels last.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and device.type == "cpu":
            narrow = module.in_channels // module.groups < NARROW
            if narrow and module.kernel_size == (1, 1) and max(module.stride) > 1:
                return torch.contiguous_format
    return torch.channels_last


def _lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Put the kernels for images into a memory format; `nn.Module.to` refuses others beside."""
    for value in [*model.parameters(), *model.buffers()]:
        if value.ndim == 4:
            value.data = value.data.contiguous(memory_format=memory_format)
