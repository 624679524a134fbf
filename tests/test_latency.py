"""Latency on the runtime that serves: what is run, how it is compared, and what is refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TinyNet
from torch import nn

from autocompress import latency
from autocompress.config import LatencyConfig
from autocompress.errors import ConfigError
from autocompress.latency import Deployment, LatencyMeter, describe, prepare, threads_of
from autocompress.profiler import Latency

EXAMPLE = (torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)
REFERENCE = Latency(100.0, 5.0, 1, 20, "somewhere", 1, "ONNX Runtime 1.0")


def take(monkeypatch: pytest.MonkeyPatch, *times: Sequence[float]) -> None:
    """Let the networks take these seconds, turn by turn."""
    monkeypatch.setattr(latency, "time_in_turns", lambda *_: [list(own) for own in times])


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch", "openvino"])
def test_a_runtime_computes_what_the_network_does(runtime: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    model = TinyNet().eval()
    found: Any = prepare(model, EXAMPLE, Deployment(runtime, batch_size=2))()
    with torch.no_grad():
        expected = model(EXAMPLE[0][:1].repeat(2, 1, 1, 1))
    if runtime != "torch":
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_preparing_leaves_the_network_as_it_was() -> None:
    model = TinyNet().train()
    prepare(model, EXAMPLE, Deployment("torch"))()
    prepare(model, EXAMPLE, Deployment())()
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_a_latency_is_a_ratio_times_the_baselines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine does meanwhile: both are slower then, and single turns say nothing."""
    meter = LatencyMeter(TinyNet(), EXAMPLE, Deployment(), REFERENCE)
    busy = [0.2, 0.2, 0.2, 7.0, 9.0], [0.3, 0.3, 0.3, 8.0, 0.3]
    take(monkeypatch, *busy)
    found = meter.measure(TinyNet(8))
    assert found.median_ms == pytest.approx(150.0)
    assert meter.speedup(found) == pytest.approx(1 / 1.5)
    assert (found.runs, found.threads, found.batch_size) == (5, 1, 1)
    take(monkeypatch, *[[10 * t for t in times] for times in busy])
    again = meter.measure(TinyNet(8))
    assert again.median_ms == pytest.approx(found.median_ms)
    assert again.iqr_ms == pytest.approx(found.iqr_ms)


def test_the_baseline_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, [0.004, 0.004, 0.006])
    first = LatencyMeter(TinyNet(), EXAMPLE, Deployment()).reference
    assert first.median_ms == pytest.approx(4.0)
    take(monkeypatch, [0.009, 0.009, 0.009])
    assert LatencyMeter(TinyNet(), EXAMPLE, Deployment(), first).reference == first


def test_a_wide_network_takes_longer() -> None:
    class Wide(TinyNet):
        def __init__(self) -> None:
            super().__init__(512)

    meter = LatencyMeter(TinyNet(), EXAMPLE, Deployment(), REFERENCE)
    assert meter.measure(Wide(), seconds=0.0, min_runs=5).median_ms > REFERENCE.median_ms


def test_a_network_that_fails_is_named_with_the_runtime() -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such kernel")

    for runtime in ("onnxruntime", "torch"):
        with pytest.raises(ConfigError, match=f"latency.runtime = '{runtime}'.*no such kernel"):
            LatencyMeter(Failing(), EXAMPLE, Deployment(runtime))


def test_missing_runtimes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for runtime, cure in (("cuda", "no GPU"), ("openvino", r"autocompress\[openvino\]")):
        with pytest.raises(ConfigError, match=cure):
            Deployment.from_config(LatencyConfig(runtime=runtime))  # type: ignore[arg-type]


def test_threads_are_pytorchs_unless_given() -> None:
    assert Deployment.from_config(LatencyConfig()).threads == torch.get_num_threads()
    deployment = Deployment.from_config(LatencyConfig(threads=3))
    assert deployment.threads == 3
    before = torch.get_num_threads()
    with threads_of(deployment):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


def test_a_latency_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = Deployment(batch_size=4, threads=2)
    made = deployment.latency([0.001, 0.002, 0.003])
    assert made.runtime.startswith("ONNX Runtime ") and made.device
    assert describe(made) == f"{deployment.name}, batch 4, 2 threads"
    assert describe(REFERENCE) == "ONNX Runtime 1.0, batch 1, 1 thread"
    assert deployment.made(made)
    for other in ({"threads": 1}, {"batch_size": 1}, {"runtime": "PyTorch"}, {"device": "x"}):
        assert not deployment.made(replace(made, **other))
