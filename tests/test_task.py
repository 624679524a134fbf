from collections import namedtuple
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import TinyNet, make_images, make_loader
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from autocompress.batch import first_samples, part_of, samples_in, split_batch, to_device
from autocompress.errors import ConfigError
from autocompress.metrics import MeanScore
from autocompress.task import (
    Task,
    check_outputs,
    classifies,
    correct,
    cross_entropy,
    logit_distillation,
    unfreeze,
    with_functions,
)


def test_example_is_one_image_as_the_network_gets_it(task: Task) -> None:
    (images,) = task.example()
    assert images.shape == (1, 1, 8, 8)
    torch.testing.assert_close(images, next(iter(task.val))[0][:1])


def test_example_follows_a_custom_forward_pass(task: Task) -> None:
    task.val = [{"pixels": x, "y": y} for x, y in task.val]  # type: ignore[assignment]
    task.forward = lambda model, batch: model(2 * batch["pixels"])
    (images,) = task.example()
    torch.testing.assert_close(images, 2 * next(iter(task.val))["pixels"][:1])


def test_images_go_over_batches(task: Task) -> None:
    assert len(task.images(70)[0]) == 70


def test_keywords_can_not_be_traced(task: Task) -> None:
    task.forward = lambda model, batch: model(x=batch[0])
    with pytest.raises(ConfigError, match="positional tensors only"):
        task.example()


def test_more_classes_than_outputs_is_refused(task: Task) -> None:
    task.classes = tuple("abcdefg")
    with pytest.raises(ConfigError, match="7 classes, the network has 4 outputs"):
        check_outputs(task)


def test_images_of_the_wrong_depth_are_refused() -> None:
    loader = [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))]
    task = Task(TinyNet(), loader, loader, make_loader(8, 0))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"\(3, 8, 8\)"):
        check_outputs(task)


def test_a_network_must_return_itself_from_train(task: Task) -> None:
    class Frozen(TinyNet):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

    task.model = Frozen()
    with pytest.raises(ConfigError, match=r"Frozen.train\(\) must return the network"):
        check_outputs(task)


def test_outputs_are_logits_by_the_default_loss_or_metric(task: Task) -> None:
    own = replace(task, metric=lambda output, batch: output[:, 0])
    assert classifies(task) and classifies(own)
    assert classifies(replace(own, loss=partial(cross_entropy, label_smoothing=0.1)))
    assert not classifies(replace(own, loss=lambda output, batch: output.mean()))


def test_named_tuples_keep_their_names() -> None:
    Pair = namedtuple("Pair", ["image", "label"])
    batch = Pair(torch.arange(6), torch.arange(6))
    moved = to_device(first_samples(batch, 2), torch.device("cpu"))
    assert moved.image.tolist() == [0, 1] and isinstance(moved, Pair)


def test_a_metric_that_fails_is_said_before_any_work(task: Task) -> None:
    task.metric = lambda output, batch: output["scores"]
    with pytest.raises(ConfigError, match="The metric failed on two samples"):
        check_outputs(task)
    task.metric = lambda output, batch: 0.5  # type: ignore[assignment,return-value]
    with pytest.raises(ConfigError, match="must return a tensor"):
        check_outputs(task)


def test_training_labels_may_be_mixed(task: Task) -> None:
    """The metric is asked about validation data alone."""
    images, labels = next(iter(task.train))
    task.train = [(images, torch.eye(10)[labels])]  # type: ignore[assignment]
    check_outputs(task)


@pytest.mark.parametrize(
    ("output", "labels"),
    [
        (torch.zeros(4, 1), torch.ones(4)),  # argmax is 0, whatever the network says
        (torch.zeros(4, 1), torch.ones(4, 1)),
        (torch.zeros(4), torch.ones(4, dtype=torch.int64)),
        (torch.zeros(2, 2), torch.eye(2, dtype=torch.int64)),  # these would broadcast
        (torch.zeros(4, 3), torch.ones(4)),
    ],
)
def test_accuracy_is_of_classes_alone(output: Tensor, labels: Tensor) -> None:
    with pytest.raises(ConfigError, match="Give a metric of your own"):
        correct(output, (None, labels))


def test_pixels_that_the_loss_ignores_do_not_count() -> None:
    labels = torch.tensor([[[0, 1], [-100, -100]], [[-100, -100], [-100, -100]]])
    logits = torch.zeros(2, 3, 2, 2)
    assert correct(logits, (None, labels)).tolist() == [0.5, 0.0]


def test_calibration_batches_are_the_same_whatever_was_drawn_before() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            image, label = super().__getitem__(index)
            return image + torch.rand(()), label

    for generator in (None, torch.Generator()):
        loader = DataLoader(
            Noisy(*make_images(64, 1)), batch_size=8, shuffle=True, generator=generator
        )
        task = Task(TinyNet(), loader, loader, loader)
        passes = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            numbers = torch.rand(3)
            passes.append(torch.cat([images for images, _ in task.calibration_batches(4)]))
            torch.manual_seed(seed)
            assert torch.equal(torch.rand(3), numbers)
        assert torch.equal(*passes)
        before = torch.get_rng_state()
        list(task.calibration_batches(2))
        assert torch.equal(torch.get_rng_state(), before)


def test_frozen_parameters_stay_frozen_unless_all_are() -> None:
    model = TinyNet()
    model.stem.weight.requires_grad_(False)
    assert not unfreeze(model) and not model.stem.weight.requires_grad
    model.requires_grad_(False)
    assert unfreeze(model) and all(p.requires_grad for p in model.parameters())


def test_a_batch_may_hold_what_has_no_samples() -> None:
    batch = {"image": torch.zeros(4, 2), "weight": 1.0, "step": torch.tensor(3), "names": ["a"] * 4}
    cut = first_samples(batch, 2)
    assert cut["image"].shape == (2, 2) and cut["weight"] == 1.0 and cut["names"] == ["a", "a"]
    assert cut["step"] == 3


def test_the_defaults_serve_dense_outputs() -> None:
    logits, labels = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    shares = correct(logits, (None, labels))
    torch.testing.assert_close(shares, (logits.argmax(1) == labels).float().mean((1, 2)))
    same = logit_distillation(logits, logits)
    assert float(same) == pytest.approx(0.0, abs=1e-5)
    flat = logits.permute(0, 2, 3, 1).reshape(-1, 5)
    other = torch.randn_like(flat)
    dense = other.reshape(2, 3, 4, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(logit_distillation(flat, other), logit_distillation(logits, dense))


def test_batches_may_nest() -> None:
    batch = {"a": [torch.arange(4), "name"], "b": torch.zeros(4, 2)}
    moved = to_device(batch, torch.device("cpu"))
    assert moved["a"][1] == "name"
    assert first_samples({"b": batch["b"]}, 3)["b"].shape == (3, 2)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda output, batch: correct(output, batch).mean(), "not their mean"),
        (lambda output, batch: 100 * torch.ones(len(output)), "between 0 and 1"),
        (lambda output, batch: -torch.ones(len(output)), "between 0 and 1"),
        (lambda output, batch: 0.5, "must return a tensor"),
    ],
)
def test_a_metric_gives_a_share_for_each_sample(task: Task, metric: Any, message: str) -> None:
    task.metric = metric
    with pytest.raises(ConfigError, match=message):
        check_outputs(task)


def test_scores_of_pixels_are_averaged_over_each_sample() -> None:
    output = torch.zeros(2, 3, 4, 4)
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[1, :2] = 1
    assert MeanScore(correct).observe(output, (output, labels)).tolist() == [1.0, 0.5]


def test_a_list_of_dicts_has_one_for_each_sample() -> None:
    boxes = [{"boxes": torch.zeros(n, 4), "labels": torch.zeros(n)} for n in (2, 0, 5)]
    batch = (torch.zeros(3, 1, 8, 8), boxes)
    assert samples_in(batch) == 3
    images, found = first_samples(batch, 2)
    assert len(images) == 2 and [len(one["boxes"]) for one in found] == [2, 0]
    _, last = part_of(batch, 2, 3)
    assert [len(one["boxes"]) for one in last] == [5]
    # As many dicts as images: each of these is an image, however many rows it has.
    assert samples_in((tuple(torch.zeros(3, 8, 8) for _ in range(3)), boxes)) == 3
    moved = to_device(batch, torch.device("cpu"))
    assert [len(one["labels"]) for one in moved[1]] == [2, 0, 5]


def test_unknown_functions_of_a_task_are_refused(task: Task) -> None:
    with pytest.raises(ConfigError, match=r"mine takes no 'metrics'. Did you mean 'metric'"):
        with_functions(task, {"metrics": correct}, "mine")
    with pytest.raises(ConfigError, match="mine: loss must be a function, got a float"):
        with_functions(task, {"loss": 0.5}, "mine")
    assert (
        with_functions(task, {"loss": lambda output, batch: output.sum()}, "").distillation is None
    )


def test_a_batch_is_split_into_all_of_its_samples() -> None:
    batch = {"x": torch.arange(7), "names": list("abcdefg"), "scale": 2.0}
    parts = list(split_batch(batch, 3))
    assert [len(part["x"]) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert "".join("".join(part["names"]) for part in parts) == "abcdefg"
