"""A child that starts from its parent's weights."""

from __future__ import annotations

import pytest
import torch
from conftest import CLASSES, TinyNet
from torch import nn

from autocompress.channels import KeptChannels
from autocompress.grouping import find_groups
from autocompress.inheritance import Elder, multiply_out
from autocompress.plan import Plan
from autocompress.surgery import apply_plan
from autocompress.task import Task
from autocompress.training import fit
from autocompress.transforms import CP, SVD, SpatialSVD, TensorTrain, Transform, Tucker2

CHOICES: dict[str, Transform] = {
    "svd": SVD(6),
    "spatial_svd": SpatialSVD(8),
    "tucker2": Tucker2(5, 7),
    "cp": CP(9),
    "tt": TensorTrain((5, 6, 7)),
}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def trained_further(task: Task, plan: Plan) -> nn.Module:
    """The network of `plan`, fine-tuned so that its weights are its own."""
    model = apply_plan(task.model, plan)
    fit(model, task, epochs=1, learning_rate=0.05, seed=0)
    return model


@pytest.mark.parametrize("name", CHOICES)
def test_multiplied_out_it_is_the_same_network(task: Task, images: torch.Tensor, name: str) -> None:
    plan = Plan({"conv": CHOICES[name], "fc": SVD(3)})
    parent = trained_further(task, plan)
    dense = multiply_out(parent, plan, task.model)
    assert isinstance(dense, TinyNet) and dense.fc.weight.shape == (CLASSES, 32)
    torch.testing.assert_close(dense(images), parent(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CHOICES)
def test_with_its_parents_plan_it_is_its_parent(
    task: Task, images: torch.Tensor, name: str
) -> None:
    plan = Plan({"conv": CHOICES[name]})
    parent = trained_further(task, plan)
    child = Elder(parent, plan, task.model, None).child(plan)
    own, theirs = child.state_dict(), parent.state_dict()
    assert all(torch.equal(own[key], value) for key, value in theirs.items())
    torch.testing.assert_close(child(images), parent(images))


def test_a_changed_layer_is_cut_from_the_parents_weights(task: Task, images: torch.Tensor) -> None:
    """At full rank, a child with another transform still computes what its parent does."""
    plan = Plan({"conv": SVD(12)})
    parent = trained_further(task, plan)
    child = Elder(parent, plan, task.model, None).child(Plan({"conv": Tucker2(16, 32)}))
    torch.testing.assert_close(child(images), parent(images), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(child(images), task.model(images), atol=1e-2)


def test_the_baseline_stays_as_it_is(task: Task) -> None:
    plan = Plan({"conv": SVD(6)})
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    Elder(trained_further(task, plan), plan, task.model, None).child(Plan({"fc": SVD(2)}))
    assert all(torch.equal(before[key], value) for key, value in task.model.state_dict().items())


def narrow_plan(task: Task, count: int, layers: dict[str, Transform]) -> Plan:
    """A plan that keeps the first channels of the convolution."""
    groups, _ = find_groups(task.model, task.example())
    group = next(group for group in groups if group.name == "conv")
    return Plan(layers, {"conv": KeptChannels(group, tuple(range(count)))})


@pytest.mark.parametrize("name", CHOICES)
def test_with_its_parents_channels_it_is_its_parent(
    task: Task, images: torch.Tensor, name: str
) -> None:
    plan = narrow_plan(task, 24, {"conv": CHOICES[name]})
    parent = trained_further(task, plan)
    child = Elder(parent, plan, task.model, None).child(plan)
    torch.testing.assert_close(dict(child.state_dict()), dict(parent.state_dict()))


def test_a_narrower_child_has_its_parents_weights_for_what_remains(task: Task) -> None:
    plan = narrow_plan(task, 24, {})
    parent = trained_further(task, plan)
    child = Elder(parent, plan, task.model, None).child(narrow_plan(task, 16, {}))
    for key, value in child.state_dict().items():
        theirs = parent.state_dict()[key]
        part = tuple(slice(0, size) for size in value.shape)
        torch.testing.assert_close(value, theirs[part] if value.ndim else theirs)
    assert child.get_submodule("fc").weight.shape == (CLASSES, 16)


def test_channels_that_the_parent_lacks_are_the_baselines_and_nobody_weighs_them(
    task: Task, images: torch.Tensor
) -> None:
    plan = narrow_plan(task, 16, {})
    parent = trained_further(task, plan)
    child = Elder(parent, plan, task.model, None).child(Plan())
    torch.testing.assert_close(child.eval()(images), parent.eval()(images))
    weight = child.get_submodule("conv").get_parameter("weight")
    own = parent.get_submodule("conv").get_parameter("weight")
    torch.testing.assert_close(weight[:16], own)
    torch.testing.assert_close(weight[16:], task.model.get_submodule("conv").weight[16:])


def test_a_cut_layer_of_a_narrower_child_is_cut_from_the_parents_weights(
    task: Task, images: torch.Tensor
) -> None:
    """At full rank it computes what the parent does without the channels that it lost."""
    parent_plan = narrow_plan(task, 24, {"conv": SVD(12)})
    parent = trained_further(task, parent_plan)
    with torch.no_grad():
        parent.get_submodule("fc").weight[:, 16:] = 0.0  # type: ignore[index, operator]
    child_plan = narrow_plan(task, 16, {"conv": Tucker2(16, 16)})
    child = Elder(parent, parent_plan, task.model, None).child(child_plan)
    torch.testing.assert_close(child.eval()(images), parent.eval()(images), atol=1e-4, rtol=1e-4)
