"""A compressed network as a folder: weights, plan, exported files that were checked, and back.

    <folder>/
        README.md           a model card
        model.safetensors   parameters and buffers
        plan.json           which layers were replaced, and how
        model.json          where the network came from, classes, input shapes, normalization
        profile.json        what it costs
        model.onnx, ...     exported files by `formats.FORMATS`; any batch size
        model.int8.onnx     an ONNX file in int8; only where that was asked for
        predict_onnx.py ... a program for each runtime that runs the network on images
        export.json         sizes of the files, measured differences, and what was left out and why

The folder appears in one step: everything is written beside it first.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autocompress import __version__
from autocompress.card import CARD, Facts, is_generated, write_card
from autocompress.config import DEFAULT_FORMATS
from autocompress.errors import ConfigError
from autocompress.formats import (
    FORMATS,
    INT8_FILE,
    Source,
    annotate_onnx,
    first_line,
    known_formats,
    write_format,
)
from autocompress.manifest import Manifest, dtype_name, existing, read_manifest, read_text
from autocompress.models import build_model, load_state, portable_state
from autocompress.plan import Plan
from autocompress.predict import SCRIPTS, write_scripts
from autocompress.profiler import Example, Profile, profile_model
from autocompress.surgery import build_plan

TRUSTED_SOURCES = ("zoo", "torchvision", "timm")
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class ExportReport:
    """What `save_model` wrote.

    Attributes:
        files: Bytes of each file of the network; `export.json`, which holds this report, the model
            card and the scripts are not among them.
        checks: Largest absolute difference to the network's outputs, for each exported file.
        skipped: Why a file that was asked for is not there.
        checked_with: What the exported files were compared on.
        scripts: Programs that run the files.
    """

    files: Mapping[str, int]
    checks: Mapping[str, float]
    skipped: Mapping[str, str]
    checked_with: str = ""
    scripts: Sequence[str] = ()


def save_model(
    folder: str | Path,
    model: nn.Module,
    plan: Plan,
    origin: Mapping[str, Any] | None,
    example: Example,
    profile: Profile,
    formats: Sequence[str] = DEFAULT_FORMATS,
    images: Tensor | Example | None = None,
    classes: Sequence[str] = (),
    normalization: Mapping[str, Any] | None = None,
    int8: Path | None = None,
    image: Mapping[str, Any] | None = None,
    task: Mapping[str, Any] | None = None,
    facts: Facts | None = None,
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
        formats: Any of `formats.FORMATS`.
        images: Real inputs to check the exported files with; the example if None.
        classes: Class names.
        normalization: `{"mean": [...], "std": [...]}` that the images had.
        int8: An int8 ONNX file of the network, which is copied into the folder.
        image: How an image becomes the input, see `Manifest`.
        task: What the network does, see `Manifest`.
        facts: What the model card tells besides, see `card.write_card`.

    Raises:
        ConfigError: If a format is unknown, or `folder` is something else than a saved network.
    """
    known_formats(formats)
    target = Path(folder).absolute()
    manifest = Manifest(
        origin=None if origin is None else dict(origin),
        classes=tuple(classes),
        inputs=tuple(tuple(value[:1].shape) for value in example),
        dtypes=tuple(dtype_name(value) for value in example),
        normalization=None if normalization is None else dict(normalization),
        versions=_versions(origin),
        image=None if image is None else dict(image),
        task=None if task is None else dict(task),
    )
    state = portable_state(model)
    with _replacing(target) as place:
        (place / "plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
        save_file(state, place / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors lets only the owner read; a network that is handed out is for others too.
        (place / WEIGHTS_FILE).chmod((place / "plan.json").stat().st_mode)
        _write_json(place / "model.json", manifest.to_dict())
        _write_json(place / "profile.json", profile.to_dict())
        samples = example if images is None else images
        source = Source(model, example, manifest.notes())
        checks, skipped = _write_formats(place, source, samples, formats)
        if int8 is not None:
            shutil.copyfile(int8, place / INT8_FILE)
            annotate_onnx(place / INT8_FILE, manifest.notes())
        files = {path.name: path.stat().st_size for path in sorted(place.iterdir())}
        scripts = write_scripts(place, manifest, files)
        report = ExportReport(files, checks, skipped, _words(images), scripts)
        _write_json(place / "export.json", asdict(report))
        reason = write_card(place, facts)
        if reason is not None:
            report = replace(report, skipped={**skipped, CARD: reason})
            _write_json(place / "export.json", asdict(report))
    return report


def save(
    model: nn.Module,
    folder: str | Path,
    like: str | Path,
    formats: Sequence[str] = DEFAULT_FORMATS,
    images: Tensor | Example | None = None,
) -> ExportReport:
    """Save a network that `load` gave and that was trained further, in the same form.

    Args:
        model: The network; it is not changed.
        folder: The folder to write; it may be `like` itself, which is then replaced.
        like: The folder that the network was loaded from: plan, origin, classes and normalization
            are taken from there.
        formats: Any of `formats.FORMATS`.
        images: Inputs to check the exported files with; random ones if None.

    Raises:
        ConfigError: If the network is not the one in `like`, a format is unknown, or `folder` is
            something else than a saved network.
    """
    known_formats(formats)
    home = Path(like)
    manifest = read_manifest(home)
    plan = Plan.from_json(read_text(home / "plan.json"))
    _check_like(model, home)
    real = (images,) if isinstance(images, Tensor) else images
    dtypes = manifest.dtypes if real is None else [dtype_name(value) for value in real]
    example = made_up(manifest.inputs, dtypes, floating_type(model))
    own = copy.deepcopy(model).cpu().eval()
    before = Profile.from_dict(json.loads(read_text(home / "profile.json")))
    profile = replace(profile_model(own, example, latency=False), latency=before.latency)
    return save_model(
        folder,
        own,
        plan,
        manifest.origin,
        example,
        profile,
        formats=formats,
        images=images,
        classes=manifest.classes,
        normalization=manifest.normalization,
        image=manifest.image,
        task=manifest.task,
        facts=Facts(tuned=True),
    )


def made_up(
    shapes: Sequence[Sequence[int]], dtypes: Sequence[str], floating: torch.dtype = torch.float32
) -> Example:
    """Inputs of a network: noise of the type `floating`; zeros for those that are whole numbers.

    Args:
        shapes: Of each input.
        dtypes: Their types, as `dtype_name` has them; empty where all are floating.
        floating: The type of those that are.
    """
    found = []
    for index, shape in enumerate(shapes):
        dtype = getattr(torch, dtypes[index]) if dtypes else floating
        noise = torch.randn(tuple(shape)).to(floating)
        found.append(noise if dtype.is_floating_point else torch.zeros(tuple(shape), dtype=dtype))
    return tuple(found)


def floating_type(model: nn.Module) -> torch.dtype:
    """The type of a network's first parameter that is no whole number."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _check_like(model: nn.Module, home: Path) -> None:
    """Refuse a network that has other weights, by name and shape, than the folder's."""
    with safe_open(existing(home / WEIGHTS_FILE), framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    state = model.state_dict().items()
    own = {name: tuple(value.shape) for name, value in state if isinstance(value, Tensor)}
    differing = sorted(
        name for name in stored.keys() | own.keys() if stored.get(name) != own.get(name)
    )
    if differing:
        raise ConfigError(
            f"The network that was given is not the one in {home}: '{differing[0]}' has the shape "
            f"{own.get(differing[0])} in it and {stored.get(differing[0])} there (None: not "
            f"there). Give what autocompress.load({str(home)!r}) returned."
        )


def _write_formats(
    place: Path, source: Source, images: Tensor | Example, formats: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Write and check each format; what fails leaves no file but a reason."""
    checks: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name in formats:
        kind = FORMATS[name]
        try:
            checks[kind.file] = write_format(kind, source, images, place)
        except Exception as error:
            # Exporters fail in more ways than can be named; none of them may cost the weights.
            skipped[kind.file] = first_line(error)
    return checks, skipped


def _words(images: Tensor | Example | None) -> str:
    """What files were compared on."""
    if images is None:
        return "made-up inputs"
    count = len(images) if isinstance(images, Tensor) else len(images[0])
    return f"{count} real input{'s' * (count != 1)}"


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
    plan = Plan.from_json(read_text(place / "plan.json"))
    weights = existing(place / WEIGHTS_FILE)
    network = build_plan(_fresh_network(place, manifest, model, trust), plan)
    try:
        state = load_file(weights, device="cpu")
    except SafetensorError as error:
        raise ConfigError(f"{weights} is damaged: {error}. Export the network again.") from error
    network = network.cpu()
    adopt_dtypes(network, state)
    try:
        load_state(network, state)
    except RuntimeError as error:
        raise ConfigError(
            f"The weights in {place} don't fit the network"
            f"{'' if model is None else f' {type(model).__name__} that was given'}: "
            f"{' '.join(str(error).split())}"
        ) from error
    return network.eval()


def adopt_dtypes(network: nn.Module, state: Mapping[str, Tensor]) -> None:
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
    try:
        return build_model(source, manifest.origin.get("arguments") or {}, None)
    except (ConfigError, ImportError) as error:
        # The library may be missing, or older than the network; the folder says which wrote it.
        written = ", ".join(f"{name} {number}" for name, number in manifest.versions.items())
        raise ConfigError(
            f"The network in {place} can't be built here: {error} It was saved with {written}. "
            "model.onnx and model.pt2 need none of that; or give an instance: "
            f"autocompress.load({str(place)!r}, model=YourNet())."
        ) from error


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
    written = {"plan.json", "profile.json", "export.json", *SCRIPTS}
    for path in target.iterdir():
        if path.name in written or path.name.startswith("model."):
            continue
        if path.name == CARD and is_generated(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, partial / path.name, symlinks=True)
        else:
            shutil.copy2(path, partial / path.name, follow_symlinks=False)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _versions(origin: Mapping[str, Any] | None) -> dict[str, str]:
    """Versions of what wrote the folder, and of the library that the network is from."""
    found = {"autocompress": __version__, "torch": torch.__version__}
    library = "" if origin is None else str(origin["source"]).partition(":")[0]
    if library in ("torchvision", "timm"):
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # on the path without having been installed
            found[library] = "unknown"
    return found
