import pytest
import torch
from conftest import TinyNet, make_loader

from autocompress.errors import ConfigError
from autocompress.task import Task, check_outputs, first_samples, to_device


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


def test_batches_may_nest() -> None:
    batch = {"a": [torch.arange(4), "name"], "b": torch.zeros(4, 2)}
    moved = to_device(batch, torch.device("cpu"))
    assert moved["a"][1] == "name"
    assert first_samples({"b": batch["b"]}, 3)["b"].shape == (3, 2)
