"""Each format is written, opened and compared; what can't be written says why, before any work."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import get_args

import onnx
import pytest
import torch
from conftest import TinyNet, make_images
from torch import Tensor, nn

from autocompress import formats
from autocompress.config import FormatName
from autocompress.errors import AutocompressError, ConfigError
from autocompress.formats import (
    FORMATS,
    HALF_TOLERANCE,
    TOLERANCE,
    Format,
    Source,
    _difference,
    annotate_onnx,
    check,
    choose_formats,
    write_format,
)
from autocompress.plan import Plan
from autocompress.surgery import apply_plan
from autocompress.transforms import SVD, Tucker2

IMAGES = make_images(16, seed=5)[0]
NOTES = {"classes": '["a", "b"]'}


@pytest.fixture(scope="module")
def source() -> Source:
    torch.manual_seed(3)
    model = TinyNet()
    model(IMAGES)  # batch-norm statistics that are not the initial ones
    plan = Plan({"stem": SVD(4), "conv": Tucker2(8, 12)})
    return Source(apply_plan(model.eval(), plan), (IMAGES[:1],), NOTES)


def test_a_study_file_can_name_all_of_them() -> None:
    assert list(get_args(FormatName)) == list(FORMATS)


@pytest.mark.parametrize("name", list(FORMATS))
def test_each_format_computes_what_the_network_does(
    source: Source, tmp_path: Path, name: str
) -> None:
    kind = FORMATS[name]
    if kind.package is not None:
        pytest.importorskip(kind.package)
    difference = write_format(kind, source, IMAGES, tmp_path)
    largest = source.model(IMAGES).abs().max().item()
    assert 0 <= difference <= kind.tolerance * largest
    files = {path.name for path in tmp_path.iterdir()}
    companions = {Path(kind.file).with_suffix(".bin").name} if kind.file.endswith(".xml") else set()
    assert files == {kind.file} | companions
    # Another network's outputs are not taken for its own.
    other = apply_plan(TinyNet().eval(), Plan({"stem": SVD(4), "conv": Tucker2(8, 12)}))
    with pytest.raises(AutocompressError, match=f"{kind.file} differs from the network"):
        check(kind, tmp_path / kind.file, other, IMAGES)


def test_a_network_may_take_any_number_of_inputs(tmp_path: Path) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = TinyNet()

        def forward(self, first: Tensor, *others: Tensor) -> Tensor:
            found: Tensor = self.net(first)
            for other in others:
                found = found + self.net(other)
            return found

    for count in (1, 3):
        many = Source(Many().eval(), (IMAGES[:1],) * count, {})
        for name in ("onnx", "pt2"):
            assert write_format(FORMATS[name], many, (IMAGES,) * count, tmp_path) < 1e-4


def test_a_network_that_rounds_much_may_differ_by_as_much() -> None:
    class Cancels(nn.Module):
        """Loses the last digits of its outputs, but in double precision."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (self.fc(x) + 2e4) - 2e4

    images, model = torch.rand(4, 8), Cancels()
    precise = copy.deepcopy(model).double()

    def by(error: float) -> float:
        return _difference("a", lambda x: precise(x.double()) + error, model, (images,), TOLERANCE)

    assert by(0.0) > 2 * TOLERANCE * model(images).abs().max()
    for error in (0.1, math.nan):
        with pytest.raises(AutocompressError, match="a differs from the network"):
            by(error)


def test_a_length_in_a_forward_pass_is_the_batch_size(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.cat([self.first.expand(len(x), -1, -1), x], 1).mean(1))
            return out

    images = torch.randn(5, 6, 4)
    network = Tokens().eval()
    for name in ("onnx", "pt2"):
        own = Source(network, (images[:1],), {})
        assert write_format(FORMATS[name], own, images, tmp_path) < 1e-5


def test_a_network_that_is_random_can_not_be_compared(tmp_path: Path) -> None:
    class Random(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.nn.functional.dropout(x, 0.5, training=True))

    images = torch.randn(5, 16)
    own = Source(Random(16, 3).eval(), (images[:1],), {})
    with pytest.raises(AutocompressError, match="answers the same images differently"):
        write_format(FORMATS["onnx"], own, images, tmp_path)


def test_half_precision_is_within_only(source: Source, tmp_path: Path) -> None:
    for name in ("onnx", "onnx-fp16"):
        write_format(FORMATS[name], source, IMAGES, tmp_path)
    model = onnx.load(tmp_path / "model.fp16.onnx")
    ends = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in ends} == {onnx.TensorProto.FLOAT}
    weights = [value.data_type for value in model.graph.initializer if len(value.dims) == 4]
    assert weights and set(weights) == {onnx.TensorProto.FLOAT16}
    onnx.checker.check_model(model, full_check=True)


def test_onnx_is_simple_and_says_what_it_is(source: Source, tmp_path: Path) -> None:
    write_format(FORMATS["onnx"], source, IMAGES, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    kinds = {node.op_type for node in model.graph.node}
    assert kinds == {"Conv", "Relu", "ReduceMean", "Gemm"}  # batch norm is folded, no reshapes
    assert {one.key: one.value for one in model.metadata_props} == NOTES
    annotate_onnx(tmp_path / "model.onnx", {"more": "1"})
    again = onnx.load(tmp_path / "model.onnx")
    assert {one.key: one.value for one in again.metadata_props} == {"more": "1"}


def test_a_shared_source_is_traced_once(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = formats._trace

    def trace(*args: object) -> object:
        calls.append(args)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(formats, "_trace", trace)
    own = Source(source.model, source.example)
    for name in ("onnx", "onnx-fp16", "pt2"):
        write_format(FORMATS[name], own, IMAGES, tmp_path)
    assert len(calls) == 1


def test_what_fails_leaves_nothing(source: Source, tmp_path: Path) -> None:
    def write(source: Source, path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("no more")

    kind = Format("model.x", "", write, lambda _: nn.Identity(), "x", "x")
    with pytest.raises(RuntimeError, match="no more"):
        write_format(kind, source, IMAGES, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_bounded_format_is_compared_within_its_bound(source: Source, tmp_path: Path) -> None:
    seen: list[int] = []

    def run(images: Tensor) -> Tensor:
        seen.append(len(images))
        return source.model(images)

    kind = Format("model.x", "", lambda _, path: path.touch(), lambda _: run, "x", "x")
    write_format(kind, source, IMAGES, tmp_path)
    assert seen == [1, 16]
    bounded = Format(
        "model.y", "", lambda _, path: path.touch(), lambda _: run, "x", "x", largest_batch=8
    )
    write_format(bounded, source, IMAGES, tmp_path)
    assert seen == [1, 16, 1, 8]


def test_formats_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_formats(["pt2", "onnx, onnx-fp16", "pt2"]) == ("pt2", "onnx", "onnx-fp16")
    with pytest.raises(ConfigError, match="Did you mean 'onnx'"):
        choose_formats(["onx"])
    with pytest.raises(ConfigError, match="--int8"):
        choose_formats(["int8"])
    lacking = Format("m", "", lambda *_: None, lambda _: print, "x", "x", 1.0, None, "nowhere", "y")
    monkeypatch.setitem(FORMATS, "lacking", lacking)
    with pytest.raises(ConfigError, match=r"'lacking': nowhere .* pip install 'autocompress\[y\]'"):
        choose_formats(["lacking"])
    chosen = choose_formats(["all"])
    assert "lacking" not in chosen and {"onnx", "onnx-fp16", "pt2", "torchscript"} <= set(chosen)


def test_a_missing_package_is_a_reason(source: Source, tmp_path: Path) -> None:
    lacking = Format("m", "", lambda *_: None, lambda _: print, "x", "x", 1.0, None, "nowhere", "y")
    with pytest.raises(AutocompressError, match=r"pip install 'autocompress\[y\]'"):
        write_format(lacking, source, IMAGES, tmp_path)


def test_tolerances_are_ordered() -> None:
    for name, kind in FORMATS.items():
        assert (kind.tolerance == HALF_TOLERANCE) == name.endswith("fp16")
