"""Ways to int8 compared on the networks of a finished study: accuracy, size on disk, latency.

    python scripts/bench_quantization.py runs/quickstart
    python scripts/bench_quantization.py runs/cifar10-resnet20 --networks baseline best

Every way gets the same 512 training images (torchao and NNCF must be installed for their ways:
`pip install torchao nncf`; where one is not, its line says so). Its ONNX file is scored on the
study's validation images and timed on ONNX Runtime turn by turn with the float32 file. `drop` is
against the study's baseline; `stripped` is the file's size after what `quantization` leaves out of
its own files (names in between, notes, zero points that are zero) is left out of it too, and
`ratio` compares that with the float32 file as it is exported. `seconds` is the time to make it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from torch import nn

from autocompress import quantization
from autocompress.config import StudyConfig, flatten, parse_config
from autocompress.errors import ConfigError
from autocompress.evaluation import evaluate, metric_drop
from autocompress.export import load
from autocompress.formats import export_onnx
from autocompress.handout import quantizer_of
from autocompress.profiler import Example
from autocompress.quantization import Quantizer, calibration_batches, quantize_onnx, time_files
from autocompress.sources import task_from_config
from autocompress.store import StudyFolder


@dataclass(frozen=True)
class Job:
    """What every way starts from.

    Attributes:
        model: The float32 network.
        source: Its ONNX file.
        batches: Training images.
        example: One image.
    """

    model: nn.Module
    source: Path
    batches: Sequence[Example]
    example: Example


def with_onnxruntime(job: Job, target: Path, **options: Any) -> None:
    """ONNX Runtime's static quantization; `options` replace the product's own."""
    from onnxruntime import quantization as tools
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [value.name for value in onnx.load(job.source).graph.input]
    settings: dict[str, Any] = {
        "quant_format": tools.QuantFormat.QDQ,
        "per_channel": True,
        "weight_type": tools.QuantType.QInt8,
        "activation_type": tools.QuantType.QUInt8,
        "calibrate_method": tools.CalibrationMethod.MinMax,
        "extra_options": {"CalibStridedMinMax": 1},
    }
    with quantization._quiet():
        folded = target.with_suffix(".folded")
        quant_pre_process(str(job.source), str(folded), skip_symbolic_shape=True)
        reader = quantization._Reader(names, job.batches)
        tools.quantize_static(str(folded), str(target), reader, **(settings | options))


def with_entropy(job: Job, target: Path) -> None:
    """The same with ranges that lose least information."""
    from onnxruntime.quantization import CalibrationMethod

    with_onnxruntime(job, target, calibrate_method=CalibrationMethod.Entropy)


def with_signed_activations(job: Job, target: Path) -> None:
    """The same with activations of -128 to 127."""
    from onnxruntime.quantization import QuantType

    with_onnxruntime(job, target, activation_type=QuantType.QInt8)


def with_operators(job: Job, target: Path) -> None:
    """The same with integer operators in place of QDQ pairs."""
    from onnxruntime.quantization import QuantFormat

    with_onnxruntime(job, target, quant_format=QuantFormat.QOperator)


def with_pt2e(job: Job, target: Path) -> None:
    """torchao's PT2E with its x86 quantizer, then PyTorch's exporter."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    two = tuple(torch.cat([value, value]) for value in job.example)
    free: Any = tuple({0: torch.export.Dim("batch", min=1)} for _ in two)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    program = torch.export.export(job.model, two, dynamic_shapes=free)
    prepared = prepare_pt2e(program.module(), quantizer)
    for batch in job.batches:
        prepared(*batch)
    converted = torch.export.export(convert_pt2e(prepared), two, dynamic_shapes=free)
    exported = torch.onnx.export(converted, dynamo=True, verbose=False, input_names=["input"])
    assert exported is not None
    exported.save(target)


def with_nncf(job: Job, target: Path) -> None:
    """NNCF on the ONNX file, with its fast bias correction."""
    import nncf

    model = onnx.load(job.source)
    names = [value.name for value in model.graph.input]

    def feed(batch: Example) -> dict[str, Any]:
        return {name: value.numpy() for name, value in zip(names, batch, strict=True)}

    dataset = nncf.Dataset(job.batches, feed)
    onnx.save(nncf.quantize(model, dataset, subset_size=len(job.batches)), target)


WAYS: dict[str, Callable[[Job, Path], None]] = {
    "autocompress, minmax": lambda job, to: quantize_onnx(job.source, to, job.batches),
    "autocompress, percentile": lambda job, to: quantize_onnx(
        job.source, to, job.batches, "percentile"
    ),
    "ONNX Runtime, minmax": with_onnxruntime,
    "ONNX Runtime, entropy": with_entropy,
    "ONNX Runtime, minmax, signed": with_signed_activations,
    "ONNX Runtime, minmax, QOperator": with_operators,
    "torchao PT2E": with_pt2e,
    "NNCF": with_nncf,
}


def main() -> None:
    """Compare the ways on a study's networks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="The folder of a finished study.")
    parser.add_argument("--networks", nargs="+", default=["best"], choices=["best", "baseline"])
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stored = arguments.folder / "study.json"
    if not stored.exists():
        raise ConfigError(f"{arguments.folder} is no study's folder: there is no {stored}.")
    config = parse_config(flatten(json.loads(stored.read_text(encoding="utf-8"))))
    quantizer = open_quantizer(config, arguments.folder)
    batches = list(calibration_batches(quantizer.task))
    columns = ["network", "way", "val accuracy", "drop", "bytes", "stripped", "ratio"]
    columns += ["ms", "float32 ms", "seconds"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in arguments.networks:
        model = quantizer.task.model if name == "baseline" else load(arguments.folder / "best")
        for row in compare(quantizer, model, batches, arguments.ways):
            print(f"| {name} | {row} |", flush=True)


def open_quantizer(config: StudyConfig, folder: Path) -> Quantizer:
    """The study's data and baseline."""
    return quantizer_of(config, StudyFolder(folder), task_from_config(config))


def compare(
    quantizer: Quantizer, model: nn.Module, batches: Sequence[Example], ways: Sequence[str]
) -> Iterator[str]:
    """A row of the table for the float32 file, and one for each way."""
    with TemporaryDirectory() as place:
        source = Path(place) / "float32.onnx"
        export_onnx(model, quantizer.example, source)
        job = Job(model, source, batches, quantizer.example)
        yield _row(quantizer, job, "float32", lambda _, to: export_onnx(model, job.example, to))
        for way in ways:
            yield _row(quantizer, job, way, WAYS[way])


def _row(quantizer: Quantizer, job: Job, way: str, make: Callable[[Job, Path], None]) -> str:
    target = job.source.with_name("int8.onnx")
    begin = time.perf_counter()
    try:
        with _silence():
            make(job, target)
    except ImportError as error:
        return " | ".join((way, f"not installed: {error.name}", *[""] * 7))
    seconds = time.perf_counter() - begin
    val = evaluate(quantizer.network(target), quantizer.task, quantizer.task.val)
    times = time_files({"float32": job.source, "int8": target}, job.example, seconds=1.0)
    stripped = job.source.with_name("stripped.onnx")
    small = onnx.load(target)
    quantization._strip(small)
    onnx.save(small, stripped)
    size = stripped.stat().st_size
    return " | ".join(
        (
            way,
            f"{val.score:.2f}",
            f"{metric_drop(quantizer.before, val):.2f}",
            f"{target.stat().st_size:,}",
            f"{size:,}",
            f"{job.source.stat().st_size / size:.2f}x",
            f"{times['int8'].median_ms:.3f}",
            f"{times['float32'].median_ms:.3f}",
            f"{seconds:.1f}",
        )
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the libraries' notes out of the table."""
    import logging
    import warnings

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), quantization._quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


if __name__ == "__main__":
    main()
