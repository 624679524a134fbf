"""Counts against formulas by hand and published figures; timing against fakes."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.errors import ConfigError
from autocompress.layers import LayerSpec
from autocompress.profiler import (
    Latency,
    Profile,
    comparison,
    measure_latency,
    profile_model,
    size_bytes,
    time_in_turns,
)


class Residual(nn.Module):
    """Two convolutions around a sum, in-place and functional ReLU, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AvgPool2d(2)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.conv(x))
        return self.fc(self.flatten(self.pool(x)))


class Attention(nn.Module):
    """Attention written out, with matrix products outside of any layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return (query @ key.transpose(1, 2)).softmax(dim=-1) @ value


def counted(model: nn.Module, *shape: int, **options: Any) -> Profile:
    return profile_model(model, (torch.randn(shape),), latency=False, **options)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options, out_size",
    [
        ({}, (10, 8)),
        ({"padding": 1}, (12, 10)),
        ({"padding": 1, "stride": (2, 1)}, (6, 10)),
        ({"padding": 2, "dilation": 2}, (12, 10)),
        ({"padding": "same", "groups": 2}, (12, 10)),
        ({"padding": 1, "groups": 4, "padding_mode": "reflect"}, (12, 10)),
    ],
)
def test_conv_equals_formula_and_layer_spec(
    options: dict[str, Any], out_size: tuple[int, int], bias: bool
) -> None:
    conv = nn.Conv2d(4, 8, 3, bias=bias, **options)
    profile = counted(conv, 1, 4, 12, 10)
    groups = options.get("groups", 1)
    weights = 8 * (4 // groups) * 3 * 3
    assert profile.params == weights + 8 * bias
    assert profile.macs == weights * out_size[0] * out_size[1]
    assert profile.layers[0].output_shape == (1, 8, *out_size)
    spec = LayerSpec(
        "", "conv2d", 4, 8, (3, 3), conv.stride, conv.padding, conv.dilation, groups,
        conv.padding_mode, bias, (12, 10), out_size,
    )  # fmt: skip
    assert (profile.params, profile.macs) == (spec.cost.params, spec.cost.macs)


@pytest.mark.parametrize("positions", [1, 7])
def test_linear_counts_every_position(positions: int) -> None:
    profile = counted(nn.Linear(6, 10), 1, positions, 6)
    assert (profile.params, profile.macs) == (70, 60 * positions)
    assert profile.memory_bytes == 4 * 70 + 4 * 10 * positions


def test_residual_network_equals_hand_count() -> None:
    profile = counted(Residual(), 1, 3, 8, 8)
    params = {"stem": 216, "bn": 16, "conv": 576 + 8, "fc": 128 * 5 + 5}
    macs = {"stem": 216 * 64, "conv": 576 * 64, "fc": 640}
    plane = 8 * 64 * 4
    activations = {"stem": plane, "bn": plane, "conv": plane, "pool": plane // 4, "fc": 20}
    assert {x.name: x.params for x in profile.layers if x.params} == params
    assert {x.name: x.macs for x in profile.layers if x.macs} == macs
    # The in-place ReLU and the flatten share their input's memory.
    assert {x.name: x.activation_bytes for x in profile.layers} == activations
    assert profile.params == sum(params.values())
    assert profile.macs == sum(macs.values())
    buffers = 2 * 8 * 4 + 8  # mean, variance and the counter of batches, an int64
    assert profile.size_bytes == 4 * profile.params + buffers
    assert profile.memory_bytes == profile.size_bytes + sum(activations.values())
    assert profile.score is None and profile.latency is None


def test_uncounted_names_what_computes_and_no_views() -> None:
    profile = counted(Residual(), 1, 3, 8, 8)
    assert profile.uncounted == {
        "aten.add": 1,
        "aten.avg_pool2d": 1,
        "aten.native_batch_norm": 1,
        "aten.relu": 1,
        "aten.relu_": 1,
    }


def test_views_in_place_are_not_listed() -> None:
    class Twist(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone().transpose_(1, 2).unsqueeze_(0).contiguous().exp()

    assert counted(Twist(), 1, 3, 4).uncounted == {"aten.exp": 1}


def test_matrix_products_outside_of_layers_belong_to_the_module() -> None:
    profile = counted(nn.Sequential(Attention(4), nn.Linear(4, 2)), 1, 6, 4)
    macs = {x.name: x.macs for x in profile.layers}
    assert macs == {"0": 2 * 6 * 6 * 4, "0.qkv": 6 * 4 * 12, "1": 6 * 4 * 2}
    assert profile.macs == sum(macs.values())
    assert profile.uncounted == {"aten._softmax": 1}


def test_fused_transformer_layer_is_counted_and_left_as_it_was() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=24, batch_first=True).eval()
    enabled = torch.backends.mha.get_fastpath_enabled()
    profile = counted(layer, 1, 5, 16)
    projections = 5 * 16 * 16 * 4
    attention = 2 * 5 * 5 * 16
    assert profile.macs == projections + attention + 2 * 5 * 16 * 24
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_resnet18_equals_published_figures() -> None:
    from torchvision.models import resnet18

    profile = counted(resnet18(), 1, 3, 224, 224)
    assert profile.params == 11_689_512
    assert profile.macs == 1_814_073_344
    assert sum(x.params for x in profile.layers) == profile.params
    assert sum(x.macs for x in profile.layers) == profile.macs
    activations = sum(x.activation_bytes for x in profile.layers)
    assert profile.memory_bytes == profile.size_bytes + activations
    assert profile.uncounted["aten.native_batch_norm"] == 20


def test_module_used_twice_costs_twice_but_is_stored_once() -> None:
    layer = nn.Linear(4, 4, bias=False)
    profile = counted(nn.Sequential(layer, nn.Sigmoid(), layer), 1, 4)
    assert (profile.params, profile.macs, profile.size_bytes) == (16, 32, 64)


def test_size_follows_dtype_and_ignores_buffers_that_are_not_stored() -> None:
    model = nn.Linear(4, 2, bias=False).half()
    model.register_buffer("scale", torch.ones(3, dtype=torch.float64))
    model.register_buffer("scratch", torch.ones(100), persistent=False)
    assert size_bytes(model) == 8 * 2 + 3 * 8


def test_counts_one_image_of_a_batch() -> None:
    assert counted(Residual(), 5, 3, 8, 8) == counted(Residual(), 1, 3, 8, 8)


def test_costs_are_those_of_eval_mode_and_modes_come_back() -> None:
    model = Residual().train()
    model.bn.eval()
    before = copy.deepcopy(model.state_dict())
    counted(model, 1, 3, 8, 8)
    assert model.training and model.conv.training and not model.bn.training
    assert hooks_of(model) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_failing_network_is_left_clean() -> None:
    model = Residual().train()
    with pytest.raises(RuntimeError):
        counted(model, 1, 4, 8, 8)
    assert hooks_of(model) == 0 and model.training


def test_works_inside_inference_mode() -> None:
    with torch.inference_mode():
        assert counted(Residual(), 1, 3, 8, 8).macs == (216 + 576) * 64 + 640


def test_forward_replaces_the_call() -> None:
    model = Residual()
    profile = counted(model, 1, 3, 8, 8, forward=lambda net, example: net.stem(example[0]))
    assert profile.macs == 216 * 64
    assert profile.params == counted(model, 1, 3, 8, 8).params


@pytest.mark.parametrize("example", [(), (torch.tensor(1.0),), ("image",)])
def test_bad_example_is_refused(example: Any) -> None:
    with pytest.raises(ConfigError, match="batch first"):
        profile_model(nn.Identity(), example)


def test_profile_round_trips_through_json() -> None:
    profile = profile_model(Residual(), (torch.randn(1, 3, 8, 8),))
    assert profile.latency is not None and profile.latency.median_ms > 0
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


class Recorder(nn.Module):
    """Writes down who is called, with how many images, in which mode."""

    def __init__(self, name: str, calls: list[tuple[str, int, bool, bool]], rest: float) -> None:
        super().__init__()
        self.name, self.calls, self.rest = name, calls, rest

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.rest)
        self.calls.append((self.name, len(x), self.training, torch.is_grad_enabled()))
        return x


def test_latency_says_how_it_was_measured() -> None:
    calls: list[tuple[str, int, bool, bool]] = []
    model = Recorder("a", calls, 0.002)
    latency = measure_latency(model, (torch.zeros(1, 2),), batch_size=4, seconds=0.0, min_runs=7)
    assert (latency.batch_size, latency.runs, latency.device) == (4, 7, "cpu")
    assert (latency.threads, latency.runtime) == (torch.get_num_threads(), "eager")
    assert 2.0 <= latency.median_ms < 200 and latency.iqr_ms >= 0
    assert set(calls) == {("a", 4, False, False)} and len(calls) > 7
    assert model.training


def test_a_module_that_gets_a_part_of_a_parameter() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 4))
            self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.token.expand(len(x), -1, -1))

    model = Tokens()
    assert counted(model, 1, 4).macs == 8
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def test_latency_goes_on_for_the_given_time() -> None:
    begin = time.perf_counter()
    latency = measure_latency(nn.Identity(), (torch.zeros(1),), seconds=0.1)
    assert latency.runs > 20 and time.perf_counter() - begin >= 0.1


def test_compared_networks_take_turns() -> None:
    calls: list[tuple[str, int, bool, bool]] = []
    fast, slow = Recorder("fast", calls, 0.0), Recorder("slow", calls, 0.004)
    runs = [lambda: slow(torch.zeros(1, 2)), lambda: fast(torch.zeros(1, 2))]
    before, after = time_in_turns(runs, seconds=0.0, min_runs=5)
    assert [name for name, *_ in calls] == ["slow", "fast"] * (len(calls) // 2)
    assert len(before) == len(after) == 5
    assert min(before) > min(after)


@pytest.mark.parametrize(
    ("options", "rule"),
    [({"batch_size": 0}, "batch_size >= 1"), ({"min_runs": 1}, "min_runs >= 2")],
)
def test_bad_latency_options_are_refused(options: dict[str, int], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        measure_latency(nn.Identity(), (torch.zeros(1),), **options)


def test_comparison_has_units_and_ratios() -> None:
    def profile(scale: int, score: float, milliseconds: float) -> Profile:
        latency = Latency(milliseconds, 0.1, 1, 20, "cpu", 1)
        values = [n // scale for n in (2_000_000, 8_000_000, 3_000_000_000, 16_000_000)]
        return Profile(*values, latency=latency, score=score)

    rows = comparison(profile(1, 92.5, 6.0), profile(4, 91.9, 2.0))
    shown = [(row.metric, row.unit, row.before, row.after, row.change) for row in rows]
    assert shown == [
        ("accuracy", "%", 92.5, 91.9, "-0.60 points"),
        ("params", "M", 2.0, 0.5, "4.0x"),
        ("size", "MB", 8.0, 2.0, "4.0x"),
        ("MACs", "G", 3.0, 0.75, "4.0x"),
        ("memory", "MB", 16.0, 4.0, "4.0x"),
        ("latency", "ms", 6.0, 2.0, "3.0x"),
    ]
    assert rows[0].ratio is None and rows[5].ratio == 3.0


def test_comparison_leaves_open_what_was_not_measured() -> None:
    rows = {row.metric: row for row in comparison(Profile(10, 40, 0, 60), Profile(5, 20, 0, 30))}
    assert rows["MACs"].unit == "M"
    for name in ("accuracy", "MACs", "latency"):
        assert rows[name].ratio is None and rows[name].change == ""
