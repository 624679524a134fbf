from copy import deepcopy

import pytest
import torch
from conftest import TinyNet, make_loader
from torch import nn

from autocompress.config import FinetuneConfig
from autocompress.errors import TrainingDiverged
from autocompress.evaluation import evaluate
from autocompress.task import Task, check_outputs, logit_distillation
from autocompress.training import Recipe, fit


def untrained() -> Task:
    torch.manual_seed(0)
    return Task(TinyNet(), make_loader(256, 1), make_loader(128, 2), make_loader(128, 3))


def test_fit_learns() -> None:
    task = untrained()
    before = evaluate(task.model, task, task.val).accuracy
    result = fit(task.model, task, epochs=4, learning_rate=0.1, seed=0)
    assert evaluate(task.model, task, task.val).accuracy > before + 30
    assert result.steps == 4 * 8 and result.images_per_second > 0


def test_fractions_of_an_epoch_count_batches() -> None:
    task = untrained()
    assert fit(task.model, task, epochs=0.5, learning_rate=0.1, seed=0).steps == 4
    assert fit(task.model, task, epochs=0.0, learning_rate=0.1, seed=0).steps == 0


def test_same_seed_same_weights() -> None:
    states = []
    for seed in (0, 0):
        task = untrained()
        fit(task.model, task, epochs=1, learning_rate=0.1, seed=seed)
        states.append(task.model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_diverging_run_is_an_error_with_a_cure() -> None:
    task = untrained()
    task.loss = lambda output, batch: output.sum() * float("inf")
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        fit(task.model, task, epochs=1, learning_rate=0.1, seed=0)


def test_distillation_pulls_towards_the_teacher(task: Task) -> None:
    teacher = deepcopy(task.model)
    images = next(iter(task.val))[0]

    def distance(share: float) -> float:
        torch.manual_seed(1)
        student = TinyNet()
        fit(
            student,
            task,
            epochs=2,
            learning_rate=0.05,
            seed=0,
            teacher=teacher,
            distillation=share,
        )
        with torch.no_grad():
            return float(logit_distillation(student(images), teacher(images)))

    assert distance(1.0) < distance(0.0)


def test_weights_end_in_plain_memory_order_whatever_their_form(task: Task) -> None:
    """Latencies and saved files don't depend on whether a network was just trained."""
    task.model.add_module("volume", nn.Conv3d(1, 1, 3))
    fit(task.model, task, epochs=0.2, learning_rate=0.01, seed=0)
    assert all(value.is_contiguous() for value in task.model.parameters())


def test_a_network_may_keep_tensors_from_one_pass_to_the_next(task: Task) -> None:
    class Cached(TinyNet):
        scale: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.scale is None:
                self.scale = torch.ones(1)
            return super().forward(x * self.scale)

    task.model = Cached()
    check_outputs(task)
    evaluate(task.model, task, task.val)
    assert fit(deepcopy(task.model), task, epochs=0.2, learning_rate=0.01, seed=0).steps == 3


def test_the_teacher_is_not_trained(task: Task) -> None:
    teacher = deepcopy(task.model)
    before = deepcopy(teacher.state_dict())
    fit(
        deepcopy(task.model),
        task,
        epochs=1,
        learning_rate=0.1,
        seed=0,
        teacher=teacher,
        distillation=0.5,
    )
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_optimizer_scheduler_loss_and_forward_are_replaceable() -> None:
    task = untrained()
    called: set[str] = set()

    def optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        called.add("optimizer")
        return torch.optim.AdamW(model.parameters(), lr=learning_rate)

    def scheduler(
        optimizer: torch.optim.Optimizer, learning_rate: float, steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        called.add("scheduler")
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        called.add("forward")
        output: torch.Tensor = model(batch["image"])
        return output

    def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        called.add("loss")
        return torch.nn.functional.cross_entropy(output, batch["label"])

    task.train = [{"image": x, "label": y} for x, y in task.train]  # type: ignore[assignment]
    task.optimizer, task.scheduler, task.forward, task.loss = optimizer, scheduler, forward, loss
    fit(task.model, task, epochs=1, learning_rate=1e-3, seed=0)
    assert called == {"optimizer", "scheduler", "forward", "loss"}


def test_a_run_ends_at_the_rung_that_says_so(task: Task) -> None:
    asked: list[int] = []

    def hopeless(rung: int) -> bool:
        asked.append(rung)
        assert task.model.training
        return rung == 2

    settings = {"epochs": 1.0, "learning_rate": 0.01, "seed": 0}
    result = fit(task.model, task, **settings, rungs=(0.25, 0.5, 0.75), hopeless=hopeless)
    assert asked == [1, 2] and result.stopped
    assert result.steps == len(task.train) // 2 and not task.model.training
    assert not fit(task.model, task, **settings, rungs=(0.5,), hopeless=lambda rung: False).stopped


def test_batch_norm_ends_with_statistics_of_the_last_weights(task: Task) -> None:
    """After a short fast run the running means are those of networks that no longer exist."""
    fit(task.model, task, epochs=0.25, learning_rate=0.3, seed=0)
    seen: list[torch.Tensor] = []
    hook = task.model.bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        for images, _ in task.train:
            task.model(images)
    hook.remove()
    true = torch.cat(seen).mean((0, 2, 3))
    kept = task.model.get_buffer("bn1.running_mean")
    torch.testing.assert_close(kept, true, atol=0.02, rtol=0.02)


def test_what_a_study_file_leaves_open_follows_from_length_and_rate() -> None:
    found = Recipe.from_config(FinetuneConfig(gate=60.0), epochs=0.5, learning_rate=0.03)
    assert (found.epochs, found.learning_rate, found.gate) == (0.5, 0.03, 60.0)
    assert (found.final_epochs, found.final_learning_rate) == (5.0, 0.06)
    short = FinetuneConfig(epochs=2.0, learning_rate=0.01, final_epochs=7.0)
    assert Recipe.from_config(short, epochs=0.5, learning_rate=0.03).final_learning_rate == 0.01
    all_given = FinetuneConfig(
        epochs=1.0, learning_rate=0.1, final_epochs=0.0, final_learning_rate=0.2
    )
    assert Recipe.from_config(all_given, 0.5, 0.03) == Recipe(1.0, 0.0, 0.1, 0.2, 0.5, 50.0)


@pytest.mark.parametrize(
    ("conv", "last"),
    [
        (nn.Conv2d(2, 24, 1, stride=2), False),  # PyTorch 2.14 crashes on it with channels last
        (nn.Conv2d(2, 24, 1), True),
        (nn.Conv2d(2, 24, 3, stride=2, padding=1), True),
        (nn.Conv2d(16, 24, 1, stride=2), True),
    ],
)
def test_kernels_are_channels_last_where_that_is_safe(conv: nn.Conv2d, last: bool) -> None:
    # A kernel of one place has either layout, so another one is looked at.
    next_one = nn.Conv2d(24, 8, 3)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    model = nn.Sequential(conv, next_one, *pool)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, conv.in_channels, 14, 14, generator=generator)
    loader = [(images, torch.arange(64) % 4)] * 4
    task = Task(model, loader, loader, loader)  # type: ignore[arg-type]
    seen: list[bool] = []
    next_one.register_forward_pre_hook(
        lambda module, _: seen.append(module.weight.is_contiguous())  # type: ignore[union-attr, operator]
    )
    result = fit(model, task, epochs=2, learning_rate=0.01, seed=0)
    assert result.steps == 8 and seen == [not last] * 8
