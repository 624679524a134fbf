"""Metrics of any kind, and the intervals of the drops in them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import TinyNet
from torch import Tensor
from torchmetrics import JaccardIndex, MeanAbsoluteError, MeanMetric, MeanSquaredError, R2Score
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, MulticlassAUROC
from torchmetrics.detection import MeanAveragePrecision

from autocompress.errors import AutocompressError, ConfigError
from autocompress.evaluation import Evaluation, drop_bound, evaluate, metric_drop, paired_drop
from autocompress.metrics import MeanScore, Metric, TorchMetric, as_metric, check_value
from autocompress.scale import Scale
from autocompress.task import Task, check_outputs, correct

CLASSES = 4
MIOU = TorchMetric(
    JaccardIndex("multiclass", num_classes=CLASSES),
    pairs=lambda output, batch: (output.argmax(1), batch[1]),
    name="mIoU",
)
RMSE = TorchMetric(MeanSquaredError(squared=False), name="RMSE", unit="px")


def masks(seed: int, count: int = 12) -> tuple[Tensor, Tensor]:
    """Logits and labels of images of 6 x 6 pixels."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, CLASSES, 6, 6, generator=generator),
        torch.randint(CLASSES, (count, 6, 6), generator=generator),
    )


def seen(metric: Metric, *batches: tuple[Tensor, Tensor]) -> Evaluation:
    records = metric.join([metric.observe(output, (output, labels)) for output, labels in batches])
    return Evaluation(records, metric, sum(len(output) for output, _ in batches))


def test_a_torch_metric_is_that_of_all_samples_together() -> None:
    # A mean of the batches' values would be another number.
    one, two = masks(0, 12), masks(1, 5)
    logits, labels = (torch.cat(pair) for pair in zip(one, two, strict=True))
    expected = JaccardIndex("multiclass", num_classes=CLASSES)(logits.argmax(1), labels)
    found = seen(MIOU, one, two)
    assert found.score == pytest.approx(float(expected))
    assert found.size == 17 and MIOU.scale == Scale("mIoU", "", True)
    assert not found.score == pytest.approx((seen(MIOU, one).score + seen(MIOU, two).score) / 2)


@pytest.mark.parametrize(
    "metric", [MeanSquaredError(squared=False), R2Score(), MeanAbsoluteError()], ids=str
)
def test_states_that_can_not_be_merged_come_to_the_same(metric: Any) -> None:
    merged = TorchMetric(metric, name="it", higher_is_better=False)
    kept = TorchMetric(metric, name="it", higher_is_better=False)
    kept._merged = False
    torch.manual_seed(0)
    batches = [(torch.randn(9), torch.randn(9)) for _ in range(3)]
    one, two = seen(merged, *batches), seen(kept, *batches)
    assert merged._merged and one.score == pytest.approx(two.score, rel=1e-5)
    assert one.without == pytest.approx(two.without, rel=1e-4)


def test_logits_of_part_of_a_batch_are_no_probabilities() -> None:
    """torchmetrics takes values for logits if one of those that it sees is beyond 0 and 1."""
    torch.manual_seed(0)
    labels = torch.randint(2, (400,))
    logits = torch.randn(400) + 0.5 * labels
    for metric in (BinaryAUROC(), BinaryAccuracy()):
        parts = list(zip(logits.split(8), labels.split(8), strict=True))
        for part in parts:
            metric.update(*part)
        own = deepcopy(metric)
        assert seen(TorchMetric(own), *parts).score == pytest.approx(float(metric.compute()))
    classes = torch.randint(CLASSES, (60,))
    scores = 0.4 * torch.randn(60, CLASSES)
    auroc = MulticlassAUROC(CLASSES)
    auroc.update(scores, classes)
    assert seen(TorchMetric(auroc), (scores, classes)).score == pytest.approx(
        float(auroc.compute())
    )


def test_means_of_batches_are_not_merged() -> None:
    # torchmetrics merges such states wrongly.
    class Doubtful(MeanMetric):
        def __init__(self) -> None:
            super().__init__()
            self._reductions["mean_value"] = torch.mean

    assert not TorchMetric(Doubtful(), higher_is_better=True)._merged


def test_boxes_of_each_image_are_kept_for_map() -> None:
    metric = TorchMetric(
        MeanAveragePrecision(backend="faster_coco_eval"),
        pairs=lambda output, batch: (list(output), batch[1]),
        key="map",
    )
    box = torch.tensor([[2.0, 2.0, 10.0, 10.0]])
    targets = [{"boxes": box + i, "labels": torch.tensor([i % 2])} for i in range(6)]
    right = [{**target, "scores": torch.tensor([0.9])} for target in targets]
    wrong = [*right[:5], {**right[5], "boxes": box + 40}]
    images = torch.zeros(6, 1, 64, 64)
    parts = [metric.observe(found, (images, targets)) for found in (right, wrong)]
    best, worse = (Evaluation(metric.join([part]), metric, 6) for part in parts)
    assert best.score == pytest.approx(1.0)
    expected = MeanAveragePrecision(backend="faster_coco_eval")
    expected.update(wrong, targets)
    assert worse.score == pytest.approx(float(expected.compute()["map"]))
    assert metric_drop(best, worse) > 0
    with pytest.raises(
        ConfigError, match="has no value 'mAP': it came to values by the names map, map_50"
    ):
        other = TorchMetric(MeanAveragePrecision(backend="faster_coco_eval"), key="mAP")
        other.value(best.records)


def test_a_lower_error_is_no_drop() -> None:
    labels = torch.zeros(40)
    good, bad = (seen(RMSE, (labels + error, labels)) for error in (1.0, 1.5))
    assert metric_drop(good, bad) == pytest.approx(0.5)
    assert metric_drop(bad, good) == pytest.approx(-0.5)
    mean = MeanScore(
        lambda output, batch: (output - batch[1]).abs(),
        Scale("error", "px", higher_is_better=False),
        factor=1.0,
        limits=None,
    )
    good, bad = (seen(mean, (labels + error, labels)) for error in (1.0, 1.5))
    assert bad.score == pytest.approx(1.5) and metric_drop(good, bad) == pytest.approx(0.5)
    assert drop_bound(good, bad, 0.95) == pytest.approx(0.5)


def test_fewer_samples_are_compared_with_the_first_ones() -> None:
    batches = [masks(seed, 8) for seed in range(3)]
    whole, first = seen(MIOU, *batches), seen(MIOU, batches[0])
    assert metric_drop(whole, first) == 0.0
    assert whole.first(len(first.records)).score == pytest.approx(first.score)


def test_the_interval_holds_as_often_as_it_says() -> None:
    """RMSE of two networks, of which the second errs by 10 % more, on 200 samples: 200 times."""
    torch.manual_seed(1)
    truth, covered, width = 0.1, 0, 0.0
    repeats = 200
    for _ in range(repeats):
        noise, own = torch.randn(200), 0.3 * torch.randn(200)
        labels = torch.zeros(200)
        # Errors of both go together, as those of a network and its compressed form do.
        before = seen(RMSE, (noise, labels))
        scale = 1.1 / (1 + 0.3**2) ** 0.5
        after = seen(RMSE, (scale * (noise + own), labels))
        bound = drop_bound(before, after, 0.9)
        covered += bound >= truth
        width += (bound - metric_drop(before, after)) / repeats
    assert 0.84 <= covered / repeats <= 0.95
    assert width > 0


def test_one_record_tells_no_interval() -> None:
    one = seen(RMSE, (torch.ones(1), torch.zeros(1)))
    assert drop_bound(one, one, 0.95) == float("inf")
    assert paired_drop(one, one)[0] == 0.0


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda: TorchMetric(correct), "function has no reset"),
        (lambda: TorchMetric(MeanMetric()), "doesn't say whether more is better"),
    ],
)
def test_what_is_no_metric_is_refused(metric: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        metric()


def test_one_number_is_asked_for() -> None:
    metric = TorchMetric(JaccardIndex("multiclass", num_classes=CLASSES, average=None), name="IoU")
    output, labels = masks(0)
    with pytest.raises(ConfigError, match=r"IoU must come to one number, got a tensor of shape"):
        seen(metric, (output, labels)).score  # noqa: B018


def test_pairs_are_two(task: Task) -> None:
    task.metric = TorchMetric(
        MeanSquaredError(),
        pairs=lambda output, batch: output,  # type: ignore[arg-type,return-value]
    )
    with pytest.raises(ConfigError, match="must return predictions and targets, got Tensor"):
        check_outputs(task)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        # Of pixels in a row only the first would be seen, as many as there are images.
        (lambda output, batch: (output.argmax(1).flatten(), batch[1]), r"predictions .* \(432,\)"),
        (lambda output, batch: (output.argmax(1), batch[1].flatten()), r"targets .* \(432,\)"),
        (lambda output, batch: (output.argmax(1), [{}] * 3), "targets .* a list of 3"),
        (lambda output, batch: (output.mean(), batch[1]), r"predictions .* shape \(\)"),
    ],
)
def test_pairs_have_a_place_for_each_sample(pairs: Any, message: str) -> None:
    metric = TorchMetric(JaccardIndex("multiclass", num_classes=CLASSES), pairs=pairs)
    with pytest.raises(ConfigError, match=message):
        metric.observe(masks(0)[0], masks(0))


@pytest.mark.parametrize("metric", [MeanSquaredError(), MeanSquaredError])
def test_a_metric_of_torchmetrics_is_to_be_wrapped(metric: Any) -> None:
    with pytest.raises(ConfigError, match=r"give autocompress.TorchMetric\(MeanSquaredError\("):
        as_metric(metric)


def test_fewer_outputs_than_labels_are_no_accuracy() -> None:
    with pytest.raises(ConfigError, match="gave 1 outputs for 4 labels"):
        correct(torch.eye(4)[:1], (None, torch.zeros(4)))


def test_a_score_that_is_no_number_is_named(task: Task) -> None:
    def broken(output: Tensor, batch: Any) -> Tensor:
        scores = torch.ones(len(output))
        scores[1] = float("nan")
        return scores

    task.metric = broken
    with pytest.raises(ConfigError, match="got nan for sample 1"):
        check_outputs(task)
    with pytest.raises(ConfigError, match="got nan for sample 1 and 1 more like it"):
        evaluate(task.model, task, task.val, 2)


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"The metric \(RMSE\) of the baseline is nan"):
        check_value(RMSE, float("nan"), "the baseline")
    broken = seen(RMSE, (torch.full((20,), float("nan")), torch.zeros(20)))
    with pytest.raises(AutocompressError, match="RMSE"):
        metric_drop(seen(RMSE, (torch.zeros(20), torch.zeros(20))), broken)


def test_a_function_gives_percent() -> None:
    metric = as_metric(correct)
    output, labels = torch.eye(4)[[0, 1, 2, 3, 0]], torch.tensor([0, 1, 2, 0, 0])
    assert seen(metric, (output, labels)).score == pytest.approx(80.0)
    assert as_metric(MIOU) is MIOU and isinstance(TinyNet(), torch.nn.Module)


def test_scales_say_differences_in_their_unit() -> None:
    assert Scale().difference(0.4267) == "0.43 points" and Scale().value(91.2) == "91.20 %"
    assert Scale().drop_name == "accuracy drop (points)" and Scale().title == "Accuracy"
    error = Scale("RMSE", "px", higher_is_better=False)
    assert error.difference(0.02134) == "0.0213 px" and error.value(1.5) == "1.5 px"
    assert Scale("mIoU", "").drop_name == "mIoU drop" and Scale("mIoU", "").title == "mIoU"
    assert Scale.from_dict(error.to_dict()) == error and Scale.from_dict(None) == Scale()
