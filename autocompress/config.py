"""The study file: its fields, each described, all checked before any work.

A study file is TOML. `load_config` reads one (or the packaged quickstart) and says everything that
is wrong with it, one line an error. Nothing here imports torch, so that `--help` stays quick.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from autocompress.errors import ConfigError, did_you_mean

PACKAGE, READY = "autocompress", "studies"
"""Where the ready studies are."""


def own_transform(name: str) -> bool:
    """Whether a name in `search.transforms` is that of a class of the user's, `module:Class`."""
    module, colon, kind = name.partition(":")
    return bool(module and colon and kind)


def _own_or_known(value: Any, known: ValidatorFunctionWrapHandler) -> Any:
    return value if isinstance(value, str) and own_transform(value) else known(value)


TransformName = Annotated[
    Literal["svd", "spatial_svd", "tucker2", "cp", "tt"],
    WrapValidator(_own_or_known),
    PlainSerializer(str),
]
ALL_TRANSFORMS: tuple[TransformName, ...] = ("svd", "spatial_svd", "tucker2", "cp", "tt")
FormatName = Literal[
    "onnx", "onnx-fp16", "pt2", "torchscript", "openvino", "openvino-fp16", "executorch"
]
DEFAULT_FORMATS: tuple[FormatName, ...] = ("onnx", "pt2")
"""The files that are written of a network, besides its weights."""

# TOML has arrays only; strict checking would refuse them for a tuple.
_AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Names = Annotated[tuple[str, ...], _AsTuple]

Positive = Annotated[float, Field(gt=0)]

# In memory None stands for what the study finds out by itself; TOML has no such value.
AUTO = BeforeValidator(lambda value: None if value == "auto" else value)
"""Marks fields that may be "auto"."""
Numbers = Annotated[tuple[float, ...], _AsTuple]

NAMED_DATA = ("digits", "tiny-imagenet", "imagenet", "vww")
"""Sources of images that are known by name alone; all others are `kind:name`."""

_MODEL_SOURCE = r"^[^:\s]+:\S.*$"
_DATA_SOURCE = rf"^({'|'.join(NAMED_DATA)}|[^:\s]+:\S.*)$"

_LIBRARIES = ("zoo", "torchvision", "timm", "folder", "array", *NAMED_DATA)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The network to compress."""

    source: str = Field(
        pattern=_MODEL_SOURCE,
        description="zoo:NAME, torchvision:NAME, timm:NAME or package.module:function.",
    )
    weights: str | None = Field(
        default=None,
        description="File of trained weights (.safetensors, .pt, .pth, .th), or 'pretrained' for "
        "the library's own; without it the baseline is trained.",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the network, e.g. num_classes."
    )


class DataConfig(_Section):
    """The images to train, choose and test with."""

    source: str = Field(
        pattern=_DATA_SOURCE,
        description="digits, torchvision:DATASET, tiny-imagenet, imagenet, vww (Visual Wake "
        "Words), folder:PATH, array:FILE.npz or package.module:function.",
    )
    root: str | None = Field(
        default=None, description="Folder in which the data is, or is downloaded to."
    )
    classes: Names | None = Field(
        default=None,
        min_length=2,
        description="Only these classes, numbered in this order: a list of names of folders or of "
        "classes, or a text file that has one on each line; None: all.",
    )
    image_size: int | None = Field(
        default=None, ge=1, description="Height and width to resize images to; None keeps theirs."
    )
    augment: Literal["none", "flip", "crop", "crop-flip"] = Field(
        default="none", description="Random changes of the training images."
    )
    val_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of the images to choose on, where no validation data is given.",
    )
    val_from: Literal["train", "test"] = Field(
        default="train",
        description="Where those are cut from; 'test' where the weights have seen all of train.",
    )
    batch_size: int = Field(default=128, ge=1, description="Images in a batch.")
    mean: Numbers | None = Field(
        default=None,
        min_length=1,
        description="What the network was trained with is subtracted from each channel of 0..1; "
        "None: the mean of the training images, or the library's for its pretrained weights.",
    )
    std: Annotated[tuple[Positive, ...], _AsTuple] | None = Field(
        default=None,
        min_length=1,
        description="What each channel is then divided by; None: likewise the standard deviation.",
    )


class TaskConfig(_Section):
    """What the network is to do, where that is not classification."""

    source: str | None = Field(
        default=None,
        pattern=r"^[^:\s]+:\S+$",
        description="package.module:function, which returns a dict with any of forward, loss, "
        "metric, distillation, optimizer, scheduler and training; see autocompress.Task.",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of that function."
    )


class BaselineConfig(_Section):
    """How the network is trained before it is compressed."""

    epochs: float | None = Field(
        default=None,
        ge=0,
        description="Passes over the training data; None means 0 where weights are given, else the "
        "recipe's, else 10.",
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak of the schedule; None: the recipe's, else 0.1."
    )
    recipe: Literal["full", "short"] | None = Field(
        default=None,
        description="What isn't given here is that of the literature for this architecture and "
        "data set (`python -m autocompress.study models` lists some), at full length or short.",
    )
    label_smoothing: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of the target that is spread over all classes; None: the recipe's, "
        "else 0.",
    )
    weight_decay: float | None = Field(
        default=None,
        ge=0,
        description="Of convolutions and linear layers; None: the recipe's, else 0.0005.",
    )


class BoundConfig(_Section):
    """The most that may be done to some layers."""

    layers: str = Field(min_length=1, description="Which layers (a pattern of names).")
    compression: float | None = Field(
        default=None,
        gt=1,
        description="Largest ratio of a layer's params, and of its MACs, before and after.",
    )
    error: float | None = Field(
        default=None,
        gt=0,
        description="Largest relative error of a layer's outputs on training images, as it is cut, "
        "before fine-tuning.",
    )


class SearchConfig(_Section):
    """What is tried, and how often."""

    transforms: Annotated[tuple[TransformName, ...], _AsTuple] = Field(
        default=ALL_TRANSFORMS,
        description="Transforms that layers may get, one of your own as package.module:Class; none "
        "where only channels are to be removed.",
    )
    include: Names | None = Field(
        default=None,
        min_length=1,
        description="Layers that may change (patterns of names); ['*'] for all. By default all but "
        "the first layer and the classifier (all of them, where there are several).",
    )
    exclude: Names = Field(
        default=(), description="Layers that must stay (patterns of names); wins over include."
    )
    channels: bool = Field(
        default=True, description="Whether channels may be removed, before ranks are cut."
    )
    importance: Literal["outputs", "norm", "bn", "taylor"] = Field(
        default="outputs",
        description="Which channels stay: those that the network's outputs would miss most, those "
        "of the largest weights, of the largest batch-norm scales, or with the largest derivatives "
        "of the loss.",
    )
    int8: bool = Field(
        default=False,
        description="Whether every trial is judged by its int8 file (made as that of int8 = true, "
        "without fine-tuning), so that plans which round badly lose. It needs int8 = true.",
    )
    bounds: Annotated[tuple[BoundConfig, ...], _AsTuple] | None = Field(
        default=None,
        min_length=1,
        description="Bounds of single layers, e.g. [{layers = 'stage1.*', compression = 4.0}, "
        "{layers = 'fc', error = 0.1}]; of several that name a layer all hold.",
    )
    sampler: Literal["knobs", "tpe", "gp", "nsga2", "random"] = Field(
        default="knobs", description="What proposes the exploration's candidates."
    )
    trials: int = Field(default=30, ge=1, description="Trials of the exploration, in all.")
    annealing_trials: int = Field(
        default=15, ge=0, description="Trials of the annealing, in all, but for extra_trials."
    )
    extra_trials: int = Field(
        default=8,
        ge=0,
        description="Trials that an annealing of six or more may have besides, by twos or one for "
        "each worker, while they make the winner cheaper, or it leaves more than a tenth of delta "
        "unused.",
    )
    stage: Literal["exploration", "annealing", "both"] = Field(
        default="both", description="Which stage to run."
    )


class FinetuneConfig(_Section):
    """How a compressed network recovers."""

    epochs: Annotated[float | None, AUTO] = Field(
        default=None,
        ge=0,
        description="Passes over the training data in a trial of the exploration, or 'auto': as a "
        "probe tells. A trial of the annealing has the geometric mean of this and final_epochs.",
    )
    final_epochs: Annotated[float | None, AUTO] = Field(
        default=None,
        ge=0,
        description="Passes over the training data for the winner, or 'auto': ten times epochs.",
    )
    learning_rate: Annotated[float | None, AUTO] = Field(
        default=None,
        gt=0,
        description="Peak of the schedule, or 'auto': as a probe tells.",
    )
    final_learning_rate: Annotated[float | None, AUTO] = Field(
        default=None,
        gt=0,
        description="The same for the winner, or 'auto': twice that of a trial where it is "
        "fine-tuned for four times as long or longer, else the same.",
    )
    distillation: float = Field(
        default=0.5, ge=0, le=1, description="Share of the loss that imitates the baseline."
    )
    gate: Annotated[float | None, AUTO] = Field(
        default=None,
        ge=0,
        description="Drop before fine-tuning at which a trial stops, or 'auto': 50 points; for a "
        "metric that is no percentage half of the baseline's, or nine times its error, and ten "
        "times delta at least.",
    )


class LatencyConfig(_Section):
    """Where a network's latency is measured: the runtime that will serve it."""

    runtime: Literal["onnxruntime", "torch", "torch-compile", "cuda", "openvino"] = Field(
        default="onnxruntime",
        description="onnxruntime (CPU), openvino (CPU; pip install 'autocompress[openvino]'), "
        "torch and torch-compile (PyTorch on the CPU), or cuda (PyTorch on the GPU).",
    )
    batch_size: int = Field(default=1, ge=1, description="Images in a timed batch.")
    threads: Annotated[int | None, AUTO] = Field(
        default=None, ge=1, description="CPU threads, or 'auto': as many as PyTorch has."
    )


class RunConfig(_Section):
    """Where a study runs; it may be continued with other values."""

    device: str = Field(default="auto", description="cpu, cuda, cuda:1 or auto.")
    storage: str | None = Field(
        default=None, description="Database URL (SQLAlchemy); None: SQLite in the study's folder."
    )
    out: str = Field(default="runs", min_length=1, description="Folder of the studies' folders.")
    formats: Annotated[tuple[FormatName, ...], _AsTuple] = Field(
        default=DEFAULT_FORMATS,
        description="Files of each network handed out, besides its weights; more can be written "
        "later by `autocompress export`.",
    )
    artifacts: str | None = Field(
        default=None,
        description="Where weights are kept: a folder that all workers share, or s3://BUCKET; "
        "None: in the study's folder.",
    )
    workers: Annotated[int | None, AUTO] = Field(
        default=None,
        ge=0,
        description="Processes that run trials on this machine, or 'auto': one for each GPU, or "
        "for each CPU core (four at most); 0: trials run in the study's process, for a debugger.",
    )
    launcher: Literal["local", "ray", "slurm"] = Field(
        default="local",
        description="What starts the workers: this machine, a Ray cluster (pip install "
        "'autocompress[ray]') or SLURM (pip install 'autocompress[slurm]').",
    )
    launcher_options: dict[str, Any] = Field(
        default_factory=dict,
        description="For Ray's task (num_gpus, num_cpus, ...) or submitit's job (timeout_min, "
        "gpus_per_node, slurm_partition, ...).",
    )
    trial_limit: Positive | None = Field(
        default=None, description="Minutes that a trial may take; None: any."
    )
    stall_limit: Positive = Field(
        default=30.0,
        description="Minutes without a step after which a trial hangs; not where workers = 0.",
    )


class StudyConfig(_Section):
    """A whole study."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="The study's name and that of its folder: letters, digits, '.', '_' and '-'.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="Fixes splits, proposals and training.",
    )
    delta: float = Field(
        default=1.0,
        ge=0,
        description="Largest accepted drop, in the metric's unit: points of accuracy by default.",
    )
    confidence: float = Field(
        default=0.975,
        ge=0.5,
        lt=1,
        description="How sure the drop on new images must be within delta: the upper end of a "
        "two-sided 95 % interval by default; 0.5 trusts the measured drop.",
    )
    objective: Literal[
        "params", "size", "macs", "latency", "params+macs", "params+latency", "params+macs+latency"
    ] = Field(
        default="params",
        description="The cost to make small; several are made small by their mean, each as a share "
        "of the baseline's; latency is that of the section [latency].",
    )
    int8: bool = Field(
        default=False,
        description="Whether to write the winner as an int8 ONNX file too, which is within delta "
        "as well.",
    )
    model: ModelConfig = Field(description="The network to compress.")
    data: DataConfig = Field(description="The images to train, choose and test with.")
    task: TaskConfig = Field(
        default_factory=TaskConfig,
        description="What the network is to do, where that is not classification.",
    )
    baseline: BaselineConfig = Field(
        default_factory=BaselineConfig, description="How the network is trained beforehand."
    )
    search: SearchConfig = Field(
        default_factory=SearchConfig, description="What is tried, and how often."
    )
    finetune: FinetuneConfig = Field(
        default_factory=FinetuneConfig, description="How a compressed network recovers."
    )
    latency: LatencyConfig = Field(
        default_factory=LatencyConfig, description="Where the latency is measured."
    )
    run: RunConfig = Field(default_factory=RunConfig, description="Where the study runs.")


# Budgets and places: a study may be continued with other values of these.
UNBOUND = {
    "int8",
    "search.trials",
    "search.annealing_trials",
    "search.extra_trials",
    "search.stage",
    "finetune.final_epochs",
    "finetune.final_learning_rate",
    "model.weights",
    "data.root",
}

UNITS = {
    "delta": "points of accuracy, or the metric's unit",
    "finetune.gate": "points of accuracy, or the metric's unit",
    "finetune.epochs": "passes over the training data",
    "finetune.final_epochs": "passes over the training data",
    "baseline.epochs": "passes over the training data",
    "data.batch_size": "images",
    "latency.batch_size": "images",
    "data.image_size": "pixels",
    "confidence": "probability",
    "data.val_fraction": "share of the images",
    "finetune.distillation": "share of the loss",
    "baseline.label_smoothing": "share of the target",
}

_EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "finite_number": "a finite number",
}

_BOUNDS = {
    "greater_than_equal": (">=", "ge"),
    "greater_than": (">", "gt"),
    "less_than_equal": ("<=", "le"),
    "less_than": ("<", "lt"),
}


def load_config(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> StudyConfig:
    """Read and check a study file.

    Args:
        path: The file, or the name of a study that ships in the package; None for the quickstart.
            Relative paths in the file are relative to the file's folder.
        overrides: Values that replace the file's, by dotted key, e.g. `{"search.trials": 5}`;
            None means the file's value. Paths among them are relative to the current folder.

    Raises:
        ConfigError: If anything is wrong, with one line for each error.
    """
    text, folder, shown = _read(path)
    try:
        nested = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{shown} is not valid TOML: {error}.") from error
    fields = flatten(nested)
    if folder is not None:
        _resolve(fields, folder)
    fields.update({key: value for key, value in (overrides or {}).items() if value is not None})
    if isinstance(fields.get("data.classes"), str):
        fields["data.classes"] = _lines(Path(fields["data.classes"]).expanduser())
    config = parse_config(fields)
    _check_files(config)
    return config


def parse_config(fields: Mapping[str, Any]) -> StudyConfig:
    """Check settings that are already in memory; files that they name are not looked for.

    Args:
        fields: Values by dotted key (`{"search.trials": 5}`), nested tables, or both; None means
            the default.

    Raises:
        ConfigError: If anything is wrong, with one line for each error.
    """
    try:
        config = StudyConfig.model_validate(_nest(fields))
    except ValidationError as error:
        # One line a field: a wrong item of a list is reported a second time as an item too few.
        lines: dict[str, str] = {}
        for found in error.errors(include_url=False):
            lines.setdefault(_key(found["loc"]), _explain(found))
        raise ConfigError("\n".join(lines.values())) from None
    mean, std = config.data.mean, config.data.std
    if (mean is None) != (std is None) or (mean and std and len(mean) != len(std)):
        raise ConfigError(
            f"data.mean = {_show(mean)} and data.std = {_show(std)} belong together: give one "
            "number a channel in both, or leave both out."
        )
    if not (config.search.transforms or config.search.channels):
        raise ConfigError(
            "search.transforms = [] and search.channels = false leave nothing to search: name a "
            "transform, or set search.channels = true."
        )
    if config.search.int8 and not config.int8:
        raise ConfigError(
            "search.int8 = true judges trials by their int8 files, while int8 = false hands none "
            "out: set int8 = true, or leave search.int8 out."
        )
    for index, bound in enumerate(config.search.bounds or ()):
        if bound.compression is None and bound.error is None:
            raise ConfigError(
                f"search.bounds[{index}] bounds nothing for '{bound.layers}': give compression "
                "(largest ratio, e.g. 4.0), error (largest relative error, e.g. 0.1), or both."
            )
    if config.finetune.gate is not None and config.finetune.gate < config.delta:
        raise ConfigError(
            f"finetune.gate = {config.finetune.gate:g} must be >= delta = {config.delta:g} (points "
            "of accuracy): a trial within delta before fine-tuning must not stop."
        )
    return config


def cache_folder() -> Path:
    """Where trained baselines and decoded images are kept, whatever the study.

    It is `$AUTOCOMPRESS_HOME`, else `~/.cache/autocompress`.
    """
    home = os.environ.get("AUTOCOMPRESS_HOME")
    return Path(home) if home else Path.home() / ".cache" / "autocompress"


def parse_value(text: str) -> Any:
    """What is given as `key=value` on a command line: TOML as in a study file, else JSON, else a
    text that needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_pairs(pairs: Sequence[str], option: str, example: str) -> dict[str, Any]:
    """What several `key=value` say.

    Args:
        pairs: As they were given.
        option: By which option, for messages.
        example: One, for messages.

    Raises:
        ConfigError: If one has no equals sign.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{option} {pair}: give key=value, e.g. {example}.")
        found[key] = parse_value(value)
    return found


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables as one table with dotted keys; empty tables are left out."""
    return dict(_walk(nested, ""))


def bound_settings(config: StudyConfig) -> dict[str, Any]:
    """What a stored study can't be continued without: everything but budgets and places.

    Files of weights and folders of data may move; their contents are bound by digests instead.

    Returns:
        JSON values by dotted key.
    """
    fields = flatten(config.model_dump(mode="json"))
    kind, _, _ = config.data.source.partition(":")
    if kind in ("folder", "array"):
        fields["data.source"] = kind
    if config.baseline.recipe is None and config.baseline.learning_rate is None:
        # What studies were bound to when this was the field's default.
        fields["baseline.learning_rate"] = 0.1
    return {k: v for k, v in fields.items() if k not in UNBOUND and not k.startswith("run.")}


def own_code(config: StudyConfig) -> list[str]:
    """The settings of a study that name code of the user's own, which it will run."""
    named = {
        "model.source": config.model.source,
        "data.source": config.data.source,
        "task.source": config.task.source,
    }
    found = [
        f"{key} = '{source}'"
        for key, source in named.items()
        if source is not None and source.partition(":")[0] not in _LIBRARIES
    ]
    transforms = filter(own_transform, config.search.transforms)
    return found + [f"search.transforms: '{name}'" for name in transforms]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two results of `bound_settings`, e.g. `["delta: 1.0 -> 2.0"]`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before != after:
            lines.append(f"{key}: {_show(before)} -> {_show(after)}")
    return lines


def ready_folder() -> Path:
    """The folder of the ready studies, and of the modules that some of them name."""
    return Path(str(files(PACKAGE) / READY))


def _read(path: str | Path | None) -> tuple[str, Path | None, str]:
    """A study file's text, its folder (None in the package) and its name in messages."""
    packaged = files(PACKAGE) / READY / f"{path or 'quickstart'}.toml"
    if path is None or (not Path(path).exists() and packaged.is_file()):
        return packaged.read_text(encoding="utf-8"), None, packaged.name
    file = Path(path).expanduser()
    try:
        return file.read_text(encoding="utf-8"), file.absolute().parent, str(path)
    except FileNotFoundError:
        ready = [
            entry.name.removesuffix(".toml")
            for entry in (files(PACKAGE) / READY).iterdir()
            if entry.name.endswith(".toml")
        ]
        raise ConfigError(
            f"There is no study file '{path}', nor a ready study of this name."
            f"{did_you_mean(str(path), ready)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The study file '{path}' can't be read: {error}.") from error


def _lines(path: Path) -> list[str]:
    """The names in a file of classes: the study keeps them, and needs the file no more."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.classes = '{path}' can't be read ({error}): give a list of classes, or a text "
            "file that has one on each line."
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _resolve(fields: dict[str, Any], folder: Path) -> None:
    """Make the paths in a study file absolute; `fields` is edited in place."""

    def absolute(value: str, base: Path) -> str:
        return str((base / Path(value).expanduser()).resolve())

    weights = fields.get("model.weights")
    if isinstance(weights, str) and weights != "pretrained":
        fields["model.weights"] = absolute(weights, folder)
    classes = fields.get("data.classes")
    if isinstance(classes, str):
        fields["data.classes"] = absolute(classes, folder)
    root = fields.get("data.root")
    if isinstance(root, str):
        fields["data.root"] = absolute(root, folder)
        folder = Path(fields["data.root"])
    source = fields.get("data.source")
    if isinstance(source, str) and source.startswith(("folder:", "array:")):
        kind, _, place = source.partition(":")
        fields["data.source"] = f"{kind}:{absolute(place, folder)}"


def _check_files(config: StudyConfig) -> None:
    """Refuse paths at which nothing is, before any work."""
    errors = []
    weights = config.model.weights
    if weights not in (None, "pretrained") and not Path(str(weights)).expanduser().is_file():
        errors.append(
            f"model.weights = '{weights}': no such file. Give a file of trained weights, "
            "'pretrained', or leave it out to train the baseline."
        )
    if config.data.root is not None and not Path(config.data.root).expanduser().is_dir():
        errors.append(
            f"data.root = '{config.data.root}': no such folder. Create it or leave it out."
        )
    kind, _, place = config.data.source.partition(":")
    base = Path(config.data.root or ".").expanduser()
    at = base / Path(place).expanduser()
    if kind == "folder" and not at.is_dir():
        errors.append(
            f"data.source = '{config.data.source}': no such folder. Give one that has "
            "train/<class>/* and test/<class>/* (or val/<class>/*)."
        )
    if kind == "array" and not at.is_file():
        errors.append(
            f"data.source = '{config.data.source}': no such file. Give an .npz with x_train, "
            "y_train, x_test and y_test."
        )
    if errors:
        raise ConfigError("\n".join(errors))


def _walk(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nest(fields: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flatten(fields).items():
        if value is None:
            continue
        *tables, last = key.split(".")
        place = nested
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{table}: expected a table, got {_show(place)}.")
        place[last] = value
    return nested


def _explain(error: Any) -> str:
    """One of pydantic's errors in our words: the value, the rule and the cure."""
    location: Sequence[str | int] = error["loc"]
    kind: str = error["type"]
    value: Any = error["input"]
    context: Mapping[str, Any] = error.get("ctx") or {}
    key = _key(location)
    *tables, last = [part for part in location if isinstance(part, str)]
    if kind == "extra_forbidden":
        return f"{key}: unknown key.{did_you_mean(last, _section(tables).model_fields)}"
    if kind == "missing":
        return f"{key}: missing. {_section(tables).model_fields[last].description}"
    if kind == "literal_error":
        known = _literals(_section(tables).model_fields[last].annotation)
        return f"{key}: unknown value {_show(value)}.{did_you_mean(str(value), known)}"
    if kind in _BOUNDS:
        sign, bound = _BOUNDS[kind]
        unit = f" ({UNITS[key]})" if key in UNITS else ""
        return f"{key} = {_show(value)} must be {sign} {context[bound]:g}{unit}"
    if kind in _EXPECTED:
        return f"{key}: expected {_EXPECTED[kind]}, got {_show(value)}"
    if kind == "string_pattern_mismatch":
        rule = _section(tables).model_fields[last].description
        return f"{key} = {_show(value)} is not of the right form: {rule}"
    if kind in ("too_short", "string_too_short"):
        return f"{key}: give at least one, got {_show(value)}"
    return f"{key}: {error['msg']}, got {_show(value)}"


def _section(tables: Sequence[str]) -> type[BaseModel]:
    section: type[BaseModel] = StudyConfig
    for table in tables:
        inner = _model_in(section.model_fields[table].annotation)
        if inner is None:
            break
        section = inner
    return section


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The table that `annotation` is, or lists; None if it is no table."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _key(location: Sequence[str | int]) -> str:
    """ "search.bounds[0].error"; which item of a list of plain values it is, is not told."""
    key = ""
    for part, after in zip(location, [*location[1:], None], strict=True):
        if isinstance(part, int):
            key += f"[{part}]" if isinstance(after, str) else ""
        else:
            key += f".{part}" if key else part
    return key


def _literals(annotation: Any) -> list[str]:
    """All texts that a `Literal` inside `annotation` allows."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) in (tuple, Union, UnionType, Annotated):
        return [word for part in get_args(annotation) for word in _literals(part)]
    return []


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a table"
    return "not set" if value is None else repr(value)
