"""A compressed network as a folder: weights, plan, ONNX and PT2 files that were checked, and back.

    <folder>/
        model.safetensors   parameters and buffers
        plan.json           which layers were replaced, and how
        model.json          where the network came from, classes, input shapes, normalization
        profile.json        what it costs
        model.onnx          for ONNX Runtime and others; any batch size
        model.int8.onnx     for the same runtimes, in int8; only where that was asked for
        model.pt2           for `torch.export.load`, without autocompress; any batch size
        export.json         sizes of the files, measured differences, and what was left out and why

The folder appears in one step: everything is written beside it first.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from autocompress import __version__
from autocompress.batch import tensors_in
from autocompress.errors import AutocompressError, ConfigError, did_you_mean
from autocompress.models import build_model, load_state
from autocompress.plan import Plan
from autocompress.profiler import Example, Profile, size_bytes
from autocompress.runtime import open_onnx
from autocompress.surgery import build_plan

SCHEMA_VERSION = 1
TOLERANCE = 1e-4
"""Largest difference of an exported file's outputs, relative to the largest output."""

FORMATS = ("onnx", "pt2")
INT8_FILE = "model.int8.onnx"
ONNX_SINGLE_FILE_BYTES = 1_800_000_000
"""Above this the weights lie beside the ONNX file: protobuf can't hold 2 GB."""

TRUSTED_SOURCES = ("zoo", "torchvision", "timm")


@dataclass(frozen=True)
class Manifest:
    """What `model.json` says about a saved network.

    Attributes:
        origin: `{"source": "zoo:resnet20", "arguments": {...}}`, from which the untrained network
            is built again; None for a network that came from Python.
        classes: Class names in the order of the outputs, as far as known.
        inputs: Shape of each input for one image, batch included.
        normalization: `{"mean": [...], "std": [...]}` that the images must have, as far as known.
        versions: Versions of autocompress and torch that wrote the folder.
    """

    origin: Mapping[str, Any] | None = None
    classes: tuple[str, ...] = ()
    inputs: tuple[tuple[int, ...], ...] = ()
    normalization: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportReport:
    """What `save_model` wrote.

    Attributes:
        files: Bytes of each file; `export.json`, which holds this report, is not among them.
        checks: Largest absolute difference to the network's outputs, for each exported file.
        skipped: Why a file that was asked for is not there.
    """

    files: Mapping[str, int]
    checks: Mapping[str, float]
    skipped: Mapping[str, str]


def save_model(
    folder: str | Path,
    model: nn.Module,
    plan: Plan,
    origin: Mapping[str, Any] | None,
    example: Example,
    profile: Profile,
    formats: Sequence[str] = FORMATS,
    images: Tensor | Example | None = None,
    classes: Sequence[str] = (),
    normalization: Mapping[str, Any] | None = None,
    int8: Path | None = None,
) -> ExportReport:
    """Write a compressed network to a folder; an earlier one of the same name is replaced.

    A format that can't be written, or whose outputs differ from the network's, is left out and
    named in the report: the weights and the plan are always there.

    Args:
        folder: The folder to write; its parents are created.
        model: The compressed network; it is not changed.
        plan: The plan that made it.
        origin: How the baseline's network is built, see `Manifest`.
        example: The network's inputs, batch first.
        profile: What it costs.
        formats: Any of "onnx" and "pt2".
        images: Real inputs to check the exported files with; the example if None.
        classes: Class names.
        normalization: `{"mean": [...], "std": [...]}` that the images had.
        int8: An int8 ONNX file of the network, which is copied into the folder.

    Raises:
        ConfigError: If a format is unknown, or `folder` is something else than a saved network.
    """
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"Unknown format '{name}'.{did_you_mean(name, FORMATS)}")
    target = Path(folder).absolute()
    inputs = tuple(tuple(value[:1].shape) for value in example)
    manifest = Manifest(
        origin=None if origin is None else dict(origin),
        classes=tuple(classes),
        inputs=inputs,
        normalization=None if normalization is None else dict(normalization),
        versions=_versions(),
    )
    state = _state(model)
    with _replacing(target) as place:
        (place / "plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
        save_file(state, place / "model.safetensors", metadata={"format": "pt"})
        # safetensors lets only the owner read; a network that is handed out is for others too.
        (place / "model.safetensors").chmod((place / "plan.json").stat().st_mode)
        _write_json(place / "model.json", {"version": SCHEMA_VERSION, **asdict(manifest)})
        _write_json(place / "profile.json", profile.to_dict())
        samples = example if images is None else images
        checks, skipped = _write_formats(place, model, example, samples, formats)
        if int8 is not None:
            shutil.copyfile(int8, place / INT8_FILE)
        files = {path.name: path.stat().st_size for path in sorted(place.iterdir())}
        report = ExportReport(files, checks, skipped)
        _write_json(place / "export.json", asdict(report))
    return report


def load(folder: str | Path, model: nn.Module | None = None, trust: bool = False) -> nn.Module:
    """The network that was saved in `folder`, on the CPU, in eval mode.

    It is the float32 network; `autocompress.open_onnx(folder / "model.int8.onnx")` opens the int8
    file, where there is one, as a function of the images.

    Args:
        folder: What `save_model` wrote, such as `runs/quickstart/best`.
        model: A fresh instance of the baseline's network, which is not changed. Needed only for
            a network that came from Python.
        trust: Whether to run the function that the folder names as the network's source, where
            that is code outside of autocompress, torchvision and timm.

    Raises:
        ConfigError: If the folder is no saved network, is damaged, doesn't fit `model`, or needs
            one.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    plan = Plan.from_json(_read_text(place / "plan.json"))
    weights = _existing(place / "model.safetensors")
    network = build_plan(_fresh_network(place, manifest, model, trust), plan)
    try:
        state = load_file(weights, device="cpu")
    except SafetensorError as error:
        raise ConfigError(f"{weights} is damaged: {error}. Export the network again.") from error
    network = network.cpu()
    _adopt_dtypes(network, state)
    try:
        load_state(network, state)
    except RuntimeError as error:
        raise ConfigError(
            f"The weights in {place} don't fit the network"
            f"{'' if model is None else f' {type(model).__name__} that was given'}: "
            f"{' '.join(str(error).split())}"
        ) from error
    return network.eval()


def read_manifest(folder: str | Path) -> Manifest:
    """Classes, input shapes, normalization and origin of a saved network.

    Raises:
        ConfigError: If `folder` is no saved network, or one of a newer autocompress.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ConfigError(f"There is no folder {place}; give one that save_model or a study wrote.")
    path = place / "model.json"
    try:
        data = json.loads(_read_text(path))
        if data["version"] != SCHEMA_VERSION:
            raise ConfigError(
                f"{path} has version {data['version']}, this autocompress {__version__} reads "
                f"{SCHEMA_VERSION}; use the version that wrote it: {data.get('versions')}."
            )
        return Manifest(
            origin=data["origin"],
            classes=tuple(data["classes"]),
            inputs=tuple(tuple(shape) for shape in data["inputs"]),
            normalization=data["normalization"],
            versions=data["versions"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); export the network again.") from error


def export_onnx(model: nn.Module, example: Example, path: str | Path) -> None:
    """Write an ONNX file with a free batch size; `check_onnx` compares it with the network.

    Args:
        model: The network; it is not changed.
        example: Its inputs, batch first.
        path: The file to write.

    Raises:
        AutocompressError: If the network can't be exported.
    """
    own = _portable(model)
    _write_onnx(_trace(own, example), own, example, Path(path))


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
    _write_pt2(_trace(_portable(model), example), Path(path))


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
    import onnx

    onnx.checker.check_model(str(path))
    return _difference(Path(path).name, open_onnx(path), _portable(model), images)


def check_pt2(path: str | Path, model: nn.Module, images: Tensor | Example) -> float:
    """Load a PT2 file and run it beside the network; as `check_onnx`."""
    with _quiet():
        network = torch.export.load(path).module()
    return _difference(Path(path).name, network, _portable(model), images)


def _write_formats(
    place: Path,
    model: nn.Module,
    example: Example,
    images: Tensor | Example,
    formats: Sequence[str],
) -> tuple[dict[str, float], dict[str, str]]:
    """Write and check each format; what fails leaves no file but a reason."""
    checks: dict[str, float] = {}
    skipped: dict[str, str] = {}
    own = _portable(model)
    traced: list[ExportedProgram] = []

    def program() -> ExportedProgram:
        if not traced:
            traced.append(_trace(own, example))
        return traced[0]

    def onnx(path: Path) -> float:
        _write_onnx(program(), own, example, path)
        return check_onnx(path, own, images)

    def pt2(path: Path) -> float:
        _write_pt2(program(), path)
        return check_pt2(path, own, images)

    writers: dict[str, Callable[[Path], float]] = {"onnx": onnx, "pt2": pt2}
    for name in formats:
        path = place / f"model.{name}"
        try:
            checks[path.name] = writers[name](path)
        except Exception as error:
            # Exporters fail in more ways than can be named; none of them may cost the weights.
            skipped[path.name] = _first_line(error)
            for leftover in place.glob(f"{path.name}*"):
                leftover.unlink()
    return checks, skipped


def _trace(model: nn.Module, example: Example) -> ExportedProgram:
    """The network's graph with a free batch size."""
    # A batch of one would be taken for a constant.
    pair = tuple(_on_cpu(value[:1]).repeat(2, *[1] * (value.ndim - 1)) for value in example)
    with _quiet():
        try:
            program = torch.export.export(model, pair, dynamic_shapes=_free_batch(pair))
        except Exception as error:
            raise AutocompressError(
                f"torch.export can't trace {type(model).__name__}: {_first_line(error)}"
            ) from error
    # They hold file names and source lines of the machine that exports.
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _free_batch(example: Example) -> tuple[dict[int, Any], ...]:
    batch = Dim("batch", min=1)
    return tuple({0: batch} for _ in example)


def _write_onnx(program: ExportedProgram, model: nn.Module, example: Example, path: Path) -> None:
    with torch.no_grad():
        output = model(*(_on_cpu(value[:1]) for value in example))
    names: dict[str, Any] = {}
    if len(example) == 1:
        names["input_names"] = ["input"]
    if isinstance(output, Tensor):
        names["output_names"] = ["output"]
    from onnx_ir.traversal import RecursiveGraphIterator

    with _quiet():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                dynamic_shapes=_free_batch(example),
                **names,
            )
            assert exported is not None  # None is what the old exporter returns
            for node in RecursiveGraphIterator(exported.model.graph):
                node.metadata_props.clear()
            large = size_bytes(model) > ONNX_SINGLE_FILE_BYTES
            exported.save(path, external_data=large)
        except Exception as error:
            raise AutocompressError(
                f"torch.onnx can't export {type(model).__name__}: {_first_line(error)}"
            ) from error


def _write_pt2(program: ExportedProgram, path: Path) -> None:
    with _quiet():
        torch.export.save(program, path)


def _difference(
    name: str, run: Callable[..., Any], model: nn.Module, images: Tensor | Example
) -> float:
    """Largest absolute difference between `run` and the network, over a single image and all."""
    inputs = (images,) if isinstance(images, Tensor) else images
    inputs = tuple(_on_cpu(value) for value in inputs)
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
            difference = (wanted.double() - got.double()).abs().max().item()
            scale = wanted.double().abs().max().item()
            if not difference <= TOLERANCE * scale:  # so that NaN fails too
                raise AutocompressError(
                    f"{name} differs from the network: by {difference:.2g} where outputs reach "
                    f"{scale:.3g} (at most {TOLERANCE:g} of that is allowed)."
                )
            largest = max(largest, difference)
    return largest


def _portable(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, with weights in the plain memory order."""
    own = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    return own.to(memory_format=torch.contiguous_format)


def _on_cpu(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def _first_line(error: BaseException) -> str:
    """The first line with text in an error's message; its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return text if isinstance(error, AutocompressError) else f"{type(error).__name__}: {text}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' notes about their own insides from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for module in ("torch", "onnx", "onnxscript", "onnx_ir"):
            warnings.filterwarnings("ignore", module=rf"{module}(\..*)?$")
        warnings.simplefilter("ignore", torch.jit._trace.TracerWarning)
        # Sizes are tensors while a network is traced; torchvision's detectors copy theirs.
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")
        # torch 2.11 says it of itself, in the name of `copyreg`.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; tied weights are written under each of their names."""
    state = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise AutocompressError(
                f"'{name}' in the network's state is a {type(value).__name__}; only tensors can "
                "be saved. Register it as a buffer."
            )
        state[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return state


def _adopt_dtypes(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give weights the dtype in which they were saved: a copy would convert them silently."""
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if name in state and value.dtype != state[name].dtype:
            value.data = value.data.to(state[name].dtype)


def _fresh_network(
    place: Path, manifest: Manifest, model: nn.Module | None, trust: bool
) -> nn.Module:
    """The baseline's network, untrained."""
    if model is not None:
        return copy.deepcopy(model)
    if manifest.origin is None:
        raise ConfigError(
            f"The network in {place} came from Python and can't be built from its name; give an "
            f"instance of the original: autocompress.load({str(place)!r}, model=YourNet())."
        )
    source = str(manifest.origin["source"])
    if source.partition(":")[0] not in TRUSTED_SOURCES and not trust:
        raise ConfigError(
            f"The network in {place} is built by '{source}', which is code outside of "
            "autocompress. If you trust the folder, pass trust=True, or give an instance: "
            f"autocompress.load({str(place)!r}, model=YourNet())."
        )
    return build_model(source, manifest.origin.get("arguments") or {}, None)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `target` at the end, if all went well."""
    if os.path.lexists(target) and not _is_ours(target):
        raise ConfigError(
            f"{target} exists and is no saved network, so it is not replaced; choose another "
            "folder."
        )
    partial = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    if replaced.exists() and not target.exists():
        replaced.rename(target)  # killed between the two renames below
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            _keep_foreign_files(target, partial)
        # A folder can't be renamed onto one that holds files, so the old one steps aside first.
        if target.exists():
            target.rename(replaced)
        try:
            partial.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _is_ours(target: Path) -> bool:
    """Whether a folder is empty or holds a saved network."""
    if not target.is_dir() or target.is_symlink():
        return False
    return (target / "model.json").is_file() or not any(target.iterdir())


def _keep_foreign_files(target: Path, partial: Path) -> None:
    """Copy what somebody else put beside a saved network: we replace only our own files."""
    written = {"plan.json", "profile.json", "export.json"}
    for path in target.iterdir():
        if path.name in written or path.name.startswith("model."):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, partial / path.name, symlinks=True)
        else:
            shutil.copy2(path, partial / path.name, follow_symlinks=False)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(
            f"{path.parent} has no {path.name}, so it is no complete saved network; export it "
            "again."
        )
    return path


def _read_text(path: Path) -> str:
    return _existing(path).read_text(encoding="utf-8")


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    return {"autocompress": __version__, "torch": torch.__version__}
