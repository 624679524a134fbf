"""A task: everything that the user owns, and nothing else.

The network, the data, and a few functions that say how they meet. All of the rest of the package
works through these, so a network with other inputs, losses or metrics needs no change elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from autocompress.batch import Batch, first_samples, tensors_in, to_device
from autocompress.errors import ConfigError, did_you_mean
from autocompress.manifest import dtype_name
from autocompress.metrics import Metric, ScoreFunction, as_metric
from autocompress.random_numbers import OwnNumbers
from autocompress.scale import Scale

IGNORED = -100
"""A label that neither the default loss nor the default metric counts, as PyTorch has it."""
WEIGHT_DECAY = 5e-4
WARM_UP_SHARE = 0.15
"""Of the default optimizer, and of the default schedule's steps."""


class Loader(Protocol):
    """An iterable over batches that can be read again; a `torch.utils.data.DataLoader` is one."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


Forward = Callable[[nn.Module, Batch], Any]
Loss = Callable[[Any, Batch], Tensor]
Distillation = Callable[[Any, Any], Tensor]
MakeOptimizer = Callable[[nn.Module, float], Optimizer]
MakeScheduler = Callable[[Optimizer, float, int], LRScheduler]


class TrainingLoop(Protocol):
    """A training loop of the user's, whole: it trains the network in place."""

    def __call__(
        self,
        model: nn.Module,
        *,
        epochs: float,
        learning_rate: float,
        seed: int,
        teacher: nn.Module | None,
        on_step: Callable[[float, float, float], None],
    ) -> object:
        """Train `model`, which is on the task's device and in training mode.

        Args:
            model: The network: the baseline, or a compressed one.
            epochs: Length, in passes over the training data; it may be a fraction.
            learning_rate: Peak of the schedule.
            seed: Fixes the order of the data and whatever else is drawn.
            teacher: The baseline, in evaluation mode, to imitate where that helps; None where the
                baseline itself is trained.
            on_step: To be called now and then as `on_step(epochs done, epochs in all, loss)`: it
                shows the progress, and ends the run where the user or the study wants that.
        """
        ...


def call_on_images(model: nn.Module, batch: Batch) -> Any:
    """The default forward pass: the batch is `(images, labels)`.

    Of outputs that have more parts in training (GoogLeNet, Inception) the logits.
    """
    output = model(batch[0])
    return getattr(output, "logits", output)


def cross_entropy(output: Any, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """The default loss, for logits `n x classes (x ...)` and a batch `(images, labels)`."""
    return F.cross_entropy(output, batch[1], label_smoothing=label_smoothing)


def correct(output: Any, batch: Batch) -> Tensor:
    """The default metric: 1 for each label at which the largest logit is, else 0.

    Of labels for each pixel those that the default loss ignores, too, don't count.

    Returns:
        `n` shares of labels, 0 to 1.

    Raises:
        ConfigError: If there are not as many outputs as labels, or these are no classes of at least
            two; broadcasting would hide that.
    """
    labels = batch[1]
    if len(output) != len(labels):
        raise ConfigError(
            f"The forward pass gave {len(output)} outputs for {len(labels)} labels; it must give "
            "one for each sample."
        )
    shape = tuple(output.shape)
    fits = shape[:1] + shape[2:] == tuple(labels.shape)
    if len(shape) < 2 or shape[1] < 2 or not fits or labels.is_floating_point():
        raise ConfigError(
            "Accuracy, the default metric, wants outputs for at least two classes, of shape "
            "(images, classes), and labels that are their numbers, of shape (images); got outputs "
            f"of shape {shape} and labels of shape {tuple(labels.shape)}, "
            f"{dtype_name(labels)}. Give a metric of your own (metric=...); of one-hot labels "
            "labels.argmax(1) are the numbers."
        )
    hits: Tensor = output.argmax(dim=1) == labels
    if hits.ndim == 1:
        return hits.float()
    counted = (labels != IGNORED).flatten(1)
    shares: Tensor = (hits.flatten(1) & counted).sum(1) / counted.sum(1).clamp_min(1)
    return shares


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


def sgd(model: nn.Module, learning_rate: float, weight_decay: float = WEIGHT_DECAY) -> Optimizer:
    """The default optimizer: SGD with Nesterov momentum; biases and norms are not decayed."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)


def one_cycle(
    optimizer: Optimizer, learning_rate: float, steps: int, warm_up: float = WARM_UP_SHARE
) -> LRScheduler:
    """The default scheduler: a short rise to `learning_rate`, then a straight way to zero."""
    return OneCycleLR(
        optimizer,
        max_lr=learning_rate,
        total_steps=max(steps, 2),
        pct_start=warm_up,
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
            parts (pixels), which are averaged; accuracy is 100 times the mean over the samples. Or
            a `metrics.Metric`: a `MeanScore` on another scale, or a `TorchMetric`.
        distillation: `distillation(student_output, teacher_output)` gives a scalar; None for none.
        optimizer: `optimizer(model, learning_rate)`.
        scheduler: `scheduler(optimizer, learning_rate, steps)`, stepped after every batch.
        training: A training loop of the user's, in place of ours with `loss`, `distillation`,
            `optimizer` and `scheduler`. None for ours.
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
    metric: Metric | ScoreFunction = correct
    distillation: Distillation | None = logit_distillation
    optimizer: MakeOptimizer = sgd
    scheduler: MakeScheduler = one_cycle
    training: TrainingLoop | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    amp_dtype: torch.dtype | None = None

    @property
    def measure(self) -> Metric:
        """`metric` as a `metrics.Metric`."""
        return as_metric(self.metric)

    @property
    def scale(self) -> Scale:
        """The metric's name, its unit and which way is better."""
        return self.measure.scale

    @property
    def calibrating(self) -> Loader:
        """`calibration`, or `train` in its stead."""
        return self.train if self.calibration is None else self.calibration

    def calibration_batches(self, count: int | None) -> Iterator[Batch]:
        """The first `count` batches of `calibration`, on the device; the same in each call."""
        if self.calibration is not None and hasattr(self.calibration, "reseed"):
            self.calibration.reseed(0)
        return batches(_repeated(self.calibrating), self.device, count)

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


def _repeated(loader: Loader) -> Iterator[Batch]:
    """The batches of a loader, shuffled and augmented alike in every pass."""
    generator = getattr(loader, "generator", None)
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        generator = None
    numbers = OwnNumbers(0, generator)
    with numbers.used():
        source = iter(loader)
    while True:
        with numbers.used():
            try:
                batch = next(source)
            except StopIteration:
                return
        yield batch


def batches(loader: Iterable[Batch], device: torch.device, count: int | None) -> Iterator[Batch]:
    """The first `count` batches of `loader` (all for None), on `device`."""
    for batch in islice(loader, count):
        yield to_device(batch, device)


FUNCTIONS = ("forward", "loss", "metric", "distillation", "optimizer", "scheduler", "training")
"""The fields of a task that a user may give."""


def with_functions(task: Task, functions: Mapping[str, Any], where: str) -> Task:
    """The task with some of its functions replaced by the user's.

    With a loss of the user's own nothing is distilled, unless `distillation` is given too: what
    imitates logits need not suit another loss.

    Args:
        task: The task.
        functions: By their names in `FUNCTIONS`.
        where: What gave them, for messages.

    Raises:
        ConfigError: If one is unknown, or can't be called.
    """
    for name, value in functions.items():
        if name not in FUNCTIONS:
            raise ConfigError(f"{where} takes no {name!r}.{did_you_mean(name, FUNCTIONS)}")
        optional = value is None and name in ("distillation", "training")
        if not optional and not callable(value) and not isinstance(value, Metric):
            raise ConfigError(
                f"{where}: {name} must be a function{' or a metric' * (name == 'metric')}, got a "
                f"{type(value).__name__}."
            )
    given = dict(functions)
    if "loss" in given:
        given.setdefault("distillation", None)
    return replace(task, **given)


def by_cross_entropy(task: Task) -> bool:
    """Whether the loss is the default one, with or without label smoothing."""
    return getattr(task.loss, "func", task.loss) is cross_entropy


def classifies(task: Task) -> bool:
    """Whether the network's outputs are logits, as the default metric and the default loss have it:
    by one of them at least."""
    return task.metric is correct or by_cross_entropy(task)


def unfreeze(model: nn.Module) -> bool:
    """Make all parameters trainable where none is; whether that was so.

    Where some are, the others are frozen on purpose.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return False
    model.requires_grad_(True)
    return True


def check_outputs(task: Task) -> None:
    """Run the network and the metric on two samples, before any work is spent.

    Raises:
        ConfigError: If the data has more classes than the network has outputs, or the network
            can't take the data, or the metric not its outputs.
    """
    was_training = task.model.training
    if task.model.train(was_training) is not task.model:
        raise ConfigError(
            f"{type(task.model).__name__}.train() must return the network, as that of nn.Module "
            "does; add `return self` to it."
        )
    batch = next(iter(task.train), None)
    if batch is None:
        raise ConfigError("The training loader is empty; give at least one batch.")
    output, _ = answered(task, batch)
    outputs = output.shape[1] if isinstance(output, Tensor) and output.ndim > 1 else None
    if outputs is not None and len(task.classes) > outputs:
        raise ConfigError(
            f"The data has {len(task.classes)} classes, the network has {outputs} outputs; set "
            "model.arguments so that it has at least as many (num_classes)."
        )
    # The labels of training batches may be mixed, or smoothed.
    output, samples = answered(task, next(iter(task.val), batch))
    try:
        task.measure.join([task.measure.observe(output, samples)])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"The metric failed on two samples with {type(error).__name__}: {error}."
        ) from error


def answered(task: Task, batch: Batch) -> tuple[Any, Batch]:
    """What the network makes of two samples of a batch, in evaluation mode, and these samples.

    Raises:
        ConfigError: If it can't take them.
    """
    was_training = task.model.training
    samples = to_device(first_samples(batch, 2), next(task.model.parameters()).device)
    try:
        with torch.no_grad():
            return task.forward(task.model.eval(), samples), samples
    except Exception as error:
        shapes = ", ".join(str(tuple(value.shape[1:])) for value in tensors_in(batch))
        raise ConfigError(
            f"The network can't take this data, whose samples have shapes {shapes}: "
            f"{type(error).__name__}: {error}. "
            "Check model.arguments (in_channels), data.image_size and the forward pass."
        ) from error
    finally:
        task.model.train(was_training)
