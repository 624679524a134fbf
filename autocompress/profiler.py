"""What a network costs: params, size, MACs, memory and latency, in total and layer by layer.

How each figure is defined:

* params: weights and biases; a tensor that is shared counts once.
* size_bytes: parameters and persistent buffers as stored, each in its own dtype.
* macs: multiply-adds for one image, one multiply-add counted once. They are the matrix products and
  convolutions that `torch.utils.flop_counter` knows, attention included. Everything else that
  computes is named in `uncounted` with its number of calls: elementwise, normalisation and pooling
  operations as a rule. A matrix product found there (a fused recurrent layer, a custom kernel) is a
  hole in the count.
* memory_bytes: `size_bytes` plus the activations of one image, which are the outputs of all
  innermost modules together; an output that shares its input's memory (in-place ReLU, flatten)
  costs nothing. It's an upper bound: a runtime may free an activation after its last use.
* latency: median wall-clock time of a batch, in milliseconds, after a warm-up.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from autocompress.batch import tensors_in
from autocompress.errors import ConfigError
from autocompress.layers import Cost
from autocompress.scale import ACCURACY, Scale

Example = tuple[Tensor, ...]
"""The network's inputs, batch first, as `model(*example)` takes them."""

Forward = Callable[[nn.Module, Example], Any]

WARM_UP_RUNS = 3
WARM_UP_FRACTION = 0.2
"""Part of the measuring time that is also spent before it, so that clocks and caches settle."""


@dataclass(frozen=True)
class LayerProfile:
    """What one module costs by itself, without the modules inside it.

    Attributes:
        name: Name in `model.named_modules()`; "" is the network itself.
        kind: Class of the module.
        params: Weights and biases that the module owns.
        macs: Multiply-adds for one image.
        activation_bytes: Bytes of its outputs for one image.
        output_shape: Shape of its (first) output for one image, batch included; () if it never ran.
    """

    name: str
    kind: str
    params: int
    macs: int
    activation_bytes: int
    output_shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one batch.

    Attributes:
        median_ms: Median, in milliseconds.
        iqr_ms: Distance between the quartiles, in milliseconds.
        batch_size: Images in the batch.
        runs: Number of timed batches.
        device: Where it ran: "cpu" or "cuda:0" in PyTorch itself, else the processor's name.
        threads: CPU threads.
        runtime: What ran the network, such as "ONNX Runtime 1.32.0"; "eager" is PyTorch itself.
    """

    median_ms: float
    iqr_ms: float
    batch_size: int
    runs: int
    device: str
    threads: int
    runtime: str = "eager"

    @classmethod
    def of(
        cls,
        times: Sequence[float],
        batch_size: int,
        device: str,
        threads: int,
        runtime: str = "eager",
    ) -> Latency:
        """The latency of batches that took `times`, in seconds."""
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return cls(
            median_ms=1e3 * median,
            iqr_ms=1e3 * (high - low),
            batch_size=batch_size,
            runs=len(times),
            device=device,
            threads=threads,
            runtime=runtime,
        )


@dataclass(frozen=True)
class Profile:
    """What a network costs for one image; the module's docstring defines each figure.

    Attributes:
        params: Number of weights and biases.
        size_bytes: Bytes of parameters and buffers as stored.
        macs: Multiply-adds for one image.
        memory_bytes: Bytes of parameters, buffers and all activations of one image.
        latency: None if it was not measured.
        score: The task's metric; None if it was not measured. The profiler never fills it.
        layers: Modules that have params, MACs or activations, in the order of definition; their
            sums are the totals.
        uncounted: Operations that computed something but have no MACs, with their calls.
    """

    params: int
    size_bytes: int
    macs: int
    memory_bytes: int
    latency: Latency | None = None
    score: float | None = None
    layers: tuple[LayerProfile, ...] = ()
    uncounted: Mapping[str, int] = field(default_factory=dict)

    @property
    def cost(self) -> Cost:
        """Parameters and MACs alone."""
        return Cost(self.params, self.macs)

    @property
    def latency_ms(self) -> float | None:
        """The latency's median; None if it was not measured."""
        return None if self.latency is None else self.latency.median_ms

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain values that JSON can hold."""
        data = asdict(self)
        layers = [{**layer, "output_shape": [*layer["output_shape"]]} for layer in data["layers"]]
        return {**data, "layers": layers, "uncounted": dict(self.uncounted)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Profile:
        """The inverse of `to_dict`; keys that a profile doesn't have are passed over."""
        latency = data.get("latency")
        return cls(
            params=data["params"],
            size_bytes=data["size_bytes"],
            macs=data["macs"],
            memory_bytes=data["memory_bytes"],
            latency=None if latency is None else Latency(**latency),
            score=data.get("score"),
            layers=tuple(
                LayerProfile(**{**layer, "output_shape": tuple(layer.get("output_shape", ()))})
                for layer in data.get("layers", ())
            ),
            uncounted=dict(data.get("uncounted", {})),
        )


@dataclass(frozen=True)
class Row:
    """One metric before and after, in the unit of the table.

    Attributes:
        metric: The name of the task's metric, "params", "size", "MACs", "memory" or "latency".
        unit: That of the task's metric, "M", "MB" (1 MB = 1,000,000 bytes), "M" or "G", "MB", "ms".
        before: Of the baseline; None if it was not measured.
        after: Of the compressed network; None if it was not measured.
        scale: Of the task's metric, in its row.
    """

    metric: str
    unit: str
    before: float | None
    after: float | None
    scale: Scale | None = None

    @property
    def ratio(self) -> float | None:
        """Compression ratio, baseline / compressed; None for the metric and what is unknown."""
        if self.scale is not None or self.before is None or not self.after:
            return None
        return self.before / self.after

    @property
    def change(self) -> str:
        """The ratio ("4.0x") or, for the metric, the difference ("-0.62 points"); "" if unknown."""
        if self.scale is not None:
            if self.before is None or self.after is None:
                return ""
            difference = self.after - self.before
            return ("+" if difference >= 0 else "") + self.scale.difference(difference)
        return "" if self.ratio is None else f"{self.ratio:.1f}x"


def profile_model(
    model: nn.Module, example: Example, latency: bool = True, forward: Forward | None = None
) -> Profile:
    """Count and time a network in eval mode; its training mode is restored and no hook stays.

    Args:
        model: The network, on any device.
        example: Its inputs, batch first; only the first sample is used.
        latency: Whether to spend about a second on timing.
        forward: Replaces `model(*example)`.

    Raises:
        ConfigError: If `example` is empty.
    """
    image = on_device(model, batch_of(example, 1))
    with eval_mode(model):
        tally = _count(model, image, forward)
    layers = _layers(model, tally)
    size = size_bytes(model)
    return Profile(
        params=sum(layer.params for layer in layers),
        size_bytes=size,
        macs=sum(layer.macs for layer in layers),
        memory_bytes=size + sum(layer.activation_bytes for layer in layers),
        latency=measure_latency(model, image, forward) if latency else None,
        layers=layers,
        uncounted=dict(sorted(tally.uncounted.items())),
    )


def size_bytes(model: nn.Module) -> int:
    """Bytes of parameters and persistent buffers, each shared tensor once."""
    stored = model.state_dict(keep_vars=True).values()
    unique = {id(value): value for value in stored if isinstance(value, Tensor)}
    return sum(value.numel() * value.element_size() for value in unique.values())


def measure_latency(
    model: nn.Module,
    example: Example,
    forward: Forward | None = None,
    batch_size: int = 1,
    seconds: float = 1.0,
    min_runs: int = 20,
) -> Latency:
    """Time batches of `batch_size` images in eval mode, in PyTorch itself.

    `autocompress.latency` times networks on the runtime that serves them, beside the baseline.

    Args:
        model: The network, on any device.
        example: Its inputs, batch first; the first sample is repeated to the batch.
        forward: Replaces `model(*example)`.
        batch_size: Images in a batch.
        seconds: Time to spend, the warm-up not counted.
        min_runs: Timed batches at least, even if they take longer.
    """
    inputs = on_device(model, batch_of(example, batch_size))

    def run() -> None:
        _run(model, inputs, forward)
        _synchronize(inputs[0].device)

    with torch.no_grad(), eval_mode(model):
        (times,) = time_in_turns([run], seconds, min_runs)
    return Latency.of(times, batch_size, str(inputs[0].device), torch.get_num_threads())


def comparison(before: Profile, after: Profile, scale: Scale = ACCURACY) -> list[Row]:
    """The table before/after: the task's metric, params, size, MACs, memory and latency."""
    macs_unit, macs_scale = ("G", 1e9) if before.macs >= 1e9 else ("M", 1e6)
    return [
        Row(scale.name, scale.unit, before.score, after.score, scale),
        Row("params", "M", before.params / 1e6, after.params / 1e6),
        Row("size", "MB", before.size_bytes / 1e6, after.size_bytes / 1e6),
        Row("MACs", macs_unit, before.macs / macs_scale, after.macs / macs_scale),
        Row("memory", "MB", before.memory_bytes / 1e6, after.memory_bytes / 1e6),
        Row("latency", "ms", before.latency_ms, after.latency_ms),
    ]


@dataclass
class _Call:
    """One running module."""

    name: str
    inputs: set[int]
    is_leaf: bool = True


@dataclass
class _Tally:
    """What a forward pass has cost, by the name of the module."""

    macs: Counter[str] = field(default_factory=Counter)
    activation_bytes: Counter[str] = field(default_factory=Counter)
    output_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    uncounted: Counter[str] = field(default_factory=Counter)
    running: list[_Call] = field(default_factory=list)


class _Attribution(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Books what `counter` counts to the innermost running module, and lists what it doesn't."""

    supports_higher_order_operators = True

    def __init__(self, tally: _Tally, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tally = tally
        self.counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = self.counter.get_total_flops()
        output = func(*args, **(kwargs or {}))
        flops = self.counter.get_total_flops() - before
        if flops:
            # An operation outside of every module's forward belongs to the network as a whole.
            name = self.tally.running[-1].name if self.tally.running else ""
            self.tally.macs[name] += flops // 2
        elif _computes(func, (args, kwargs), output):
            self.tally.uncounted[str(getattr(func, "_overloadpacket", func))] += 1
        return output


def _computes(func: Any, inputs: Any, output: Any) -> bool:
    """Whether an operation makes new values from tensors; views, queries and factories don't."""
    if not any(True for _ in tensors_in(inputs)) or not any(True for _ in tensors_in(output)):
        return False
    if torch.Tag.inplace_view in getattr(func, "tags", ()):
        return False
    schema = getattr(func, "_schema", None)
    if schema is None or schema.is_mutable:
        return True
    return not (_storages(output) <= _storages(inputs)) and func not in _COPIES


_COPIES = frozenset(
    {
        torch.ops.aten.alias.default,
        torch.ops.aten.clone.default,
        torch.ops.aten.detach.default,
        torch.ops.aten._to_copy.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_zeros.default,
        torch.ops.aten.zeros_like.default,
    }
)


def _storages(value: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors_in(value)}


def _count(model: nn.Module, image: Example, forward: Forward | None) -> _Tally:
    """Run one forward pass and book its costs."""
    tally = _Tally()
    counter = FlopCounterMode(display=False)
    # Inference mode would hide the parts of composite operations from the counter.
    plain = torch.inference_mode(False)
    with _unfused_attention(), _hooks(model, tally), _frozen(model), plain, torch.no_grad():
        inputs = tuple(value.clone() for value in image)
        with counter, _Attribution(tally, counter):
            _run(model, inputs, forward)
    return tally


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters that want no derivatives: the counter looks for those of whatever a module gets,
    and stumbles over a part of a parameter (the class tokens of timm's PiT)."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


@contextmanager
def _hooks(model: nn.Module, tally: _Tally) -> Iterator[None]:
    """Follow which module runs, and book the outputs of the innermost ones."""

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if tally.running:
                tally.running[-1].is_leaf = False
            tally.running.append(_Call(name, _storages((args, kwargs))))

        return hook

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = tally.running.pop()
        found = list(tensors_in(output))
        if found:
            tally.output_shapes[call.name] = tuple(found[0].shape)
        if call.is_leaf:
            tally.activation_bytes[call.name] += sum(
                value.numel() * value.element_size()
                for value in found
                if value.untyped_storage().data_ptr() not in call.inputs
            )

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Keep attention off its one-kernel paths, inside which nothing can be counted."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _layers(model: nn.Module, tally: _Tally) -> tuple[LayerProfile, ...]:
    params: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        params[name.rpartition(".")[0]] += parameter.numel()
    rows = (
        LayerProfile(
            name=name,
            kind=type(module).__name__,
            params=params[name],
            macs=tally.macs[name],
            activation_bytes=tally.activation_bytes[name],
            output_shape=tally.output_shapes.get(name, ()),
        )
        for name, module in model.named_modules()
    )
    return tuple(row for row in rows if row.params or row.macs or row.activation_bytes)


def time_in_turns(
    runs: Sequence[Callable[[], object]],
    seconds: float,
    min_runs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """The seconds that each of `runs` takes, called turn by turn, so that noise hits all alike.

    Args:
        runs: What is timed; each returns when its work is done.
        seconds: Time to spend, the warm-up not counted.
        min_runs: Turns at least, even if they take longer.
        clock: Tells the seconds.
    """
    if min_runs < 2:
        raise ConfigError(f"Latency needs min_runs >= 2, got {min_runs}.")
    spent: list[list[float]] = [[] for _ in runs]

    def turn(keep: bool) -> None:
        for run, times in zip(runs, spent, strict=True):
            begin = clock()
            run()
            if keep:
                times.append(clock() - begin)

    begin = time.perf_counter()
    for _ in range(WARM_UP_RUNS):
        turn(keep=False)
    while time.perf_counter() - begin < WARM_UP_FRACTION * seconds:
        turn(keep=False)
    begin = time.perf_counter()
    while len(spent[0]) < min_runs or time.perf_counter() - begin < seconds:
        turn(keep=True)
    return spent


def _run(model: nn.Module, inputs: Example, forward: Forward | None) -> Any:
    return model(*inputs) if forward is None else forward(model, inputs)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batch_of(example: Example, size: int) -> Example:
    """The first sample of `example`, `size` times.

    Raises:
        ConfigError: If there is none, or `size` is below 1.
    """
    if size < 1:
        raise ConfigError(f"Latency needs batch_size >= 1, got {size}.")
    if not example or not all(isinstance(value, Tensor) and value.ndim for value in example):
        raise ConfigError(
            "The example must be a tuple of at least one tensor, batch first, such as "
            f"(torch.zeros(1, 3, 32, 32),); got {_describe(example)}."
        )
    return tuple(
        value[:1].expand(size, *value.shape[1:]).contiguous() if size > 1 else value[:1]
        for value in example
    )


def _describe(example: Any) -> str:
    if isinstance(example, Tensor):
        return f"a tensor of shape {tuple(example.shape)}"
    if isinstance(example, tuple):
        return f"({', '.join(_describe(value) for value in example)})"
    return type(example).__name__


def on_device(model: nn.Module, inputs: Example) -> Example:
    """The inputs where the model's weights are."""
    weight = next(model.parameters(), None)
    if weight is None:
        return inputs
    return tuple(value.to(weight.device) for value in inputs)


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Switch to eval mode, and back to what each module had; parts may differ (frozen norms)."""
    modes = [(part, part.training) for model in models for part in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
