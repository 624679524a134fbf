import pytest
import torch
from conftest import make_loader
from torch import nn

from autocompress.errors import AutocompressError
from autocompress.evaluation import (
    Evaluation,
    drop_bound,
    evaluate,
    metric_drop,
    paired_drop,
    recalibrate,
)
from autocompress.loaders import ArrayLoader, calibration_loader
from autocompress.task import Task


def test_a_drop_of_exactly_delta_is_not_above_it() -> None:
    for right in range(100, 1001, 7):
        before, after = torch.zeros(1000), torch.zeros(1000)
        before[:right] = 1.0
        after[: right - 10] = 1.0
        assert metric_drop(Evaluation(before), Evaluation(after)) == 1.0


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(AutocompressError, match="the drop is nan"):
        metric_drop(Evaluation(torch.ones(2)), Evaluation(torch.tensor([1.0, float("nan")])))


def test_accuracy_is_weighted_by_samples_not_batches(task: Task) -> None:
    # 40 samples in batches of 32: a mean over batches would weigh the last eight too much.
    loader = make_loader(40, 5)
    images, labels = loader.dataset.tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = 100 * (task.model(images).argmax(1) == labels).double().mean()
    assert evaluate(task.model, task, loader).score == pytest.approx(float(expected))


def test_evaluate_restores_the_mode_and_honours_the_batch_count(task: Task) -> None:
    task.model.train()
    assert len(evaluate(task.model, task, task.val, 2).records) == 64
    assert task.model.training


def test_a_metric_of_the_users_own_is_used(task: Task) -> None:
    task.metric = lambda output, batch: torch.full((len(batch[1]),), 0.25)
    assert evaluate(task.model, task, task.val).score == pytest.approx(25.0)


def test_recalibration_gives_the_statistics_of_the_data(task: Task) -> None:
    task.model.bn1.running_mean.fill_(50.0)  # type: ignore[union-attr, operator]
    broken = evaluate(task.model, task, task.val).score
    task.calibration = make_loader(512, 1)
    recalibrate(task.model, task, 16)
    images = task.calibration.dataset.tensors[0]  # type: ignore[attr-defined]
    with torch.no_grad():
        mean = task.model.stem(images).mean((0, 2, 3))  # type: ignore[operator]
    torch.testing.assert_close(task.model.bn1.running_mean, mean, atol=1e-4, rtol=1e-3)
    assert evaluate(task.model, task, task.val).score > broken + 20
    assert task.model.bn1.momentum == 0.1 and not task.model.training


def test_recalibration_sees_the_borders_that_training_sees(task: Task) -> None:
    white = torch.full((64, 1, 8, 8), 255, dtype=torch.uint8)
    labels = torch.arange(64) % 4
    task.train = ArrayLoader(white, labels, 32, [0.0], [1.0], augment="crop", shuffle=True)
    task.calibration = calibration_loader(task.train)
    task.model.bn1 = nn.BatchNorm2d(16)
    recalibrate(task.model, task, 2)
    once = task.model.bn1.running_mean.clone()  # type: ignore[union-attr, operator]
    recalibrate(task.model, task, 2)
    assert torch.equal(once, task.model.bn1.running_mean)  # type: ignore[arg-type]
    task.train.reseed(0)
    with torch.no_grad():
        seen = torch.cat([task.model.stem(images) for images, _ in task.train])  # type: ignore[operator]
        whole = task.model.stem(torch.ones(64, 1, 8, 8))  # type: ignore[operator]
    torch.testing.assert_close(once, seen.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(once, whole.mean((0, 2, 3)), atol=1e-3)


def test_paired_drop_counts_each_image_once() -> None:
    before = Evaluation(torch.tensor([1.0] * 90 + [0.0] * 10))
    after = Evaluation(torch.tensor([1.0] * 80 + [0.0] * 10 + [1.0] * 4 + [0.0] * 6))
    drop, low, high = paired_drop(before, after)
    assert drop == pytest.approx(6.0)
    # Agresti and Min: 10 lost, 4 won, n = 100.
    centre, spread = 6 / 102, (15 - 36 / 102) ** 0.5 / 102
    assert low == pytest.approx(100 * (centre - 1.959964 * spread))
    assert high == pytest.approx(100 * (centre + 1.959964 * spread))
    assert drop_bound(before, after, 0.95) == pytest.approx(100 * (centre + 1.644854 * spread))
    assert drop_bound(before, after, 0.5) == pytest.approx(6.0)


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Of 2,000 pairs of networks whose true drop is 2 points, about 95 % have a bound above it."""
    generator = torch.Generator().manual_seed(0)
    kept = 0
    for _ in range(2000):
        lost, won = (
            torch.rand(2, 400, generator=generator) < torch.tensor([[0.05], [0.03]])
        ).bool()
        before = Evaluation((~won).float())
        after = Evaluation((~(lost & ~won)).float())
        kept += drop_bound(before, after, 0.95) >= 100 * (0.05 * 0.97 - 0.03)
    assert 0.93 <= kept / 2000 <= 0.98


def test_the_bound_is_of_the_first_samples_where_there_are_fewer() -> None:
    before = Evaluation(torch.tensor([1.0] * 50 + [0.0] * 50))
    assert drop_bound(before, Evaluation(torch.ones(50)), 0.5) == 0.0


def test_equal_networks_still_have_an_interval() -> None:
    scores = Evaluation(torch.ones(50))
    drop, low, high = paired_drop(scores, scores)
    assert drop == 0 and low < 0 < high


def test_paired_drop_refuses_unpaired_scores() -> None:
    with pytest.raises(ValueError, match="got 3 and 2"):
        paired_drop(Evaluation(torch.ones(3)), Evaluation(torch.ones(2)))
