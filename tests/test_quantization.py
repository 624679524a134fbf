"""int8 files on the tiny network: what is in them, what they lose, and what brings it back."""

from __future__ import annotations

import logging
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import TinyNet, count_reads
from onnx.numpy_helper import to_array
from torch import Tensor, nn

from autocompress import quantization
from autocompress.channels import KeptChannels
from autocompress.errors import AutocompressError, ConfigError
from autocompress.evaluation import evaluate
from autocompress.formats import export_onnx
from autocompress.grouping import find_groups
from autocompress.layers import LayerSpec, inspect_layers, without_channels
from autocompress.plan import Plan
from autocompress.quantization import (
    CALIBRATIONS,
    OnnxNetwork,
    Quantizer,
    _quiet,
    calibration_batches,
    fit_rounded,
    quantize_onnx,
    time_files,
)
from autocompress.runtime import open_onnx
from autocompress.surgery import apply_plan
from autocompress.task import Task
from autocompress.transforms import TRANSFORMS

CPU = Path("/proc/cpuinfo")
exact_int8 = pytest.mark.skipif(
    CPU.exists() and "avx2" in CPU.read_text() and "vnni" not in CPU.read_text(),
    reason="sums of int8 products saturate on x86 CPUs without VNNI",
)


def quantizer(task: Task, delta: float = 5.0) -> Quantizer:
    before = evaluate(task.model, task, task.val)
    return Quantizer(task, before, task.example(), delta, confidence=0.5)


def decomposed(task: Task, names: tuple[str, ...]) -> nn.Module:
    """The task's network with its layers replaced by the named methods, near full rank."""
    layers, _ = inspect_layers(task.model, task.example())
    kinds = [TRANSFORMS[name] for name in names]
    plan = {}
    for number, layer in enumerate(layers):
        kind = kinds[number % len(kinds)]
        if kind.refusal(layer) is None:
            plan[layer.name] = kind.full(layer)
    assert plan
    return apply_plan(task.model, Plan(plan)).eval()


@exact_int8
def test_a_network_without_some_channels_stays_close(task: Task, tmp_path: Path) -> None:
    groups, _ = find_groups(task.model, task.example())
    kept = {g.name: KeptChannels(g, tuple(range(g.channels * 3 // 4))) for g in groups}
    model = apply_plan(
        task.model, Plan({"conv": TRANSFORMS["tucker2"].full(_conv(task, kept))}, kept)
    )
    path = tmp_path / "model.int8.onnx"
    found, _ = quantizer(task, delta=100.0).best(model.eval(), path, lambda _: None)
    assert found.bound < 100.0
    (images,) = task.images(64)
    with torch.no_grad():
        exact = model(images)
    (rounded,) = open_onnx(path)(images)
    assert float((rounded - exact).norm() / exact.norm()) < 0.1


def _conv(task: Task, kept: dict[str, KeptChannels]) -> LayerSpec:
    """The second convolution without the removed channels."""
    layers, _ = inspect_layers(task.model, task.example())
    layer = next(layer for layer in layers if layer.name == "conv")
    return without_channels(layer, len(kept["stem"].kept), len(kept["conv"].kept))


def weights_of(model: onnx.ModelProto) -> list[tuple[Any, Any]]:
    """The constants of two axes or more that layers multiply with, and their scales."""
    constants = {value.name: to_array(value) for value in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            weight, scale = (constants[name] for name in node.input[:2])
            if weight.ndim > 1:
                found.append((weight, scale))
    return found


@exact_int8
@pytest.mark.parametrize(
    "names", [*((name,) for name in TRANSFORMS), tuple(TRANSFORMS)], ids="-".join
)
def test_decomposed_networks_stay_close(task: Task, tmp_path: Path, names: tuple[str, ...]) -> None:
    model = decomposed(task, names)
    own = quantizer(task)
    attempt, _ = own.best(model, tmp_path / "int8.onnx", lambda line: None)
    (images,) = task.images(64)
    with torch.no_grad():
        exact = model(images)
        found = own.network(tmp_path / "int8.onnx")(images)
    assert found.shape == exact.shape
    error = float((found - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.1  # rounded, and not much worse for it
    assert abs(attempt.val.score - evaluate(model, task, task.val).score) < 3
    weights = weights_of(onnx.load(tmp_path / "int8.onnx"))
    layers = [part for part in model.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    assert len(weights) == len(layers)


def test_weights_are_int8_with_a_scale_for_each_channel(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    quantizer(task).best(task.model, path, lambda line: None)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    weights = weights_of(model)
    assert [weight.dtype for weight, _ in weights] == [np.dtype("int8")] * 3
    assert {scale.shape for _, scale in weights} == {(16,), (32,), (4,)}
    for weight, _ in weights:
        # Each channel uses the whole range.
        assert (np.abs(weight.reshape(len(weight), -1)).max(axis=1) == 127).all()
    assert not any(
        to_array(value).ndim > 1 and to_array(value).dtype == np.float32
        for value in model.graph.initializer
    )
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


def test_onnx_runtime_runs_whole_numbers_only(task: Task, tmp_path: Path) -> None:
    """Leaving zero points and names out must not keep ONNX Runtime from its int8 kernels."""
    import onnxruntime

    path = tmp_path / "int8.onnx"
    quantizer(task).best(decomposed(task, ("tucker2",)), path, lambda line: None)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert "QLinearConv" in kinds and not {"Conv", "Gemm", "MatMul", "Relu"} & kinds


def test_the_file_keeps_its_interface_and_sheds_its_text(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    quantizer(task).best(task.model, path, lambda line: None)
    graph = onnx.load(path).graph
    (value,) = graph.input
    assert value.name == "input" and value.type.tensor_type.shape.dim[0].dim_param
    assert [output.name for output in graph.output] == ["output"]
    inner = {name for node in graph.node for name in node.output} - {"output"}
    assert all(re.fullmatch(r"\d+", name) for name in inner)
    assert not any(node.name or node.doc_string or node.metadata_props for node in graph.node)


def test_a_wide_network_takes_less_than_two_sevenths_on_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyNet(width=96).eval()
    image = torch.randn(8, 1, 8, 8)
    export_onnx(model, (image[:1],), tmp_path / "float32.onnx")
    quantize_onnx(tmp_path / "float32.onnx", tmp_path / "int8.onnx", [(image,)])
    sizes = [(tmp_path / name).stat().st_size for name in ("float32.onnx", "int8.onnx")]
    assert sizes[0] > 3.5 * sizes[1]


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_ranges_come_from_the_batches(tmp_path: Path, calibration: Any) -> None:
    torch.manual_seed(0)
    model = TinyNet().eval()
    image = torch.randn(64, 1, 8, 8).clamp(-1, 1)
    export_onnx(model, (image[:1],), tmp_path / "float32.onnx")
    scales = []
    for factor in (1.0, 3.0):
        batches = [(factor * part,) for part in torch.split(image, 16)]
        path = tmp_path / "int8.onnx"
        quantize_onnx(tmp_path / "float32.onnx", path, batches, calibration)
        found = onnx.load(path).graph
        first = next(n for n in found.node if n.op_type == "QuantizeLinear")
        constants = {value.name: to_array(value) for value in found.initializer}
        scales.append(float(constants[first.input[1]]))
    assert scales[0] == pytest.approx(2 / 255, rel=0.02)
    assert scales[1] == pytest.approx(6 / 255, rel=0.02)


def test_calibration_reads_training_images_only(task: Task, tmp_path: Path) -> None:
    own = quantizer(task)
    (task.train, trained), (task.test, tested) = count_reads(task.train), count_reads(task.test)
    seen = torch.cat([batch[0] for batch in calibration_batches(task, 70)])
    assert len(seen) == 70
    known = {tuple(image.flatten().tolist()) for image, _ in tiny_images(task)}
    assert all(tuple(image.flatten().tolist()) in known for image in seen)
    own.best(task.model, tmp_path / "int8.onnx", lambda line: None)
    assert trained and not tested


def tiny_images(task: Task) -> list[tuple[Tensor, Tensor]]:
    return [pair for images, labels in task.train for pair in zip(images, labels, strict=True)]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.conv(x)
        return {"class": self.fc(features.mean((2, 3))), "map": features}


def test_an_onnx_file_answers_as_its_network_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, image = TwoHeads().eval(), torch.randn(4, 1, 8, 8)
    export_onnx(model, (image[:1],), tmp_path / "two.onnx")
    found = OnnxNetwork(tmp_path / "two.onnx", model, (image[:1],))(image)
    with torch.no_grad():
        torch.testing.assert_close(found, model(image), rtol=1e-4, atol=1e-5)


def test_quantizing_sets_up_no_logging(task: Task, tmp_path: Path) -> None:
    """A warning of ONNX Runtime's would set up the root logger, and print all lines twice."""
    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    try:
        with _quiet():
            logging.warning("of its insides")
        assert root.handlers == []
    finally:
        root.handlers = before


def test_what_cannot_be_quantized_is_named(tmp_path: Path) -> None:
    image = torch.randn(2, 1, 8, 8)
    export_onnx(nn.Flatten(), (image[:1],), tmp_path / "flat.onnx")
    with pytest.raises(AutocompressError, match="Nothing in flat.onnx can be quantized"):
        quantize_onnx(tmp_path / "flat.onnx", tmp_path / "int8.onnx", [(image,)])
    with pytest.raises(ConfigError, match="at least one batch"):
        quantize_onnx(tmp_path / "flat.onnx", tmp_path / "int8.onnx", [])
    with pytest.raises(ConfigError, match="Did you mean 'minmax'"):
        quantize_onnx(tmp_path / "flat.onnx", tmp_path / "x", [(image,)], "minmaks")  # type: ignore[arg-type]
    (tmp_path / "broken.onnx").write_bytes(onnx.load(tmp_path / "flat.onnx").SerializeToString())
    with pytest.raises(AutocompressError, match="ONNX Runtime can't quantize broken.onnx"):
        quantize_onnx(tmp_path / "broken.onnx", tmp_path / "x", [(torch.randn(2, 5),)])
    assert not (tmp_path / "int8.onnx").exists() and not (tmp_path / "x").exists()


def spoiled(task: Task) -> nn.Module:
    """The same function with two channels far larger than the rest: one range is too coarse."""
    model = TinyNet()
    model.load_state_dict(task.model.state_dict())
    with torch.no_grad():
        for norm, reader in ((model.bn1, model.conv), (model.bn2, model.fc)):
            norm.weight[0] *= 1000
            norm.bias[0] *= 1000
            reader.weight[:, 0] /= 1000
    return model.eval()


def test_a_score_is_that_of_the_file(task: Task, tmp_path: Path) -> None:
    own = quantizer(task)
    first = next(iter(own.attempts(task.model, tmp_path / "int8.onnx")))
    assert torch.equal(own.score(task.model).records, first.val.records)


def test_every_way_is_tried_and_the_best_is_kept(task: Task, tmp_path: Path) -> None:
    lines: list[str] = []
    own = quantizer(task, delta=0.5)
    model, path = spoiled(task), tmp_path / "int8.onnx"
    best, made = own.best(model, path, lines.append)
    assert [attempt.calibration for attempt in made] == list(CALIBRATIONS)
    assert best.bound == min(attempt.bound for attempt in made) > 0.5
    assert len(lines) == 2 and lines[0].startswith("int8 (minmax): ")
    # The file is the best attempt's, not the last one's.
    assert evaluate(own.network(path), task, task.val).score == best.val.score


def rounded_accuracy(model: nn.Module, task: Task) -> float:
    """With the rounding in place, and ranges from training images."""
    with quantization._rounding(model) as ranges, torch.no_grad():
        for part in ranges:
            part.train()
        for batch in task.calibration_batches(8):
            task.forward(model, batch)
        return evaluate(model, task, task.val).score


def test_fine_tuning_with_rounding_brings_back_what_rounding_cost(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At two bits, for eight lose nothing here: weights of -1, 0 and 1, activations of 0 to 3."""
    monkeypatch.setattr(quantization, "LARGEST_WEIGHT", 1)
    monkeypatch.setattr(quantization, "LARGEST_ACTIVATION", 3)
    exact, before = evaluate(task.model, task, task.val).score, deepcopy(task.model)
    rounded = rounded_accuracy(task.model, task)
    assert rounded < exact - 10
    tuned = fit_rounded(
        task.model, task, epochs=4, learning_rate=0.03, seed=0, teacher=before, distillation=0.5
    )
    assert rounded_accuracy(tuned, task) > (rounded + exact) / 2
    # What comes back is a plain network, and the one that was given is untouched.
    assert tuned.state_dict().keys() == before.state_dict().keys()
    assert type(tuned.get_submodule("conv")) is nn.Conv2d and not tuned.training
    for key, value in before.state_dict().items():
        assert torch.equal(task.model.state_dict()[key], value)


@exact_int8
def test_fine_tuning_rounds_as_the_file_does(task: Task, tmp_path: Path) -> None:
    """With ranges from the same images, the network under training is the file, nearly."""
    path = tmp_path / "int8.onnx"
    quantizer(task).best(task.model, path, lambda line: None)
    (images,) = task.images(256)
    calibration = torch.cat([batch[0] for batch in calibration_batches(task)])
    with quantization._rounding(task.model) as ranges, torch.no_grad():
        for part in ranges:
            part.train()
        task.model(calibration)
        task.model.eval()
        rounded = task.model(images)
    with torch.no_grad():
        exact = task.model(images)
    (found,) = open_onnx(path)(images)
    # The file rounds the output too.
    assert float((rounded - found).norm()) < 0.9 * float((exact - found).norm())


def test_a_shared_weight_stays_shared(task: Task) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

    model = Twice()
    with quantization._rounding(model) as ranges:
        assert not ranges
    assert model.two.weight is model.one.weight


def test_files_are_timed_turn_by_turn(task: Task, tmp_path: Path) -> None:
    export_onnx(task.model, task.example(), tmp_path / "float32.onnx")
    paths = {name: tmp_path / "float32.onnx" for name in ("a", "b", "c")}
    found = time_files(paths, task.example(), seconds=0.0, min_runs=5)
    assert list(found) == ["a", "b", "c"]
    assert {one.runs for one in found.values()} == {5}


def test_bfloat16_is_not_used_while_rounding(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def watch(model: nn.Module, own: Task, **_: Any) -> None:
        seen.append(own.amp_dtype)

    monkeypatch.setattr(quantization, "fit", watch)
    half = replace(task, amp_dtype=torch.bfloat16)
    fit_rounded(task.model, half, epochs=1, learning_rate=0.01, seed=0)
    assert seen == [None] and half.amp_dtype is torch.bfloat16
