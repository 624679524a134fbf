import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyNet, kept_in, make_images, make_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autocompress.config import FinetuneConfig
from autocompress.errors import TrainingDiverged
from autocompress.evaluation import evaluate
from autocompress.loaders import ArrayLoader
from autocompress.task import Loader, Task, check_outputs, logit_distillation
from autocompress.training import FitResult, OnStep, Recipe, fit

LENGTH = {"epochs": 2.5, "learning_rate": 0.1}
STEPS = 20


def untrained() -> Task:
    torch.manual_seed(0)
    return Task(TinyNet(), make_loader(256, 1), make_loader(128, 2), make_loader(128, 3))


def test_fit_learns() -> None:
    task = untrained()
    before = evaluate(task.model, task, task.val).score
    result = fit(task.model, task, epochs=4, learning_rate=0.1, seed=0)
    assert evaluate(task.model, task, task.val).score > before + 30
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


class DropoutNet(TinyNet):
    """`TinyNet` whose training draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.3, self.training))


def augmented() -> Loader:
    pixels, labels = make_images(256, 1)
    pixels = pixels.sub(pixels.min()).mul(20).byte()
    return ArrayLoader(pixels, labels, 32, [0.5], [0.2], "crop-flip", True)


def plain() -> Loader:
    return DataLoader(TensorDataset(*make_images(256, 1)), batch_size=32, shuffle=True)


LOADERS: dict[str, Callable[[], Loader]] = {"augmented": augmented, "plain": plain}


def dropping(loader: Loader) -> Task:
    torch.manual_seed(0)
    return Task(DropoutNet(), loader, make_loader(128, 2), make_loader(128, 3))


def stop_after(step: int) -> OnStep:
    """Stops the run as a worker does that is told to end."""

    def on_step(done: float, total: float, loss: float) -> None:
        if round(done / total * STEPS) == step:
            raise KeyboardInterrupt

    return on_step


def state_of(task: Task) -> dict[str, Tensor]:
    return deepcopy(task.model.state_dict())


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if steps took seconds."""
    monkeypatch.setattr("autocompress.training.LOOK_SECONDS", 0.0)


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("stops", [(1,), (3, 8, 9), (16, 19), (20,)])
def test_a_run_that_was_interrupted_ends_with_the_same_weights(
    name: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    whole = dropping(LOADERS[name]())
    expected = fit(whole.model, whole, **LENGTH, seed=3)
    for stop in stops:
        task = dropping(LOADERS[name]())
        with pytest.raises(KeyboardInterrupt):
            fit(
                *(task.model, task),
                **LENGTH,
                seed=3,
                on_step=stop_after(stop),
                checkpoint=kept_in(tmp_path),
            )
        torch.rand(7)  # another process's random numbers are elsewhere
    task = dropping(LOADERS[name]())
    result = fit(task.model, task, **LENGTH, seed=3, checkpoint=kept_in(tmp_path))
    found = state_of(task)
    assert all(torch.equal(found[key], value) for key, value in state_of(whole).items())
    assert (result.steps, result.loss) == (STEPS, expected.loss) and result.seconds > 0


@pytest.mark.usefixtures("every_step")
def test_another_process_goes_on_with_a_run(tmp_path: Path) -> None:
    whole = dropping(augmented())
    fit(whole.model, whole, **LENGTH, seed=3)
    stop, checkpoint = stop_after(13), kept_in(tmp_path)
    task = dropping(augmented())
    with pytest.raises(KeyboardInterrupt):
        fit(task.model, task, **LENGTH, seed=3, on_step=stop, checkpoint=checkpoint)
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=300)
    found = torch.load(tmp_path / "end.pt", weights_only=True)
    assert all(torch.equal(found[key], value) for key, value in state_of(whole).items())


def go_on(folder: Path) -> None:
    """What the other process does."""
    torch.set_num_threads(1)
    task = dropping(augmented())
    steps: list[float] = []
    fit(
        *(task.model, task),
        **LENGTH,
        seed=3,
        on_step=lambda done, total, loss: steps.append(done / total * STEPS),
        checkpoint=kept_in(folder),
    )
    assert round(steps[0]) == 14, steps
    torch.save(state_of(task), folder / "end.pt")


def test_a_loader_that_goes_its_own_way_is_no_obstacle(tmp_path: Path, every_step: None) -> None:
    """Its order can't be started anew, so other images are seen, but as many."""
    task = dropping(make_loader(256, 1, shuffle=True))
    with pytest.raises(KeyboardInterrupt):
        fit(
            *(task.model, task),
            **LENGTH,
            seed=3,
            on_step=stop_after(11),
            checkpoint=kept_in(tmp_path),
        )
    seen: list[float] = []
    result = fit(
        *(task.model, task),
        **LENGTH,
        seed=3,
        on_step=lambda done, total, loss: seen.append(done),
        checkpoint=kept_in(tmp_path),
    )
    assert result.steps == STEPS and len(seen) == 9
    assert evaluate(task.model, task, task.val).score > 60


@pytest.mark.usefixtures("every_step")
def test_rungs_that_were_passed_are_not_asked_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def run(task: Task, on_step: OnStep | None) -> FitResult:
        return fit(
            *(task.model, task),
            **LENGTH,
            seed=3,
            on_step=on_step,
            rungs=(0.25, 0.5, 0.75),
            hopeless=lambda rung: asked.append(rung) or rung == 3,
            checkpoint=kept_in(tmp_path),
        )

    with pytest.raises(KeyboardInterrupt):
        run(dropping(augmented()), stop_after(10))  # at the second one itself
    assert asked == [1, 2]
    result = run(dropping(augmented()), None)
    assert asked == [1, 2, 3] and result.stopped and result.steps == 15


def test_a_checkpoint_is_saved_when_it_is_due(tmp_path: Path) -> None:
    task = dropping(augmented())
    fit(task.model, task, **LENGTH, seed=3, checkpoint=kept_in(tmp_path))
    assert not (tmp_path / "kept.pt").exists()
    fit(task.model, task, **LENGTH, seed=3, checkpoint=kept_in(tmp_path, every=0.0))
    kept = torch.load(tmp_path / "kept.pt", weights_only=True)
    assert kept["state"]["step"] == STEPS


OTHERS: list[dict[str, Any]] = [
    {"seed": 4},
    {"learning_rate": 0.2},
    {"epochs": 2.0},
    {"model": TinyNet(8)},
    {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 4))},
    {"optimizer": lambda model, rate: torch.optim.Adam(model.parameters(), lr=rate)},
]


@pytest.mark.parametrize("change", OTHERS, ids=lambda change: next(iter(change)))
def test_another_runs_checkpoint_is_not_used(
    change: dict[str, Any], tmp_path: Path, every_step: None
) -> None:
    task = dropping(augmented())
    with pytest.raises(KeyboardInterrupt):
        fit(
            *(task.model, task),
            **LENGTH,
            seed=3,
            on_step=stop_after(9),
            checkpoint=kept_in(tmp_path),
        )
    settings = {**LENGTH, "seed": 3}
    settings.update({key: change[key] for key in change.keys() & settings.keys()})
    ends = []
    for checkpoint in (None, kept_in(tmp_path)):
        task = dropping(augmented())
        task.model = deepcopy(change.get("model", task.model))
        task.optimizer = change.get("optimizer", task.optimizer)
        fit(task.model, task, **settings, checkpoint=checkpoint)
        ends.append(state_of(task))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


class Peculiar(torch.optim.lr_scheduler.ConstantLR):
    """A scheduler whose state holds an object."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "home": Path()}


def test_a_state_that_cant_be_read_safely_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, every_step: None
) -> None:
    seen: list[float] = []
    for on_step in (stop_after(9), lambda done, total, loss: seen.append(done)):
        task = dropping(augmented())
        task.scheduler = lambda optimizer, rate, steps: Peculiar(optimizer)
        try:
            fit(
                *(task.model, task),
                **LENGTH,
                seed=3,
                on_step=on_step,
                checkpoint=kept_in(tmp_path),
            )
        except KeyboardInterrupt:
            assert (tmp_path / "kept.pt").exists()
    assert len(seen) == STEPS and "begins anew" in caplog.text


def test_progress_is_told_now_and_then_where_steps_are_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autocompress.training.LOOK_SECONDS", 1e9)
    task = dropping(augmented())
    told: list[int] = []
    fit(
        *(task.model, task),
        **LENGTH,
        seed=3,
        on_step=lambda done, total, loss: told.append(round(done / total * STEPS)),
        rungs=(0.7,),
        hopeless=lambda rung: False,
    )
    assert told == [1, 11, 14, 20]


if __name__ == "__main__":
    go_on(Path(sys.argv[1]))


def test_a_loop_of_the_users_own_trains_in_place_of_ours(task: Task) -> None:
    calls: list[tuple[Any, ...]] = []
    told: list[tuple[float, float, float]] = []

    def loop(
        model: nn.Module,
        *,
        epochs: float,
        learning_rate: float,
        seed: int,
        teacher: nn.Module | None,
        on_step: OnStep,
    ) -> None:
        assert model.training and teacher is not None and not teacher.training
        calls.append((epochs, learning_rate, seed, torch.initial_seed()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        on_step(epochs / 2, epochs, 3.0)
        on_step(epochs, epochs, 0.25)

    task.training = loop
    teacher = deepcopy(task.model).train()
    result = fit(
        task.model,
        task,
        epochs=1.5,
        learning_rate=0.1,
        seed=3,
        teacher=teacher,
        on_step=lambda done, total, loss: told.append((done, total, loss)),
    )
    assert calls == [(1.5, 0.1, 3, 3)]
    assert all(bool((p == 0.5).all()) for p in task.model.parameters())
    assert told == [(0.75, 1.5, 3.0), (1.5, 1.5, 0.25)]
    assert result.loss == 0.25 and result.steps == round(1.5 * len(task.train))
    assert not task.model.training

    def stop(done: float, total: float, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(task.model, task, epochs=1, learning_rate=0.1, seed=0, teacher=teacher, on_step=stop)
