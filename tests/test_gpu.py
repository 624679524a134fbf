"""What only a CUDA device can show: `pytest -m gpu`."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import TinyNet, kept_in, make_images, make_loader
from test_distributed import assert_equal, run_cases
from torch import Tensor, nn

import autocompress
from autocompress.batch import Batch
from autocompress.capture import WARM_UP, CapturedGradient, Gradient
from autocompress.evaluation import evaluate
from autocompress.layers import inspect_layers
from autocompress.loaders import ArrayLoader
from autocompress.observation import observe_layers
from autocompress.profiler import measure_latency
from autocompress.sensitivity import build_table
from autocompress.sources import pick_device
from autocompress.task import Task
from autocompress.training import fastest_precision, fit
from autocompress.transforms import TRANSFORMS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def gpu() -> torch.device:
    return pick_device("auto")


def on_gpu(task: Task, gpu: torch.device) -> Task:
    task.device = gpu
    task.model.to(gpu)
    return task


def test_training_on_the_gpu_learns_in_both_precisions(gpu: torch.device) -> None:
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        loaders = (make_loader(512, 1), make_loader(256, 2), make_loader(256, 3))
        task = Task(TinyNet(), *loaders, device=gpu, amp_dtype=dtype)
        fit(task.model, task, epochs=6, learning_rate=0.1, seed=0)
        assert next(task.model.parameters()).device.type == "cuda"
        assert evaluate(task.model, task, task.val).score > 80
    assert fastest_precision(task) in (None, torch.bfloat16)


def gradients_of(model: nn.Module, task: Task) -> Gradient:
    def gradient(batch: Batch) -> Tensor:
        loss = task.loss(model(batch[0]), batch)
        loss.backward()
        return loss.detach()

    return gradient


def test_captured_steps_give_the_gradients_of_ordinary_ones(task: Task, gpu: torch.device) -> None:
    model = on_gpu(task, gpu).model.train()
    other = deepcopy(model)
    captured = CapturedGradient(gradients_of(model, task), list(model.parameters()))
    ordinary = gradients_of(other, task)
    for step, batch in enumerate(task.train):
        if step == WARM_UP + 2:
            batch = [part[:7] for part in batch]  # of another shape
        batch = [part.to(gpu) for part in batch]
        other.zero_grad()
        assert torch.allclose(captured(batch), ordinary(batch), rtol=1e-3, atol=1e-4)
        assert captured.captured == (step >= WARM_UP)
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            assert mine.grad is not None and its.grad is not None
            assert torch.allclose(mine.grad, its.grad, rtol=2e-2, atol=1e-3)
            with torch.no_grad():
                mine -= 0.05 * mine.grad
                its.copy_(mine)
    for mine, its in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.allclose(mine.float(), its.float(), rtol=1e-2, atol=1e-3)


def test_dropout_changes_from_one_captured_step_to_the_next(gpu: torch.device) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4)).to(gpu).train()
    images, labels = (part.to(gpu) for part in make_images(32, 0))
    task = Task(model, [], [], [])
    captured = CapturedGradient(gradients_of(model, task), list(model.parameters()))
    losses = [float(captured((images, labels))) for _ in range(12)]
    assert captured.captured and len(set(losses[WARM_UP:])) == len(losses) - WARM_UP


def test_a_network_that_reads_values_back_is_trained_as_usual(gpu: torch.device) -> None:
    class Reading(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if float(x.mean()) > 1e9 else 1.0)

    torch.manual_seed(0)
    loaders = (make_loader(512, 1), make_loader(256, 2), make_loader(256, 3))
    task = Task(Reading(), *loaders, device=gpu)
    fit(task.model, task, epochs=6, learning_rate=0.1, seed=0)
    assert evaluate(task.model, task, task.val).score > 80


def test_a_run_on_the_gpu_goes_on_where_it_was_interrupted(
    gpu: torch.device, tmp_path: Path
) -> None:
    def fresh() -> Task:
        torch.manual_seed(0)
        loaders = (make_loader(512, 1), make_loader(256, 2), make_loader(256, 3))
        return Task(TinyNet(), *loaders, device=gpu)

    told: list[int] = []

    def on_step(done: float, total: float, loss: float) -> None:
        told.append(round(done / total * 96))
        if told[-1] == 41:
            raise KeyboardInterrupt

    start, whole, task = fresh(), fresh(), fresh()
    fit(whole.model, whole, epochs=6, learning_rate=0.05, seed=0)
    with pytest.raises(KeyboardInterrupt):
        fit(
            *(task.model, task),
            epochs=6,
            learning_rate=0.05,
            seed=0,
            on_step=on_step,
            # So that there is a look after step 41, however fast the steps are.
            rungs=(41 / 96,),
            hopeless=lambda rung: False,
            checkpoint=kept_in(tmp_path),
        )
    task = fresh()
    told.clear()
    result = fit(
        *(task.model, task),
        epochs=6,
        learning_rate=0.05,
        seed=0,
        on_step=on_step,
        checkpoint=kept_in(tmp_path),
    )
    assert told[0] == 42 and result.steps == 96
    assert evaluate(task.model, task, task.val).score > 80
    flat = [
        nn.utils.parameters_to_vector(one.model.to(gpu).parameters())
        for one in (start, whole, task)
    ]
    assert (flat[2] - flat[1]).norm() < 0.1 * (flat[1] - flat[0]).norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_one_network(tmp_path: Path) -> None:
    found = run_cases(tmp_path, "cuda")
    for name in ("averages", "learns", "ends_at_a_rung", "goes_on"):
        assert_equal(found[name][0]["state"], found[name][1]["state"])
    assert found["learns"][0]["accuracy"] > 80
    assert found["stops"][1]["ended"].startswith("KeyboardInterrupt")


def test_fine_tuning_again_and_again_takes_no_more_memory(task: Task, gpu: torch.device) -> None:
    used = []
    for seed in range(6):
        student = deepcopy(on_gpu(task, gpu).model)
        fit(student, task, epochs=2, learning_rate=0.01, seed=seed, teacher=task.model)
        del student
        used.append(torch.cuda.memory_reserved())
    # A graph and the workspaces for it take some 70 MiB.
    assert used[-1] - used[1] < 16 * 2**20, used


def test_scores_are_those_of_the_cpu(task: Task, gpu: torch.device) -> None:
    here = evaluate(task.model, task, task.val).records
    there = evaluate(on_gpu(task, gpu).model, task, task.val).records
    assert float((here != there).float().mean()) < 0.01


def test_every_choice_of_the_layer_table_is_that_of_the_cpu(task: Task, gpu: torch.device) -> None:
    tables = []
    for device in (torch.device("cpu"), gpu):
        own = deepcopy(task)
        own = on_gpu(own, device)
        layers, _ = inspect_layers(own.model, own.example())
        seen = observe_layers(own.model, own, layers)
        cache = seen.factor_cache(own.model)
        tables.append(build_table(own.model, layers, cache, seen, list(TRANSFORMS)))
    for name, rows in tables[0].choices.items():
        others = tables[1].choices[name]
        assert [row.transform for row in rows] == [row.transform for row in others]
        for row, other in zip(rows, others, strict=True):
            assert other.error == pytest.approx(row.error, rel=0.05, abs=0.02)


@pytest.mark.parametrize("limited", [False, True])
def test_images_wait_on_the_gpu_and_are_served_as_on_the_cpu(
    limited: bool, gpu: torch.device
) -> None:
    images, labels = make_images(64, 0)
    pixels = images.sub(images.min()).mul(20).byte()
    there = ArrayLoader(pixels, labels, 16, [0.5], [0.2], "crop-flip", True, 3, device=gpu)
    here = ArrayLoader(pixels, labels, 16, [0.5], [0.2], "crop-flip", True, 3)
    if limited:
        for loader in (here, there):
            loader.limit_views(2)
    for (a, label_a), (b, label_b) in zip(here, there, strict=True):
        assert b.device.type == label_b.device.type == "cuda"
        assert torch.allclose(a, b.cpu(), atol=1e-5) and torch.equal(label_a, label_b.cpu())


def test_latency_waits_for_the_gpu(gpu: torch.device) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(8192, 8192) for _ in range(24)]).to(gpu)
    found = measure_latency(model, (torch.randn(1, 8192),), seconds=0.1)
    # 6.4 GB of weights at 5 TB/s; the launches alone would take 0.2 ms.
    assert found.device.startswith("cuda") and found.median_ms > 1.0


def test_a_whole_study_on_the_gpu_ends_with_files_for_the_cpu(
    task: Task, gpu: torch.device, tmp_path: Path
) -> None:
    outcome = autocompress.compress(
        task.model,
        task.train,
        task.test,
        val=task.val,
        delta=10.0,
        trials=4,
        annealing_trials=2,
        out=tmp_path / "study",
        settings={
            "confidence": 0.5,
            "finetune.epochs": 1,
            "finetune.final_epochs": 1,
            "finetune.learning_rate": 0.01,
            "run.device": "cuda",
        },
    )
    assert outcome.model is not None
    assert outcome.summary["device"].startswith("cuda")
    best = next((tmp_path / "study").rglob("best"))
    again = autocompress.load(best, model=TinyNet())
    images = next(iter(task.test))[0]
    with torch.no_grad():
        assert torch.allclose(again(images), outcome.model.cpu()(images), atol=1e-4)
