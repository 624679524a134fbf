"""The form in which networks train, and that they leave it again."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from autocompress.kernels import fast_kernels

CPU = torch.device("cpu")


def depthwise(**options: int) -> nn.Conv2d:
    torch.manual_seed(0)
    settings = {"groups": 16, "padding": 1, **options}
    return nn.Conv2d(16, settings.pop("out_channels", 16), 3, bias=False, **settings)


def gradient(layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The output in mixed precision, and the weight's gradient of its squares' mean."""
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output: Tensor = layer(images)
    output.float().square().mean().backward()  # type: ignore[no-untyped-call]
    weight = layer.get_parameter("weight")
    assert weight.grad is not None
    return output.detach(), weight.grad.clone()


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}, {"out_channels": 32}])
def test_a_layer_that_is_slow_in_bfloat16_computes_in_float32(options: dict[str, int]) -> None:
    layer, images = depthwise(**options), torch.randn(4, 16, 8, 8)
    with fast_kernels(layer, CPU, torch.bfloat16):
        output, found = gradient(layer, images)
        with torch.autocast("cpu", torch.bfloat16):
            of_bfloat16 = layer(images.bfloat16())
        exact = layer(images)
    assert output.dtype == of_bfloat16.dtype == torch.bfloat16
    assert torch.equal(output, exact.bfloat16()), "rounded at its end, and nowhere else"
    torch.testing.assert_close(found, gradient(layer, images)[1], rtol=0.1, atol=1e-3)
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [(depthwise(), torch.bfloat16), (nn.Conv2d(16, 16, 3, stride=2), torch.bfloat16)]
    + [(depthwise(stride=2), None), (depthwise(stride=2).double(), torch.bfloat16)],
)
def test_other_layers_stay_as_they_are(layer: nn.Conv2d, dtype: torch.dtype | None) -> None:
    with fast_kernels(layer, CPU, dtype):
        assert type(layer) is nn.Conv2d


def test_copies_that_are_made_meanwhile_have_weights_of_their_own() -> None:
    layer, images = depthwise(stride=2), torch.randn(4, 16, 8, 8)
    with fast_kernels(layer, CPU, torch.bfloat16):
        copy = deepcopy(layer)
    with torch.no_grad():
        layer.weight.zero_()
        assert copy(images).any() and not layer(images).any()


def test_networks_are_in_plain_order_afterwards_even_where_training_failed() -> None:
    network = nn.Sequential(nn.Conv2d(16, 16, 3), depthwise(stride=2))
    with pytest.raises(RuntimeError), fast_kernels(network, CPU, torch.bfloat16):
        assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
        raise RuntimeError
    assert all(value.is_contiguous() for value in network.parameters())
    assert all(type(layer) is nn.Conv2d for layer in network)
