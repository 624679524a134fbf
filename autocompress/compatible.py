"""The figures of the published profiler, to lay beside ours.

Results of Deeplite's Neutrino are stated in the figures of deeplite-profiler, in its revisions up
to 2022 (`thirdparty/ptflops.py`, made from ptflops). These figures are not what their names say, so
ratios of theirs and of `autocompress.profiler` must not be mixed. With `compatible_profile` a
network gets the figures that the published tables would show: of the eight networks for CIFAR-100
that the zoo shares with them, to the last printed digit (tests/test_compatible.py).

The formulas, for one image:

* params_m: all parameters / 1e6.
* size_mb: params * 4 bytes / 2^20. Not the size of a file: stored types and buffers don't matter.
* macs_g: the sum over the calls of modules, / 1e9, of

  - convolutions, transposed too: kernel * inputs * (outputs / groups) at each position of the
    output, and outputs there for a bias;
  - linear layers: inputs * outputs, and outputs for a bias;
  - batch norms: 2 * elements, or 1 without scale and shift;
  - ReLU, ReLU6, leaky ReLU, PReLU, ELU: elements;
  - pooling: elements of the input; upsampling: elements of the output.

* memory_mb: size_mb, and 4 bytes / 2^20 for each element of the inputs and of the outputs of all
  modules but `nn.Sequential` and `nn.ModuleList`.

What is wrong with them:

* MACs hold operations that multiply and add nothing, but only of modules. `F.relu(x)` is free and
  `nn.ReLU()(x)` is not; functional pooling, attention's products and all other modules are free.
* A transposed convolution of stride s counts about s^2 times what it does.
* Memory is the sum of all activations rather than the peak. The output of a block counts once more
  after that of its last layer, in-place operations count as new tensors, and a network in which
  layers are factorized seems to need more. It changes when code is moved into modules.
* MB are 2^20 bytes while G and M are powers of ten; MACs below 0.001 G were shown as M after
  multiplication by 1024 (this module always gives G).

Where the published code disagrees with its own table or with itself, this module follows the table:
that code keeps only the last call of a module that runs twice, which makes GoogLeNet's 1.5341 G
1.5336 and its activations 40.72 MB 40.25; every call counts here. It takes parameters of
convolutions, linear layers and batch norms alone, trainable or not depending on the layer; its
description and its later revision, as here, take all. Modules of a subclass count here as their
base class; there they were free. Several inputs are added here; there their shapes were multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autocompress.batch import tensors_in
from autocompress.profiler import Example, Forward, batch_of, eval_mode, on_device

BYTES = 4
"""Of every parameter and activation, whatever its type."""
MEBI = 2**20

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PER_OUTPUT = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.Upsample)
PER_INPUT = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
WITHOUT_OUTPUTS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class CompatibleProfile:
    """The published profiler's figures of a network, as the module's docstring defines them.

    Attributes:
        params_m: Parameters in millions.
        size_mb: Parameters as 32-bit numbers, in units of 2^20 bytes.
        macs_g: What it calls MACs, for one image, in units of 1e9.
        memory_mb: `size_mb` and the activations of one image, in units of 2^20 bytes.
    """

    params_m: float
    size_mb: float
    macs_g: float
    memory_mb: float


def compatible_profile(
    model: nn.Module, example: Example, forward: Forward | None = None
) -> CompatibleProfile:
    """Count as the published profiler did; the training mode is restored and no hook stays.

    Args:
        model: The network, on any device.
        example: Its inputs, batch first; only the first sample is used.
        forward: Replaces `model(*example)`.

    Raises:
        ConfigError: If `example` is empty.
    """
    image = on_device(model, batch_of(example, 1))
    macs, elements = 0, _elements(image)

    def book(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        nonlocal macs, elements
        macs += _macs(module, (args, kwargs), output)
        elements += _elements(output)

    counted = [m for m in model.modules() if not isinstance(m, WITHOUT_OUTPUTS)]
    handles = [m.register_forward_hook(book, with_kwargs=True) for m in counted]
    try:
        with torch.no_grad(), eval_mode(model):
            forward(model, image) if forward else model(*image)
    finally:
        for handle in handles:
            handle.remove()
    params = sum(parameter.numel() for parameter in model.parameters())
    size = params * BYTES / MEBI
    return CompatibleProfile(
        params_m=params / 1e6,
        size_mb=size,
        macs_g=macs / 1e9,
        memory_mb=size + elements * BYTES / MEBI,
    )


def _macs(module: nn.Module, inputs: Any, output: Any) -> int:
    """What one call of a module counts for; 0 for kinds that the profiler doesn't know."""
    elements = _elements(output)
    if isinstance(module, CONVOLUTIONS):
        kernel = math.prod(module.kernel_size) * module.in_channels // module.groups
        return elements * (kernel + (module.bias is not None))
    if isinstance(module, nn.Linear):
        return elements * (module.in_features + (module.bias is not None))
    if isinstance(module, BATCH_NORMS):
        return elements * (2 if module.affine else 1)
    if isinstance(module, PER_OUTPUT):
        return elements
    if isinstance(module, PER_INPUT):
        return next(tensors_in(inputs)).numel()
    return 0


def _elements(value: Any) -> int:
    return sum(tensor.numel() for tensor in tensors_in(value))
