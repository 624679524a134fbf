"""The layer table: what each choice costs and what it breaks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet, make_loader
from torch import Tensor, nn

from autocompress.layers import inspect_layers
from autocompress.plan import Plan
from autocompress.profiler import profile_model
from autocompress.sensitivity import LayerTable, build_table, collect_patches
from autocompress.surgery import FactorCache, apply_plan
from autocompress.task import Task
from autocompress.transforms import TRANSFORMS


def table_of(task: Task) -> tuple[LayerTable, dict[str, Tensor]]:
    layers, _ = inspect_layers(task.model, task.example())
    patches = collect_patches(task.model, task, layers, images=64, patches=256)
    cache = FactorCache(task.model, patches)
    return build_table(task.model, layers, cache, patches, tuple(TRANSFORMS)), patches


@pytest.fixture
def table(task: Task) -> LayerTable:
    return table_of(task)[0]


def test_costs_are_those_of_the_profiler(task: Task, table: LayerTable) -> None:
    """Each row, put into the network alone, changes its cost by exactly what the table says."""
    (example,) = task.example()
    before = profile_model(task.model, (example,), latency=False)
    own = {layer.name: layer.cost for layer in table.layers}
    for name, choices in table.choices.items():
        for choice in choices[:: max(1, len(choices) // 4)]:
            model = apply_plan(task.model, Plan({name: choice.transform}))
            after = profile_model(model, (example,), latency=False)
            assert after.params == before.params - own[name].params + choice.params
            assert after.macs == before.macs - own[name].macs + choice.macs


def test_every_row_saves(table: LayerTable) -> None:
    own = {layer.name: layer.cost for layer in table.layers}
    for name, choices in table.choices.items():
        assert choices
        assert all(c.params < own[name].params and c.macs < own[name].macs for c in choices)
        assert all(0 < c.fraction <= 1 for c in choices)


def test_errors_fall_as_ranks_rise(table: LayerTable) -> None:
    for choices in table.choices.values():
        for method in {c.transform.name for c in choices}:
            errors = [c.error for c in choices if c.transform.name == method]
            assert all(0 <= error <= 1.05 for error in errors)
            assert errors[-1] <= errors[0]


def test_the_error_is_that_of_the_layers_real_output(task: Task, table: LayerTable) -> None:
    """Over whole feature maps it is about what the table measured on sampled patches."""
    images = torch.cat([x for x, _ in task.val])
    seen: list[Tensor] = []
    handle = task.model.get_submodule("conv").register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        task.model(images)
        handle.remove()
        exact = task.model.get_submodule("conv")(seen[0])
        for choice in table.choices["conv"][::7]:
            model = apply_plan(task.model, Plan({"conv": choice.transform}))
            found = model.get_submodule("conv")(seen[0])
            error = float((found - exact).norm() / exact.norm())
            # The table's factors are weighted by real inputs, these are not: no better than those.
            assert choice.error <= error * 1.2


def test_refusals_have_reasons(table: LayerTable) -> None:
    assert "1x1" in table.refused["fc"]["tucker2"]
    assert set(table.refused["fc"]) >= {"spatial_svd", "tucker2", "cp"}


def test_it_round_trips_through_json(table: LayerTable) -> None:
    assert LayerTable.from_json(table.to_json()) == table


def test_the_same_seed_gives_the_same_table(trained_state: dict[str, Tensor]) -> None:
    tables = []
    for _ in range(2):
        model = TinyNet()
        model.load_state_dict(trained_state)
        task = Task(model.eval(), make_loader(512, 1), make_loader(64, 2), make_loader(64, 3))
        tables.append(table_of(task)[0])
    assert tables[0] == tables[1]


def test_training_images_may_be_smaller_than_the_example() -> None:
    conv = nn.Conv2d(1, 4, 3, stride=2, dilation=2)
    loader = [(torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))]
    task = Task(conv, loader, loader, loader)  # type: ignore[arg-type]
    layers, _ = inspect_layers(conv, (torch.randn(1, 1, 24, 24),))
    assert collect_patches(conv, task, layers, patches=64)[""].shape == (64, 1, 3, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"padding": (2, 0), "stride": (2, 1)},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "padding_mode": "reflect", "stride": 2},
    ],
)
def test_patches_are_what_the_kernel_sees(settings: dict[str, object]) -> None:
    """The layer's own answer at some place is its kernel times a patch."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=False, **settings)  # type: ignore[arg-type]
    images = torch.randn(2, 3, 9, 8)
    loader = [(images, torch.zeros(2, dtype=torch.long))]
    task = Task(conv, loader, loader, loader)  # type: ignore[arg-type]
    layers, _ = inspect_layers(conv, (images[:1],))
    found = collect_patches(conv, task, layers, patches=40)[""]
    with torch.no_grad():
        answers = F.conv2d(found, conv.weight)[:, :, 0, 0]
        places = conv(images).permute(0, 2, 3, 1).reshape(-1, 4)
    nearest = (answers[:, None] - places[None]).abs().amax(dim=2).amin(dim=1)
    assert float(nearest.max()) < 1e-5
