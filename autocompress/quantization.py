"""int8: a network's weights and activations as whole numbers of 8 bits, in an ONNX file.

ONNX Runtime's static quantization does the work: weights are rounded for each output channel by
itself, activations by the range that they have on training images, and the file holds pairs of
QuantizeLinear and DequantizeLinear (QDQ), which ONNX Runtime, OpenVINO and TensorRT run in int8.
Where rounding alone costs too much, the network is fine-tuned with the rounding in place first.
Everything said of the file is measured on the file.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from autocompress.answers import Answers
from autocompress.checkpoint import Checkpoint
from autocompress.errors import AutocompressError, ConfigError, did_you_mean
from autocompress.evaluation import Evaluation, drop_bound, evaluate, metric_drop
from autocompress.formats import INT8_FILE, export_onnx
from autocompress.latency import Deployment
from autocompress.profiler import Example, Latency, batch_of, time_in_turns
from autocompress.runtime import open_onnx
from autocompress.task import Task
from autocompress.training import fit

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

Calibration = Literal["minmax", "percentile"]
CALIBRATIONS: tuple[Calibration, ...] = ("minmax", "percentile")
"""What an activation's range is: all that it was on the images, or all but the rarest values. In
the order in which they are tried: min-max is quick, and on networks with batch norm as good."""
PERCENTILE = 99.99
CALIBRATION_IMAGES = 512
CHUNK = 32
"""Images that are run at once while activations are looked at: bounds memory."""
RANGE_BATCHES = 8
"""Batches that give activations a first range, before fine-tuning."""
RANGE_MOMENTUM = 0.05
"""Share of the newest batch in an activation's range, while fine-tuning."""
LARGEST_WEIGHT, LARGEST_ACTIVATION = 127, 255
"""Weights are -127 to 127, so that zero is in the middle; activations 0 to 255 with a zero point of
their own, which ONNX Runtime's x86 kernels want."""
SMALLEST_SCALE = 1e-12

Say = Callable[[str], None]


def quantize_onnx(
    source: str | Path,
    target: str | Path,
    batches: Iterable[Example],
    calibration: Calibration = "minmax",
) -> None:
    """Write an int8 ONNX file of a float32 one: post-training static quantization.

    Args:
        source: The float32 file, with batch norm folded or not.
        target: The file to write.
        batches: Inputs of the network, from its training data, batch first; each is run at once.
        calibration: How the ranges of activations follow from them; see `CALIBRATIONS`.

    Raises:
        ConfigError: If the calibration is unknown or there is no batch.
        AutocompressError: If ONNX Runtime can't quantize the network, or quantized nothing of it.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if calibration not in CALIBRATIONS:
        raise ConfigError(
            f"Unknown calibration {calibration!r}.{did_you_mean(calibration, CALIBRATIONS)}"
        )
    names = [value.name for value in onnx.load(source, load_external_data=False).graph.input]
    reader = _Reader(names, batches)
    if not len(reader):
        raise ConfigError("Quantization needs at least one batch of training images, got none.")
    methods = {"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}
    with TemporaryDirectory() as place, _quiet():
        folded, rounded = Path(place) / "folded.onnx", Path(place) / "rounded.onnx"
        try:
            # Folds batch norm and constants, so that what is rounded is what will run.
            quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)
            quantize_static(
                str(folded),
                str(rounded),
                reader,
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8,
                calibrate_method=methods[calibration],
                # One batch's activations in memory at a time, whatever the method.
                extra_options={"CalibStridedMinMax": 1, "CalibPercentile": PERCENTILE},
            )
        except Exception as error:
            raise AutocompressError(
                f"ONNX Runtime can't quantize {Path(source).name}: {type(error).__name__}: {error}"
            ) from error
        model = onnx.load(rounded)
    if not any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        raise AutocompressError(
            f"Nothing in {Path(source).name} can be quantized: it has no convolution or matrix "
            "product with fixed weights."
        )
    _strip(model)
    onnx.save(model, target)


class _Reader:
    """The calibration images, as ONNX Runtime reads them: any range of batches, in order."""

    def __init__(self, names: Sequence[str], batches: Iterable[Example]) -> None:
        self._feeds = [
            {name: value.cpu().numpy() for name, value in zip(names, batch, strict=True)}
            for batch in batches
        ]
        self.set_range(0, len(self._feeds))

    def __len__(self) -> int:
        return len(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._feeds[start_index:end_index])

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self._left, None)


def calibration_batches(task: Task, count: int = CALIBRATION_IMAGES) -> Iterator[Example]:
    """The network's inputs for the first `count` training images, in chunks, on the CPU."""
    left = count
    for batch in task.calibration_batches(None):
        inputs = tuple(value[:left] for value in task.inputs(batch))
        yield from zip(*(torch.split(value, CHUNK) for value in inputs), strict=True)
        left -= len(inputs[0])
        if left <= 0:
            return


class OnnxNetwork(nn.Module):
    """An ONNX file in a network's place, so that the task's own functions can score it.

    Args:
        path: The file.
        model: The network that it came from; outputs are structured as its are.
        example: Its inputs.
    """

    def __init__(self, path: str | Path, model: nn.Module, example: Example) -> None:
        super().__init__()
        self._run = open_onnx(path)
        device = next(model.parameters()).device
        with torch.no_grad():
            output = model(*(value.to(device) for value in example))
        self._structure = pytree.tree_structure(output)

    def forward(self, *inputs: Tensor) -> Any:
        """The file's outputs for `inputs`, batch first, on their device."""
        outputs = self._run(*(value.detach().cpu().contiguous() for value in inputs))
        found = [value.to(inputs[0].device) for value in outputs]
        return pytree.tree_unflatten(found, self._structure)


@dataclass(frozen=True)
class Attempt:
    """One way to int8, and what it came to.

    Attributes:
        calibration: How the ranges of activations were found.
        epochs: Passes of quantization-aware fine-tuning before it.
        val: The int8 file's scores on the validation data.
        drop: Its drop against the baseline, on the metric's scale.
        bound: Upper confidence bound of that.
    """

    calibration: Calibration
    epochs: float
    val: Evaluation
    drop: float
    bound: float

    @property
    def method(self) -> str:
        """In words."""
        tuned = f", after {self.epochs:g} epochs of quantization-aware fine-tuning"
        return self.calibration + (tuned if self.epochs else "")


@dataclass(frozen=True)
class Quantizer:
    """Makes an int8 file of a network, and measures it.

    Attributes:
        task: The baseline, the user's data and functions.
        before: The baseline's scores on the validation data, which drops refer to.
        example: The network's inputs for one image.
        delta: The tolerance, on the metric's scale.
        confidence: How sure it must be that the drop is within it.
    """

    task: Task
    before: Evaluation
    example: Example
    delta: float
    confidence: float

    def attempts(self, model: nn.Module, target: Path, epochs: float = 0.0) -> Iterator[Attempt]:
        """Quantize in one way after the other; after each, `target` is the file it tells of.

        Args:
            model: The float32 network; it is not changed.
            target: The file that each attempt replaces.
            epochs: Passes of quantization-aware fine-tuning that it has had.
        """
        batches = list(calibration_batches(self.task))
        with TemporaryDirectory() as place:
            source = Path(place) / "float32.onnx"
            export_onnx(model, self.example, source)
            for calibration in CALIBRATIONS:
                quantize_onnx(source, target, batches, calibration)
                val = evaluate(self.network(target), self.task, self.task.val)
                drop = metric_drop(self.before, val)
                bound = drop_bound(self.before, val, self.confidence)
                yield Attempt(calibration, epochs, val, drop, bound)

    def best(
        self, model: nn.Module, target: Path, say: Say, epochs: float = 0.0
    ) -> tuple[Attempt, list[Attempt]]:
        """The first attempt within delta, or else the one that lost least; and all of them.

        Args:
            model: The float32 network; it is not changed.
            target: The file to write: that of the attempt returned.
            say: Told about each attempt.
            epochs: Passes of quantization-aware fine-tuning that the network has had.
        """
        made: list[Attempt] = []
        scale = self.task.scale
        with TemporaryDirectory() as place:
            contents: list[bytes] = []
            file = Path(place) / INT8_FILE
            for attempt in self.attempts(model, file, epochs):
                made.append(attempt)
                contents.append(file.read_bytes())
                say(
                    f"int8 ({attempt.method}): {scale.value(attempt.val.score)} on validation "
                    f"data, a drop of {scale.number(attempt.drop)}, at most "
                    f"{scale.number(attempt.bound)}."
                )
                if attempt.bound <= self.delta:
                    break
        chosen = min(range(len(made)), key=lambda number: made[number].bound)
        target.write_bytes(contents[chosen])
        return made[chosen], made

    def score(self, model: nn.Module) -> Evaluation:
        """The scores on the validation data of the network's int8 file, by min-max ranges."""
        with TemporaryDirectory() as place:
            source, target = Path(place) / "float32.onnx", Path(place) / INT8_FILE
            export_onnx(model, self.example, source)
            quantize_onnx(source, target, calibration_batches(self.task), CALIBRATIONS[0])
            return evaluate(self.network(target), self.task, self.task.val)

    def network(self, path: Path) -> OnnxNetwork:
        """A file in the network's place."""
        return OnnxNetwork(path, self.task.model, self.example)


def fit_rounded(
    model: nn.Module,
    task: Task,
    *,
    epochs: float,
    learning_rate: float,
    seed: int,
    teacher: nn.Module | None = None,
    answers: Answers | None = None,
    distillation: float = 0.0,
    on_step: Callable[[float, float, float], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> nn.Module:
    """A copy of a network, fine-tuned with int8's rounding in place (quantization-aware).

    The arguments are those of `fit`. It trains in full precision: bfloat16 would round activations
    as coarsely as int8 does.

    Returns:
        The float32 network, without the rounding, in evaluation mode.

    Raises:
        TrainingDiverged: If the loss stops being finite.
    """
    own = deepcopy(model).to(task.device)
    exact = replace(task, amp_dtype=None)
    with _rounding(own) as ranges:
        own.eval()
        for rounding in ranges:
            rounding.train()
        with torch.no_grad():
            for batch in task.calibration_batches(RANGE_BATCHES):
                task.forward(own, batch)
        fit(
            own,
            exact,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            teacher=teacher,
            answers=answers,
            distillation=distillation,
            on_step=on_step,
            checkpoint=checkpoint,
        )
    return own.eval()


class _WeightRounding(nn.Module):
    """A weight as int8 holds it: each output channel in steps of a 127th of its largest value.

    Batch norm's factors, which the file folds into the weight, would scale the steps with it.
    """

    def forward(self, weight: Tensor) -> Tensor:
        largest = weight.detach().flatten(1).abs().amax(1)
        scale = (largest / LARGEST_WEIGHT).clamp_min(SMALLEST_SCALE)
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(
            weight, scale, zeros, 0, -LARGEST_WEIGHT, LARGEST_WEIGHT
        )


class _InputRounding(nn.Module):
    """A layer's input as int8 holds it: 256 steps over a range that follows the batches."""

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(float("inf")))
        self.register_buffer("high", torch.tensor(float("-inf")))

    def forward(self, value: Tensor) -> Tensor:
        if self.training:
            low, high = value.detach().aminmax()
            # Zero must be exact: padding is made of it.
            self._follow(self.low, low.clamp_max(0.0))
            self._follow(self.high, high.clamp_min(0.0))
        scale = ((self.high - self.low) / LARGEST_ACTIVATION).clamp_min(SMALLEST_SCALE)
        zero = (-self.low / scale).round().to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(value, scale, zero, 0, LARGEST_ACTIVATION)

    def _follow(self, end: Tensor, seen: Tensor) -> None:
        moved = end.lerp(seen, RANGE_MOMENTUM)
        end.copy_(torch.where(end.isfinite(), moved, seen))


@contextmanager
def _rounding(model: nn.Module) -> Iterator[list[_InputRounding]]:
    """Let the layers that int8 will run round their weights and inputs meanwhile."""
    layers = [part for part in model.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    owners = [id(layer.weight) for layer in layers]
    # A parametrization would untie a weight that several layers share.
    layers = [layer for layer in layers if owners.count(id(layer.weight)) == 1]
    hooks = []
    ranges: list[_InputRounding] = []
    for layer in layers:
        rounding = _InputRounding().to(layer.weight.device)
        # As a submodule it follows train() and eval() of the network.
        layer.add_module("input_rounding", rounding)
        hooks.append(layer.register_forward_pre_hook(_round_input))
        parametrize.register_parametrization(layer, "weight", _WeightRounding())
        ranges.append(rounding)
    try:
        yield ranges
    finally:
        for layer, hook in zip(layers, hooks, strict=True):
            hook.remove()
            del layer.input_rounding
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def _round_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    rounding = layer.get_submodule("input_rounding")
    return (rounding(inputs[0]), *inputs[1:])


def time_files(
    paths: Mapping[str, Path], example: Example, seconds: float = 2.0, min_runs: int = 20
) -> dict[str, Latency]:
    """Time ONNX files turn by turn on ONNX Runtime's CPU kernels, with PyTorch's threads.

    Args:
        paths: The files, by any name.
        example: Inputs of all, batch first; one image is timed.
        seconds: Time to spend on all, the warm-up not counted.
        min_runs: Timed runs of each at least.

    Returns:
        The latency of each.
    """
    deployment = Deployment("onnxruntime", 1, torch.get_num_threads())
    inputs = tuple(value.cpu() for value in batch_of(example, 1))
    networks = [open_onnx(path) for path in paths.values()]
    runners = [lambda run=run: run(*inputs) for run in networks]
    times = time_in_turns(runners, seconds, min_runs, deployment.clock)
    return dict(zip(paths, map(deployment.latency, times), strict=True))


def _strip(model: ModelProto) -> None:
    """Leave out of a quantized model what no runtime needs; small networks are mostly that.

    The names of inputs and outputs stay; names in between become short, names of nodes go, and so
    do notes, attributes that say the default, and zero points that are zero.
    """
    graph = model.graph
    _drop_zero_points(graph)
    used = {name for node in graph.node for name in node.input}
    kept = [value for value in graph.initializer if value.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]
    del model.metadata_props[:]
    nested = any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute)
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        node.name = ""
        _drop_defaults(node)
    if not nested:  # an inner graph knows the outer one's names
        _shorten_names(graph)


def _drop_zero_points(graph: GraphProto) -> None:
    """Weights and biases are rounded around zero, which is the default.

    Only those of convolutions: ONNX Runtime runs a Gemm in float32 if its bias has none.
    """
    from onnx.numpy_helper import to_array

    constants = {value.name: value for value in graph.initializer}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3:
            continue
        value, _, zero = node.input
        of_conv = set(readers.get(node.output[0], ())) == {"Conv"}
        if of_conv and value in constants and not to_array(constants[zero]).any():
            del node.input[2]


def _drop_defaults(node: NodeProto) -> None:
    from onnx.helper import get_attribute_value

    defaults = {"dilations": 1, "strides": 1, "pads": 0}
    if node.op_type != "Conv":
        return
    for attribute in list(node.attribute):
        value = get_attribute_value(attribute)
        plain = attribute.name in defaults and set(value) == {defaults[attribute.name]}
        if plain or (attribute.name, value) in (("group", 1), ("auto_pad", b"NOTSET")):
            node.attribute.remove(attribute)


def _shorten_names(graph: GraphProto) -> None:
    fixed = {value.name for value in (*graph.input, *graph.output)}
    short: dict[str, str] = {"": ""} | {name: name for name in fixed}

    def shorten(name: str) -> str:
        if name not in short:
            # A number is no input's name: those are names in Python.
            short[name] = str(len(short))
        return short[name]

    for value in graph.initializer:
        value.name = shorten(value.name)
    for node in graph.node:
        node.input[:] = [shorten(name) for name in node.input]
        node.output[:] = [shorten(name) for name in node.output]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what ONNX Runtime's tools print and log of their insides from the user."""
    logger, handler = logging.getLogger(), logging.NullHandler()
    level = logger.level
    logger.setLevel(logging.ERROR)
    # Where there is no handler, their warnings would set one up for all.
    logger.addHandler(handler)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
