"""The published profiler's figures: those of the published table, and each formula by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.compatible import CompatibleProfile, compatible_profile
from autocompress.errors import ConfigError
from autocompress.plan import Plan
from autocompress.profiler import profile_model
from autocompress.surgery import apply_plan
from autocompress.transforms import CP, SVD, SpatialSVD, TensorTrain, Tucker2
from autocompress.zoo import ZOO

MEBI = 2**20

PUBLISHED = {
    "resnet18": ("11.2201", "0.5567"),
    "resnet50": ("23.7053", "1.3049"),
    "vgg19": ("20.0867", "0.3995"),
    "densenet121": ("7.0485", "0.8982"),
    "googlenet": ("6.2585", "1.5341"),
    "mobilenet_v1": ("3.3095", "0.0473"),
    "mobilenet_v2": ("2.4122", "0.0947"),
    "pre_act_resnet18": ("11.2173", "0.5566"),
}
"""Millions of parameters and GMACs for CIFAR-100, as printed."""

PUBLISHED_MB = {
    "resnet18": ("42.80", "5.64"),
    "resnet50": ("90.43", "33.07"),
    "vgg19": ("76.62", "3.60"),
    "densenet121": ("26.89", "39.26"),
    "googlenet": ("23.87", "40.72"),
    "mobilenet_v1": ("12.62", "4.00"),
}
"""Size, and memory footprint less size: the activations."""


def profile(model: nn.Module, *shapes: tuple[int, ...]) -> CompatibleProfile:
    return compatible_profile(model, tuple(torch.zeros(shape) for shape in shapes))


def macs(model: nn.Module, *shape: int) -> int:
    return round(profile(model, shape).macs_g * 1e9)


def outputs(model: nn.Module, *shape: int) -> int:
    """Elements of the input and of the outputs of modules."""
    found = profile(model, shape)
    return round((found.memory_mb - found.size_mb) * MEBI / 4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_table_comes_out_to_the_last_digit(name: str) -> None:
    found = profile(ZOO[name](num_classes=100), (1, 3, 32, 32))
    assert (f"{found.params_m:.4f}", f"{found.macs_g:.4f}") == PUBLISHED[name]
    if name in PUBLISHED_MB:
        activations = found.memory_mb - found.size_mb
        assert (f"{found.size_mb:.2f}", f"{activations:.2f}") == PUBLISHED_MB[name]


@pytest.mark.parametrize(
    ("name", "size", "memory"),
    [
        ("resnet18", "42.8014", "48.4389"),
        ("vgg19", "76.6246", "80.2270"),
    ],
)
def test_footprints_that_are_known_to_four_digits_come_out(
    name: str, size: str, memory: str
) -> None:
    found = profile(ZOO[name](num_classes=100), (1, 3, 32, 32))
    assert (f"{found.size_mb:.4f}", f"{found.memory_mb:.4f}") == (size, memory)


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv2d(4, 6, 3, bias=False), (1, 4, 5, 5), 3 * 3 * 4 * 6 * 9),
        (nn.Conv2d(4, 6, 3), (1, 4, 5, 5), 3 * 3 * 4 * 6 * 9 + 6 * 9),
        (nn.Conv2d(4, 6, (1, 3), stride=2, groups=2), (1, 4, 5, 5), 3 * 2 * 6 * 6 + 6 * 6),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (1, 4, 5, 5), 9 * 4 * 25),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), (1, 4, 5, 5), 4 * 4 * 6 * 100),
        (nn.Conv1d(2, 3, 5, bias=False), (1, 2, 7), 5 * 2 * 3 * 3),
        (nn.Linear(7, 5), (1, 7), 7 * 5 + 5),
        (nn.Linear(7, 5, bias=False), (1, 3, 7), 3 * 7 * 5),
        (nn.BatchNorm2d(4), (1, 4, 5, 5), 2 * 100),
        (nn.BatchNorm2d(4, affine=False), (1, 4, 5, 5), 100),
        (nn.ReLU(), (1, 4, 5, 5), 100),
        (nn.ReLU6(inplace=True), (1, 4, 5, 5), 100),
        (nn.MaxPool2d(2, return_indices=True), (1, 4, 6, 6), 144),
        (nn.AdaptiveAvgPool2d(1), (1, 4, 6, 6), 144),
        (nn.Upsample(scale_factor=2), (1, 4, 3, 3), 144),
        (nn.GroupNorm(2, 4), (1, 4, 5, 5), 0),
        (nn.SiLU(), (1, 4, 5, 5), 0),
        (nn.Flatten(), (1, 4, 5, 5), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_each_module_counts_by_its_formula(
    module: nn.Module, shape: tuple[int, ...], expected: int
) -> None:
    assert macs(nn.Sequential(module), *shape) == expected


class _Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(x), 2)


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(input=self.inner(x))
        return y


def test_only_modules_count_and_blocks_count_again() -> None:
    assert macs(_Functional(), 1, 2, 4, 4) == 0
    assert outputs(_Functional(), 1, 2, 4, 4) == 32 + 8
    # The input, the ReLU and the pooling; a Sequential has no output of its own.
    assert outputs(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), 1, 2, 4, 4) == 32 + 32 + 8
    assert outputs(nn.Sequential(_Functional()), 1, 2, 4, 4) == 32 + 8


def test_a_module_that_runs_twice_counts_twice_but_has_its_parameters_once() -> None:
    found = profile(_Twice(), (1, 3))
    assert found.params_m == 9e-6
    assert round(found.macs_g * 1e9) == 18
    # Two calls and the block's own output.
    assert outputs(_Twice(), 1, 3) == 3 + 3 + 3 + 3


def test_factorized_layers_need_less_of_all_but_activations() -> None:
    whole = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    first, second = nn.Conv2d(16, 4, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(4, 16, 1)
    small = nn.Sequential(nn.Sequential(first, second), nn.ReLU())
    before, after = (profile(model, (1, 16, 8, 8)) for model in (whole, small))
    assert after.macs_g < before.macs_g and after.size_mb < before.size_mb
    assert outputs(small, 1, 16, 8, 8) - outputs(whole, 1, 16, 8, 8) == 4 * 8 * 8


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan({"0": Tucker2(3, 4), "1": SpatialSVD(1), "2": SVD(5), "4": SVD(2)}),
        Plan({"0": TensorTrain((2, 3, 2)), "2": CP(4), "4": TensorTrain((2,))}),
    ],
    ids=["whole", "tucker2, svd", "tt, cp"],
)
def test_products_of_compressed_networks_are_those_of_the_profiler(plan: Plan) -> None:
    """Without biases, norms, activations and pooling modules, both count the same."""
    net = nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
        nn.Conv2d(12, 16, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(16 * 9, 12, bias=False),
    )
    small = apply_plan(net, plan)
    ours = profile_model(small, (torch.zeros(1, 8, 8, 8),), latency=False)
    found = profile(small, (1, 8, 8, 8))
    assert round(found.macs_g * 1e9) == ours.macs
    assert found.size_mb * MEBI == ours.size_bytes == 4 * ours.params


def test_all_parameters_take_four_bytes_whatever_their_type() -> None:
    model = nn.Linear(512, 512, bias=False).half().requires_grad_(False)
    found = compatible_profile(model, (torch.zeros(1, 512).half(),))
    assert found.size_mb == 1.0
    assert found.params_m == 512 * 512 / 1e6


def test_it_is_for_one_image_and_leaves_the_network_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model[2].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert profile(model, (5, 3, 8, 8)) == profile(model, (1, 3, 8, 8))
    assert model.training and not model[2].training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_failing_network_keeps_no_hooks() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        profile(model, (1, 4))
    assert not model[0]._forward_hooks
    with pytest.raises(ConfigError, match="at least one tensor"):
        compatible_profile(model, ())


def test_another_forward_and_several_inputs() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": x + y, "first": x}

    found = profile(Sum(), (2, 3), (2, 3))
    assert found.memory_mb * MEBI == 4 * (3 + 3 + 3 + 3)
    model = nn.Sequential(nn.Linear(3, 2))
    twice = compatible_profile(model, (torch.zeros(1, 3),), lambda net, x: (net(*x), net(*x)))
    assert twice.macs_g == pytest.approx(2 * profile(model, (1, 3)).macs_g)
