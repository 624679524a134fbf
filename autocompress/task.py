"""A task: everything that the user owns, and nothing else.

The network, the data, and five functions that say how they meet. All of the rest of the package
works through these, so a network with other inputs, losses or metrics needs no change elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from autocompress.errors import ConfigError

Batch = Any
"""What a loader yields: a tensor, or (nested) tuples, lists and dicts of tensors."""


class Loader(Protocol):
    """An iterable over batches that can be read again; a `torch.utils.data.DataLoader` is one."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


Forward = Callable[[nn.Module, Batch], Any]
Loss = Callable[[Any, Batch], Tensor]
Metric = Callable[[Any, Batch], Tensor]
Distillation = Callable[[Any, Any], Tensor]
MakeOptimizer = Callable[[nn.Module, float], Optimizer]
MakeScheduler = Callable[[Optimizer, float, int], LRScheduler]


def call_on_images(model: nn.Module, batch: Batch) -> Any:
    """The default forward pass: the batch is `(images, labels)`.

    Of outputs that have more parts in training (GoogLeNet, Inception) the logits.
    """
    output = model(batch[0])
    return getattr(output, "logits", output)


def cross_entropy(output: Any, batch: Batch) -> Tensor:
    """The default loss, for logits `n x classes (x ...)` and a batch `(images, labels)`."""
    return F.cross_entropy(output, batch[1])


def correct(output: Any, batch: Batch) -> Tensor:
    """The default metric: 1 for each label at which the largest logit is, else 0."""
    hits: Tensor = output.argmax(dim=1) == batch[1]
    return hits.float()


def logit_distillation(student: Any, teacher: Any, temperature: float = 4.0) -> Tensor:
    """Kullback-Leibler divergence of softened logits (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student: Logits, `n x classes (x ...)`.
        teacher: Logits of the baseline, of the same shape.
        temperature: Divides both logits; the result is scaled by its square.
    """
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=1),
        F.log_softmax(teacher.float() / temperature, dim=1),
        reduction="none",
        log_target=True,
    )
    return divergence.sum(dim=1).mean() * (temperature * temperature)


def sgd(model: nn.Module, learning_rate: float) -> Optimizer:
    """The default optimizer: SGD with Nesterov momentum; biases and norms are not decayed."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)


def one_cycle(optimizer: Optimizer, learning_rate: float, steps: int) -> LRScheduler:
    """The default scheduler: a short rise to `learning_rate`, then a straight way to zero."""
    return OneCycleLR(
        optimizer,
        max_lr=learning_rate,
        total_steps=max(steps, 2),
        pct_start=0.15,
        anneal_strategy="linear",
        cycle_momentum=False,
        div_factor=10.0,
        final_div_factor=100.0,
    )


@dataclass
class Task:
    """A trained network, its data and how they meet.

    Attributes:
        model: The network; after `train_baseline` it holds the baseline's weights. Parameters that
            don't require gradients stay as they are; the factors of replaced layers are trained.
        train: Training batches; the only data that weights are fitted to.
        val: Validation batches; every choice is made on these.
        test: Test batches; read once, for the report.
        calibration: Training batches, augmented as in training, that are looked at and not learned
            from: for batch-norm statistics and patches. None for `train` itself.
        classes: Class names, as far as known.
        origin: `{"source": ..., "arguments": ...}` from which the untrained network can be built
            again; None for a network that came from Python.
        fingerprint: Identifies the data.
        normalization: `{"mean": [...], "std": [...]}` that the loaders apply, as far as known.
        val_seen: Whether the network has probably been trained on the validation images.
        forward: `forward(model, batch)` gives the network's output.
        loss: `loss(output, batch)` gives a scalar.
        metric: `metric(output, batch)` gives a score in [0, 1] for each sample, or for each of its
            parts (pixels), which are averaged; accuracy is 100 times the mean over the samples.
        distillation: `distillation(student_output, teacher_output)` gives a scalar; None for none.
        optimizer: `optimizer(model, learning_rate)`.
        scheduler: `scheduler(optimizer, learning_rate, steps)`, stepped after every batch.
        device: Where everything runs.
        amp_dtype: Autocast type in training, or None for full precision.
    """

    model: nn.Module
    train: Loader
    val: Loader
    test: Loader
    calibration: Loader | None = None
    classes: tuple[str, ...] = ()
    origin: Mapping[str, Any] | None = None
    fingerprint: str = ""
    normalization: Mapping[str, Any] | None = None
    val_seen: bool = False
    forward: Forward = call_on_images
    loss: Loss = cross_entropy
    metric: Metric = correct
    distillation: Distillation | None = logit_distillation
    optimizer: MakeOptimizer = sgd
    scheduler: MakeScheduler = one_cycle
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    amp_dtype: torch.dtype | None = None

    @property
    def calibrating(self) -> Loader:
        """`calibration`, or `train` in its stead."""
        return self.train if self.calibration is None else self.calibration

    def calibration_batches(self, count: int | None) -> Iterator[Batch]:
        """The first `count` batches of `calibration`, on the device; the same in each call."""
        if self.calibration is not None and hasattr(self.calibration, "reseed"):
            self.calibration.reseed(0)
        return batches(self.calibrating, self.device, count)

    def example(self) -> tuple[Tensor, ...]:
        """One validation image on the CPU, as the tensors that `model(*inputs)` takes.

        They are caught in a real forward pass, so a custom `forward` needs no second definition.

        Raises:
            ConfigError: If the loader is empty or the network takes something besides tensors.
        """
        batch = next(iter(self.val), None)
        if batch is None:
            raise ConfigError("The validation loader is empty; give at least one batch.")
        return self.inputs(first_samples(batch, 1))

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What `forward` hands to the network for `batch`, on the CPU."""
        caught: list[tuple[Any, ...]] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if kwargs or not all(isinstance(value, Tensor) for value in args):
                raise ConfigError(
                    "The forward pass must call the network with positional tensors only, got "
                    f"{[type(value).__name__ for value in args]} and keywords {sorted(kwargs)}."
                )
            caught.append(args)

        was_training = self.model.training
        device = next(self.model.parameters()).device
        hook = self.model.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with torch.no_grad():
                self.forward(self.model.eval(), to_device(batch, device))
        finally:
            hook.remove()
            self.model.train(was_training)
        if not caught:
            raise ConfigError("The forward pass never called the network that it was given.")
        return tuple(value.detach().clone().cpu() for value in caught[0])

    def images(self, count: int) -> tuple[Tensor, ...]:
        """The network's inputs for the first `count` validation images, on the CPU."""
        parts = []
        left = count
        for batch in self.val:
            inputs = self.inputs(first_samples(batch, left))
            parts.append(inputs)
            left -= len(inputs[0])
            if left <= 0:
                break
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` with every tensor in it on `device`; images keep their memory format."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return tuple(to_device(value, device) for value in batch)
    return batch


def first_samples(batch: Batch, count: int) -> Batch:
    """The first `count` samples of `batch`; what has no samples, such as a number, stays."""
    return _cut(batch, slice(count))


def split_batch(batch: Batch, size: int) -> Iterator[Batch]:
    """`batch` in parts of at most `size` samples."""
    for start in range(0, samples_in(batch), size):
        yield _cut(batch, slice(start, start + size))


def part_of(batch: Batch, index: int, count: int) -> Batch:
    """Part `index`, from 0, of `count` parts of `batch` that are as even as can be."""
    size = samples_in(batch)
    return _cut(batch, slice(index * size // count, (index + 1) * size // count))


def _cut(batch: Batch, place: slice) -> Batch:
    if isinstance(batch, Tensor):
        return batch[place] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, place) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        if any(True for _ in tensors_in(batch)):
            return tuple(_cut(value, place) for value in batch)
        return batch[place]
    return batch


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a tensor, or in (nested) sequences and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from tensors_in(part)


def samples_in(batch: Batch) -> int:
    """Number of samples in a batch: the length of the first tensor in it."""
    return len(next(tensors_in(batch)))


def batches(loader: Iterable[Batch], device: torch.device, count: int | None) -> Iterator[Batch]:
    """The first `count` batches of `loader` (all for None), on `device`."""
    for batch in islice(loader, count):
        yield to_device(batch, device)


def scores_of(output: Any, batch: Batch, metric: Metric) -> Tensor:
    """One score in [0, 1] for each sample; the scores of a sample's parts (pixels) are averaged.

    Args:
        output: The network's output for the batch.
        batch: The batch.
        metric: The task's metric.

    Returns:
        `n` scores, float32, where the output is.

    Raises:
        ConfigError: If the metric gives something else.
    """
    scores = metric(output, batch)
    count = samples_in(batch)
    if not isinstance(scores, Tensor) or not scores.numel() or scores.numel() % count:
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else repr(scores)
        raise ConfigError(
            f"The metric must return a tensor with a score for each of the {count} samples, not "
            f"their mean; got {got}."
        )
    return scores.detach().float().reshape(count, -1).mean(dim=1)


def checked_scores(parts: Sequence[Tensor]) -> Tensor:
    """The scores of several batches as one tensor on the CPU.

    Raises:
        ConfigError: If one is not in [0, 1].
    """
    # One look at all of them: each look would wait for the GPU.
    found = torch.cat(list(parts)).cpu()
    if bool((found < 0).any()) or bool((found > 1).any()):
        raise ConfigError(
            "The metric's scores must lie between 0 and 1 (accuracy is 100 times their mean), got "
            f"{float(found.min()):g} to {float(found.max()):g}."
        )
    return found


def check_outputs(task: Task) -> None:
    """Run the network and the metric on two samples, before any work is spent.

    Raises:
        ConfigError: If the data has more classes than the network has outputs, or the network
            can't take the data, or the metric not its outputs.
    """
    batch = next(iter(task.train), None)
    if batch is None:
        raise ConfigError("The training loader is empty; give at least one batch.")
    device = next(task.model.parameters()).device
    was_training = task.model.training
    samples = to_device(first_samples(batch, 2), device)
    try:
        with torch.no_grad():
            output = task.forward(task.model.eval(), samples)
    except Exception as error:
        shapes = ", ".join(str(tuple(value.shape[1:])) for value in tensors_in(batch))
        raise ConfigError(
            f"The network can't take this data, whose samples have shapes {shapes}: "
            f"{type(error).__name__}: {error}. "
            "Check model.arguments (in_channels), data.image_size and the forward pass."
        ) from error
    finally:
        task.model.train(was_training)
    outputs = output.shape[1] if isinstance(output, Tensor) and output.ndim > 1 else None
    if outputs is not None and len(task.classes) > outputs:
        raise ConfigError(
            f"The data has {len(task.classes)} classes, the network has {outputs} outputs; set "
            "model.arguments so that it has at least as many (num_classes)."
        )
    try:
        checked_scores([scores_of(output, samples, task.metric)])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"The metric failed on two samples with {type(error).__name__}: {error}."
        ) from error
