"""Times of layers: measured once for each shape, kept, and comparable whenever they were taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyNet
from test_channels import Residual, randomized
from test_width import table_of as channels_table
from torch import nn

from autocompress import layertimes
from autocompress.latency import Deployment, Runner, prepare
from autocompress.layers import LayerSpec, inspect_layers, spec_of, without_channels
from autocompress.layertimes import LayerTimes, with_times
from autocompress.sensitivity import Choice, LayerTable
from autocompress.transforms import TRANSFORMS

DEPLOYMENT = Deployment("torch")
NETWORK = 1e6


class Twins(nn.Module):
    """Two convolutions of one shape, a third one and a Linear on two positions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(16, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, padding=1)
        self.three = nn.Conv2d(16, 24, (3, 1), stride=2, dilation=2, padding_mode="reflect")
        self.four = nn.Linear(24, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.three(self.two(self.one(x)))
        return self.four(y.mean(2).transpose(1, 2))


def table_of(model: nn.Module, shape: Sequence[int]) -> LayerTable:
    layers, _ = inspect_layers(model, (torch.zeros(1, *shape),))
    choices = {}
    for layer in layers:
        rows = []
        for kind in TRANSFORMS.values():
            ladder = () if kind.refusal(layer) else kind.ladder(layer)
            for index, transform in enumerate(ladder):
                cost = transform.cost(layer)
                share = (index + 1) / len(ladder)
                rows.append(Choice(transform, share, cost.params, cost.macs, 0.1, 0.01))
        if rows:
            choices[layer.name] = tuple(rows)
    return LayerTable(layers, choices, {})


def tell_times(
    monkeypatch: pytest.MonkeyPatch,
    ms: Callable[[LayerSpec, Any], float],
    slowness: list[float],
) -> None:
    """Every run takes `ms(layer, transform)`, and the call, times the list's number."""
    cost: dict[int, float] = {}
    alive: list[Runner] = []

    def runner(self: LayerTimes, layer: LayerSpec, transform: object) -> Runner:
        run = lambda: None  # noqa: E731
        cost[id(run)] = 10.0 + ms(layer, transform)
        alive.append(run)
        return run

    monkeypatch.setattr(LayerTimes, "_runner", runner)
    monkeypatch.setattr(LayerTimes, "_call", lambda _: call)
    cost[id(call)] = 10.0
    monkeypatch.setattr(
        layertimes,
        "_times",
        lambda runners, *_: [slowness[0] * cost.get(id(run), NETWORK) for run in runners],
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every run takes as long as it has multiply-adds; the list's number says how slow all is."""
    slowness = [1.0]

    def macs(layer: LayerSpec, transform: Any) -> float:
        cost = layer.cost if transform is None else transform.cost(layer)
        return float(cost.macs)

    tell_times(monkeypatch, macs, slowness)
    return slowness


def network() -> None:
    """A network that takes so long as `NETWORK` says."""


def call() -> None:
    """Nothing, which takes 10 ms."""


def test_all_rows_are_measured_and_shapes_are_shared(tmp_path: Path) -> None:
    times = LayerTimes(DEPLOYMENT, tmp_path)
    running = prepare(Twins(), (torch.zeros(1, 16, 9, 9),), DEPLOYMENT)
    table = with_times(table_of(Twins(), (16, 9, 9)), times, running, seconds=0.0)
    assert all(c.ms is not None and c.ms > 0 for own in table.choices.values() for c in own)
    assert set(table.layer_ms) == {"one", "two", "three", "four"}
    assert table.layer_ms["one"] == table.layer_ms["two"]
    distinct = 1 + 3 + sum(len(table.choices[name]) for name in ("two", "three", "four"))
    assert len(times) == distinct
    assert table.network_ms is not None


@pytest.mark.parametrize("name", ["one", "three", "four"])
def test_a_layer_alone_is_the_layer(name: str) -> None:
    table = table_of(Twins(), (16, 9, 9))
    layer = next(layer for layer in table.layers if layer.name == name)
    for transform in (None, *(choice.transform for choice in table.choices[name])):
        module, example = layertimes._alone(layer, transform)
        output = module(example)
        assert output.shape[1 if layer.kind == "conv2d" else -1] == layer.out_channels
        sizes = output.shape[2:] if layer.kind == "conv2d" else (output.shape[1], 1)
        assert tuple(sizes) == layer.out_size
        assert bool(output.isfinite().all())


def test_later_studies_read_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(TinyNet(), (1, 8, 8))
    with_times(table, LayerTimes(DEPLOYMENT, tmp_path), network, seconds=0.0)
    (file,) = tmp_path.iterdir()
    first = file.read_text()
    asked: list[object] = []
    real = LayerTimes._runner

    def watched(self: LayerTimes, layer: LayerSpec, transform: object) -> Runner:
        asked.append(transform)
        return real(self, layer, transform)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerTimes, "_runner", watched)
    with_times(table, LayerTimes(DEPLOYMENT, tmp_path), network, seconds=0.0)
    assert file.read_text() == first
    assert set(asked) == {None}  # only the layers as they are, beside the network


@pytest.mark.parametrize("other", [{"threads": 2}, {"batch_size": 2}, {"runtime": "onnxruntime"}])
def test_times_of_other_runtimes_are_kept_apart(tmp_path: Path, other: dict[str, object]) -> None:
    layer = table_of(TinyNet(), (1, 8, 8)).layers[0]
    times = LayerTimes(DEPLOYMENT, tmp_path)
    times.measure({layer: ()}, network, seconds=0.0)
    assert times.get(layer) is not None
    assert LayerTimes(DEPLOYMENT, tmp_path).get(layer) is not None
    assert LayerTimes(replace(DEPLOYMENT, **other), tmp_path).get(layer) is None  # type: ignore[arg-type]


def test_times_of_a_slower_hour_fit_the_earlier_ones(clock: list[float]) -> None:
    table = table_of(TinyNet(), (1, 8, 8))
    conv = next(layer for layer in table.layers if layer.name == "conv")
    early, late = (c.transform for c in table.choices["conv"][:2])
    times = LayerTimes(DEPLOYMENT, None)
    assert times.measure({conv: [early]}, network) == pytest.approx(NETWORK - 10)
    clock[0] = 3.0
    assert times.measure({conv: [early, late]}, network) == pytest.approx(NETWORK - 10)
    assert times.get(conv, late) == pytest.approx(late.cost(conv).macs)


def test_long_ladders_are_thinned_out_where_time_is_short(clock: list[float]) -> None:
    """The ends of each ladder are run, and what is left out lies on a line over the MACs."""
    table = table_of(TinyNet(), (1, 8, 8))
    times = LayerTimes(DEPLOYMENT, None)
    few = with_times(table, times, network, most_seconds=0.25)
    wanted = 1 + sum(map(len, table.choices.values())) + len(table.layers)
    assert len(times) < wanted
    for choices in few.choices.values():
        assert [c.ms for c in choices] == pytest.approx([c.macs for c in choices])


def test_layers_that_sum_up_to_more_than_the_network_are_scaled_down(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(TinyNet(), (1, 8, 8))
    macs = sum(layer.cost.macs for layer in table.layers)
    monkeypatch.setattr("test_layertimes.NETWORK", macs / 2 + 10)
    timed = with_times(table, LayerTimes(DEPLOYMENT, None), network)
    assert (
        sum(timed.layer_ms.values()) == pytest.approx(timed.network_ms) == pytest.approx(macs / 2)
    )
    for choices in timed.choices.values():
        assert [c.ms for c in choices] == pytest.approx([c.macs / 2 for c in choices])


def test_narrower_layers_are_timed_on_the_sides_where_channels_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a runtime that fills widths up to eight, half of a narrow layer saves no time."""

    def padded(layer: LayerSpec) -> float:
        inputs, outputs = (-(-n // 8) * 8 for n in (layer.in_channels, layer.out_channels))
        return layer.cost.macs * inputs * outputs / (layer.in_channels * layer.out_channels)

    tell_times(monkeypatch, lambda layer, transform: padded(layer), [1.0])
    table, _ = channels_table(randomized(Residual()))
    timed = with_times(table, LayerTimes(DEPLOYMENT, None), network)
    assert timed.cost(timed.layers[0]) == replace(
        timed.layers[0].cost, ms=timed.layer_ms[timed.layers[0].name]
    )
    inner = next(layer for layer in timed.layers if layer.name == "inner")  # 12 outputs
    assert set(timed.slowdown["inner"]) == {"in", "out"}
    shares = [share for share, _ in timed.slowdown["inner"]["out"]]
    counts = {choice.keep for choice in table.ladders["inner"].choices}
    assert shares == sorted(count / 12 for count in {3, 6, *counts}) and len(counts - {3, 6}) > 0
    for count in (3, 6, *counts):
        fewer = without_channels(inner, inner.in_channels, count)
        assert timed.cost(fewer).ms == pytest.approx(padded(fewer))
    between = timed.cost(without_channels(inner, inner.in_channels, 4)).ms
    assert between is not None and between > 4 / 12 * padded(inner)
    assert "fc" not in timed.slowdown or set(timed.slowdown["fc"]) == {"in"}
    assert LayerTable.from_json(timed.to_json()) == timed


def test_of_many_keep_counts_some_are_timed() -> None:
    layer = spec_of("x", nn.Conv2d(64, 8, 3), (1, 64, 8, 8), (1, 8, 6, 6))
    found = layertimes._narrower(layer, {"in": set(range(1, 64))})
    counts = [spec.in_channels for _, spec in found["in"]]
    assert len(counts) <= layertimes.MOST_WIDTHS + 2 and counts[0] == 1 and counts[-1] > 48


@pytest.mark.parametrize(
    ("groups", "sides"), [(12, {"out": [0.25, 0.5, 8 / 12, 10 / 12]}), (2, {})]
)
def test_depthwise_layers_lose_both_sides_at_once_and_other_grouped_ones_are_not_timed(
    groups: int, sides: dict[str, list[float]]
) -> None:
    module = nn.Conv2d(12, 12, 3, groups=groups)
    layer = spec_of("x", module, (1, 12, 8, 8), (1, 12, 6, 6))
    found = layertimes._narrower(layer, {"in": {8, 12}, "out": {0, 10}})
    assert {side: [share for share, _ in own] for side, own in found.items()} == sides
    for own in found.values():
        for share, spec in own:
            assert spec.in_channels == spec.out_channels == spec.groups == 12 * share
