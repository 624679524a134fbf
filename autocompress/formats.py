"""The files that a network can be exported to: how each is written, opened and checked.

`FORMATS` is the one table of them. What several formats need, such as the traced graph, is made
once for all by a `Source`.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.onnx import ONNXProgram

from autocompress.batch import tensors_in
from autocompress.errors import AutocompressError, ConfigError, did_you_mean
from autocompress.profiler import Example, size_bytes
from autocompress.runtime import open_executorch, open_onnx, open_openvino

TOLERANCE = 1e-4
"""Largest difference of an exported file's outputs, relative to the largest output."""
ROUNDING = 4.0
"""More is allowed where float32 itself is that far from double precision: so many times that
distance. Some deep networks lose three digits (timm's ConvMixer with random weights)."""
HALF_TOLERANCE = 1e-2
"""The same for a file in float16, whose numbers have 11 bits."""

INT8_FILE = "model.int8.onnx"
EXECUTORCH_BATCH = 8
"""Most images at once in an ExecuTorch file, whose memory is planned when it is written. ExecuTorch
1.5.1 plans for 15, whatever bound the graph has above that."""
ONNX_SINGLE_FILE_BYTES = 1_800_000_000
"""Above this the weights lie beside the ONNX file: protobuf can't hold 2 GB."""


class Source:
    """A network on its way into files; what several formats need is made once.

    Args:
        model: The network; it is not changed.
        example: Its inputs, batch first.
        notes: What a file that can hold notes says of itself, by name.
    """

    def __init__(
        self, model: nn.Module, example: Example, notes: Mapping[str, str] | None = None
    ) -> None:
        self.model = _portable(model)
        self.example = tuple(_on_cpu(value) for value in example)
        self.notes = dict(notes or {})

    @cached_property
    def program(self) -> ExportedProgram:
        """The network's graph with a free batch size."""
        return _trace(self.model, self.example)

    def bounded(self, largest: int) -> ExportedProgram:
        """The same graph for at most so many images at once."""
        return _trace(self.model, self.example, largest)

    @cached_property
    def onnx(self) -> ONNXProgram:
        """The same as ONNX: batch norm is folded, constants are computed, dead nodes are gone."""
        with torch.no_grad():
            output = self.model(*(value[:1] for value in self.example))
        names: dict[str, Any] = {}
        if len(self.example) == 1:
            names["input_names"] = ["input"]
        if isinstance(output, Tensor):
            names["output_names"] = ["output"]
        from onnx_ir.traversal import RecursiveGraphIterator

        program = self.program
        with _quiet():
            try:
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    verbose=False,
                    dynamic_shapes=_free_batch(self.example),
                    **names,
                )
            except Exception as error:
                raise AutocompressError(
                    f"torch.onnx can't export {type(self.model).__name__}: {first_line(error)}"
                ) from error
        assert exported is not None  # None is what the old exporter returns
        for node in RecursiveGraphIterator(exported.model.graph):
            node.metadata_props.clear()
        exported.model.metadata_props.update(self.notes)
        return exported


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        file: The file's name in the network's folder.
        use: What it is for, in a few words.
        write: Writes it, and what belongs to it, beside each other.
        open: Opens it as a function of the network's inputs.
        runtime: Which script runs it: `predict_<runtime>.py`.
        needs: Packages, for pip, that a machine needs to run it.
        tolerance: Largest difference to the network's outputs, relative to the largest of them.
        largest_batch: Most images at once; None for any number.
        package: The module that writes it, where autocompress alone doesn't bring it.
        extra: The extra of autocompress that brings it.
    """

    file: str
    use: str
    write: Callable[[Source, Path], None] = field(repr=False)
    open: Callable[[Path], Callable[..., Any]] = field(repr=False)
    runtime: str
    needs: str
    tolerance: float = TOLERANCE
    largest_batch: int | None = None
    package: str | None = None
    extra: str | None = None

    @property
    def missing(self) -> str | None:
        """Why this machine can't write it, and the cure; None where it can."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed; run pip install 'autocompress[{self.extra}]'"


def known_formats(names: Sequence[str]) -> None:
    """Check names of formats.

    Raises:
        ConfigError: If one is unknown.
    """
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"Unknown format '{name}'.{did_you_mean(name, FORMATS)}")


def choose_formats(words: Sequence[str]) -> tuple[str, ...]:
    """The formats that somebody asks for, all of which this machine can write.

    Args:
        words: Names, or several in one word ("onnx,pt2"); "all" for whatever can be written here.

    Raises:
        ConfigError: If one is unknown, or its package is not installed.
    """
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    asked = list(dict.fromkeys(name for name in names if name != "all"))
    if "int8" in asked or "onnx-int8" in asked:
        raise ConfigError("int8 is no --format: it reads the study's data. Give --int8.")
    known_formats(asked)
    for name in asked:
        if FORMATS[name].missing:
            raise ConfigError(f"Format '{name}': {FORMATS[name].missing}.")
    if "all" in names:
        asked = [name for name, kind in FORMATS.items() if name in asked or not kind.missing]
    return tuple(asked)


def write_format(kind: Format, source: Source, images: Tensor | Example, folder: Path) -> float:
    """Write a network in one format and compare the file with it.

    Args:
        kind: The format.
        source: The network.
        images: Its inputs, to compare with; see `check`.
        folder: Where the file goes, if all went well; otherwise nothing does.

    Returns:
        The largest absolute difference between the outputs.

    Raises:
        AutocompressError: If the package is missing, or the outputs differ by too much.
        Exception: Whatever the exporter raises.
    """
    if kind.missing:
        raise AutocompressError(f"{kind.missing}.")
    with TemporaryDirectory(dir=folder) as place:
        kind.write(source, Path(place) / kind.file)
        difference = check(kind, Path(place) / kind.file, source.model, images)
        for path in Path(place).iterdir():
            path.rename(folder / path.name)
    return difference


def check(kind: Format, path: Path, model: nn.Module, images: Tensor | Example) -> float:
    """Open a file and run it beside the network that it came from.

    Args:
        kind: The file's format.
        path: The file.
        model: The network.
        images: The network's inputs, batch first; they are run one by one and all at once.

    Returns:
        The largest absolute difference between the outputs.

    Raises:
        AutocompressError: If the difference is above the format's tolerance.
    """
    with _quiet():
        inputs = (images,) if isinstance(images, Tensor) else images
        inputs = tuple(_on_cpu(value[: kind.largest_batch]) for value in inputs)
        return _difference(path.name, kind.open(path), _portable(model), inputs, kind.tolerance)


def export_onnx(model: nn.Module, example: Example, path: str | Path) -> None:
    """Write an ONNX file with a free batch size; `check_onnx` compares it with the network.

    Args:
        model: The network; it is not changed.
        example: Its inputs, batch first.
        path: The file to write.

    Raises:
        AutocompressError: If the network can't be exported.
    """
    _write_onnx(Source(model, example), Path(path))


def quick_onnx(model: nn.Module, example: Example) -> bytes:
    """The network as an ONNX file's content, for timing only: nobody has checked its outputs.

    The TorchScript exporter takes a tenth of the time of the one that writes `model.onnx` (0.3 s
    instead of 8 s for a ResNet-20), and ONNX Runtime needs the same time for both files.

    Args:
        model: The network; it is not changed.
        example: Its inputs; the batch size is fixed to theirs.

    Raises:
        AutocompressError: If the network can't be exported.
    """
    own = _portable(model)
    inputs = tuple(_on_cpu(value) for value in example)
    with TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        try:
            with _quiet():
                # PyTorch calls it legacy, in our name; as an error it would always be too slow.
                warnings.simplefilter("ignore", DeprecationWarning)
                torch.onnx.export(own, inputs, path, dynamo=False)
        except Exception:
            # It knows fewer operations, and PyTorch may drop it.
            export_onnx(own, inputs, path)
        return path.read_bytes()


def export_pt2(model: nn.Module, example: Example, path: str | Path) -> None:
    """Write a PT2 file (`torch.export`) with a free batch size; `check_pt2` compares it.

    The arguments and errors are those of `export_onnx`.
    """
    _write_pt2(Source(model, example), Path(path))


def check_onnx(path: str | Path, model: nn.Module, images: Tensor | Example) -> float:
    """Check an ONNX file's structure and run it in ONNX Runtime beside the network.

    Args:
        path: The file.
        model: The network that it came from.
        images: The network's inputs, batch first; they are run one by one and all at once.

    Returns:
        The largest absolute difference between the outputs.

    Raises:
        AutocompressError: If the difference is above `TOLERANCE` relative to the largest output.
    """
    return check(FORMATS["onnx"], Path(path), model, images)


def check_pt2(path: str | Path, model: nn.Module, images: Tensor | Example) -> float:
    """Load a PT2 file and run it beside the network; as `check_onnx`."""
    return check(FORMATS["pt2"], Path(path), model, images)


def annotate_onnx(path: Path, notes: Mapping[str, str]) -> None:
    """Add notes to an ONNX file: strings by name, which runtimes hand out with the network."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, dict(notes))
    onnx.save(model, path)


def _write_onnx(source: Source, path: Path) -> None:
    exported = source.onnx
    with _quiet():
        exported.save(path, external_data=size_bytes(source.model) > ONNX_SINGLE_FILE_BYTES)


def _write_half_onnx(source: Source, path: Path) -> None:
    """float16 within, float32 at the inputs and outputs, so that callers need no change."""
    import onnx
    import onnx_ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        half = convert_float_to_float16(source.onnx.model_proto, keep_io_types=True)
    model = onnx_ir.from_proto(half)
    # The converter puts the cast of the inputs last; ONNX wants nodes in order.
    model.graph.sort()
    onnx.save(onnx_ir.to_proto(model), path)


def _write_pt2(source: Source, path: Path) -> None:
    program = source.program
    with _quiet():
        torch.export.save(program, path)


def _write_torchscript(source: Source, path: Path) -> None:
    with _quiet():
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            source.model, _pair(source.example), check_trace=False, strict=False
        )
        torch.jit.save(torch.jit.freeze(traced), path)


def _write_openvino(source: Source, path: Path) -> None:
    _convert_to_openvino(source, path, half=False)


def _write_half_openvino(source: Source, path: Path) -> None:
    _convert_to_openvino(source, path, half=True)


def _convert_to_openvino(source: Source, path: Path, half: bool) -> None:
    """An XML file, and the weights beside it in a .bin file, in float16 for `half`."""
    import openvino

    with TemporaryDirectory() as place:
        file = Path(place) / "model.onnx"
        _write_onnx(source, file)
        # Not convert_model(), which sends usage statistics where openvino-telemetry is installed.
        model = openvino.Core().read_model(file)
        openvino.save_model(model, path, compress_to_fp16=half)


def _write_executorch(source: Source, path: Path) -> None:
    """For the XNNPACK backend: ARM and x86 CPUs; what it doesn't know runs on portable kernels."""
    program = source.bounded(EXECUTORCH_BATCH)
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)


def _open_onnx(path: Path) -> Callable[..., Any]:
    import onnx

    onnx.checker.check_model(str(path))
    return open_onnx(path)


def _open_pt2(path: Path) -> Callable[..., Any]:
    return torch.export.load(path).module()


def _open_torchscript(path: Path) -> Callable[..., Any]:
    network: Callable[..., Any] = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return network


FORMATS: dict[str, Format] = {
    "onnx": Format(
        file="model.onnx",
        use="ONNX Runtime and others",
        write=_write_onnx,
        open=_open_onnx,
        runtime="onnx",
        needs="onnxruntime",
    ),
    "onnx-fp16": Format(
        file="model.fp16.onnx",
        use="the same in float16, for GPUs: half the size",
        write=_write_half_onnx,
        open=_open_onnx,
        runtime="onnx",
        needs="onnxruntime",
        tolerance=HALF_TOLERANCE,
    ),
    "pt2": Format(
        file="model.pt2",
        use="torch.export.load()",
        write=_write_pt2,
        open=_open_pt2,
        runtime="pt2",
        needs="torch",
    ),
    "torchscript": Format(
        file="model.ts.pt",
        use="torch.jit.load() and LibTorch, which PyTorch calls deprecated",
        write=_write_torchscript,
        open=_open_torchscript,
        runtime="torchscript",
        needs="torch",
    ),
    "openvino": Format(
        file="model.xml",
        use="OpenVINO; the weights are in model.bin",
        write=_write_openvino,
        open=open_openvino,
        runtime="openvino",
        needs="openvino",
        package="openvino",
        extra="openvino",
    ),
    "openvino-fp16": Format(
        file="model.fp16.xml",
        use="the same with weights in float16; they are in model.fp16.bin",
        write=_write_half_openvino,
        open=open_openvino,
        runtime="openvino",
        needs="openvino",
        tolerance=HALF_TOLERANCE,
        package="openvino",
        extra="openvino",
    ),
    "executorch": Format(
        file="model.pte",
        use="ExecuTorch on phones and boards, for its XNNPACK backend",
        write=_write_executorch,
        open=open_executorch,
        runtime="executorch",
        needs="executorch",
        largest_batch=EXECUTORCH_BATCH,
        package="executorch",
        extra="executorch",
    ),
}
"""All formats by the names that a user gives, in the order in which they are written."""


def _trace(model: nn.Module, example: Example, largest: int | None = None) -> ExportedProgram:
    """The network's graph with a free batch size, of at most `largest`."""
    pair = _pair(example)
    with _quiet():
        try:
            shapes = _by_parameter(model, _free_batch(pair, largest))
            program = _exported(model, pair, shapes)
        except Exception as error:
            raise AutocompressError(
                f"torch.export can't trace {type(model).__name__}: {first_line(error)}"
            ) from error
    # They hold file names and source lines of the machine that exports.
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _exported(model: nn.Module, example: Example, shapes: tuple[Any, ...]) -> ExportedProgram:
    try:
        return torch.export.export(model, example, dynamic_shapes=shapes)
    except Exception as error:
        # By the network's bytecode len(x) is no constant, as it is in a run of it.
        try:
            return torch.export.export(model, example, dynamic_shapes=shapes, strict=True)
        except Exception:
            raise error from None


def _pair(example: Example) -> Example:
    """Two images: a batch of one would be taken for a constant."""
    return tuple(_on_cpu(value[:1]).repeat(2, *[1] * (value.ndim - 1)) for value in example)


def _free_batch(example: Example, largest: int | None = None) -> tuple[dict[int, Any], ...]:
    batch = Dim("batch", min=1, max=largest)
    return tuple({0: batch} for _ in example)


def _by_parameter(model: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Something for each input, as `torch.export` takes it: nested where `forward` has `*args`."""
    kinds = [one.kind for one in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds[: len(shapes)]:
        return shapes
    at = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:at], tuple(shapes[at:]))


def _difference(
    name: str,
    run: Callable[..., Any],
    model: nn.Module,
    inputs: Example,
    tolerance: float,
) -> float:
    """Largest absolute difference between `run` and the network, over a single image and all."""
    single = tuple(value[:1] for value in inputs)
    if len(inputs[0]) == 1:
        # Two equal images are enough to see that the batch size is free.
        inputs = tuple(value.repeat(2, *[1] * (value.ndim - 1)) for value in inputs)
    largest = 0.0
    for batch in (single, inputs):
        with torch.no_grad():
            expected = list(tensors_in(model(*batch)))
            found = list(tensors_in(run(*batch)))
        for wanted, got in zip(expected, found, strict=True):
            if wanted.shape != got.shape:
                raise AutocompressError(
                    f"{name} gives an output of shape {tuple(got.shape)}, the network "
                    f"{tuple(wanted.shape)}."
                )
            difference = _distance(wanted, got)
            scale = wanted.double().abs().max().item()
            if not difference <= tolerance * scale:  # so that NaN fails too
                _need_same(model, batch, expected, tolerance)
                if not difference <= ROUNDING * _rounding(model, batch, expected):
                    raise AutocompressError(
                        f"{name} differs from the network: by {difference:.2g} where outputs reach "
                        f"{scale:.3g} (at most {tolerance:g} of that is allowed)."
                    )
            largest = max(largest, difference)
    return largest


def _need_same(
    model: nn.Module, inputs: Example, outputs: Sequence[Tensor], tolerance: float
) -> None:
    """Refuse a network that is random: its outputs tell nothing of a file's.

    Raises:
        AutocompressError: If it answers otherwise when it is asked again.
    """
    with torch.no_grad():
        again = list(tensors_in(model(*inputs)))
    for one, other in zip(outputs, again, strict=True):
        if _distance(one, other) > tolerance * one.double().abs().max().item():
            raise AutocompressError(
                f"{type(model).__name__} answers the same images differently each time, in "
                "evaluation mode too, so no file can be compared with it."
            )


def _distance(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference of two tensors."""
    return float((one.double() - other.double()).abs().max())


def _rounding(model: nn.Module, inputs: Example, outputs: Sequence[Tensor]) -> float:
    """How far a network's outputs are from those in double precision; 0 if it can't run so."""
    double = copy.deepcopy(model).double()
    precise = (value.double() if value.is_floating_point() else value for value in inputs)
    try:
        with torch.no_grad():
            exact = list(tensors_in(double(*precise)))
    except Exception:  # its code may name a type
        return 0.0
    return max(map(_distance, outputs, exact), default=0.0)


def _portable(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, with weights in the plain memory order."""
    own = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    return own.to(memory_format=torch.contiguous_format)


def _on_cpu(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def first_line(error: BaseException) -> str:
    """The first line with text in an error's message; its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return text if isinstance(error, AutocompressError) else f"{type(error).__name__}: {text}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' notes about their own insides from the user."""
    # torchao registers a class in a way that PyTorch calls deprecated.
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.utils._pytree")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for module in ("torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "executorch"):
            warnings.filterwarnings("ignore", module=rf"{module}(\..*)?$")
        warnings.simplefilter("ignore", torch.jit._trace.TracerWarning)
        # Sizes are tensors while a network is traced; torchvision's detectors copy theirs.
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")
        # ExecuTorch's schema is read in an old way.
        warnings.filterwarnings("ignore", message="open_text is dep", category=DeprecationWarning)
        # torch 2.11 says it of itself, in the name of `copyreg`.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
