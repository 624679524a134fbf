"""The layer table: what each choice costs and what it breaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet, make_loader
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autocompress.errors import ConfigError
from autocompress.grouping import find_groups
from autocompress.importance import build_ladders
from autocompress.layers import inspect_layers
from autocompress.observation import Observations, Slopes, observe_layers, output_change
from autocompress.plan import Plan
from autocompress.profiler import profile_model
from autocompress.sensitivity import LayerTable, build_table
from autocompress.surgery import FactorCache, apply_plan
from autocompress.task import Task
from autocompress.transforms import TRANSFORMS


def table_of(task: Task) -> tuple[LayerTable, Observations]:
    layers, _ = inspect_layers(task.model, task.example())
    seen = observe_layers(task.model, task, layers, images=64, patches=256)
    cache = FactorCache(task.model, seen.patches)
    return build_table(task.model, layers, cache, seen, tuple(TRANSFORMS)), seen


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
    name, choices = next(iter(table.choices.items()))
    timed = replace(
        table,
        choices={**table.choices, name: tuple(replace(c, ms=0.5) for c in choices)},
        layer_ms={layer.name: 1.5 for layer in table.layers},
        network_ms=7.0,
        slowdown={table.layers[0].name: {"out": ((0.25, 3.0), (0.5, 2.0))}},
    )
    assert LayerTable.from_json(timed.to_json()) == timed
    assert timed.cost(table.layers[0]).ms == 1.5 and table.cost(table.layers[0]).ms is None


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
    assert observe_layers(conv, task, layers, patches=64).patches[""].shape == (64, 1, 3, 3)


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
    found = observe_layers(conv, task, layers, patches=40).patches[""]
    with torch.no_grad():
        answers = F.conv2d(found, conv.weight)[:, :, 0, 0]
        places = conv(images).permute(0, 2, 3, 1).reshape(-1, 4)
    nearest = (answers[:, None] - places[None]).abs().amax(dim=2).amin(dim=1)
    assert float(nearest.max()) < 1e-5


class Chain(nn.Module):
    """Two layers, the second of which passes on little of what the first gives it."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 4)
        with torch.no_grad():
            self.second.weight *= gain

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


def observed(model: nn.Module, images: Tensor) -> Observations:
    loader = [(images, torch.zeros(len(images), dtype=torch.long))]
    task = Task(model, loader, loader, loader)  # type: ignore[arg-type]
    layers, _ = inspect_layers(model, (images[:1],))
    return observe_layers(model, task, layers, images=len(images), patches=4096)


@pytest.mark.parametrize("gain", [1.0, 0.1])
def test_the_impact_is_the_change_of_the_networks_outputs(gain: float) -> None:
    """In a linear network the prediction is exact, but for the places and projections drawn."""
    torch.manual_seed(0)
    model = Chain(gain)
    images = torch.randn(256, 8)
    seen = observed(model, images)
    noise = 0.1 * torch.randn(4096, 8)
    exact = seen.patches["first"] @ model.first.weight.detach().T
    # As the scale and mean of each channel can be taken back, the noise must have neither.
    predicted = output_change(exact, exact + noise, Slopes(seen.gradients["first"]))
    changed = (noise @ model.second.weight.detach().T).square().sum(dim=1).mean()
    assert predicted == pytest.approx(float(changed), rel=0.2)


class Pooled(nn.Module):
    """Places of an image come to the outputs through one mean, all channels through few outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, stride=2)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.second(self.first(x).relu()))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_what_all_places_of_an_image_have_in_common_counts_as_often_as_there_are_places() -> None:
    """Else the last layers before a global pooling seemed to be of no use to anybody."""
    torch.manual_seed(0)
    model = Pooled()
    images = torch.randn(512, 3, 12, 12) + 2 * torch.randn(512, 3, 1, 1)
    with torch.no_grad():
        before = model.train()(images)
    seen = observed(model.eval(), images)
    assert seen.means["first"].places == 144 and seen.means["second"].places == 25
    assert "head" not in seen.means and seen.means["second"].patches.shape[1:] == (12, 3, 3)
    layers, _ = inspect_layers(model, (images[:1],))
    cache = FactorCache(model, seen.patches)
    table = build_table(model, layers, cache, seen, ("svd", "spatial_svd"))
    task = Task(model, [], [], [])  # type: ignore[arg-type]
    groups, _ = find_groups(model, (images[:1],))
    ladder = build_ladders(model, task, groups, seen, "outputs")["first"]
    plans = [(choice, Plan({"second": choice.transform})) for choice in table.choices["second"]]
    plans += [(choice, Plan({}, {"first": ladder.kept(choice.keep)})) for choice in ladder.choices]
    found = []
    for choice, plan in plans:
        with torch.no_grad():
            change = apply_plan(model, plan, cache).train()(images) - before
        found.append(choice.impact / float(change.square().sum(1).mean()))
    assert len(found) > 8 and 0.2 < min(found) and max(found) < 1.5


def test_another_scale_and_mean_of_a_channel_are_no_change() -> None:
    torch.manual_seed(0)
    exact, gradients = torch.randn(64, 3), torch.randn(64, 3)
    moved = exact * torch.tensor([2.0, 0.5, 1.0]) + torch.tensor([1.0, 0.0, -3.0])
    slopes = Slopes(gradients)
    assert output_change(exact, moved, slopes) < 1e-8
    assert output_change(exact, exact.flip(0), slopes) > 0.1


def test_the_gradient_of_a_convolution_is_taken_where_the_patch_is() -> None:
    """With outputs that weigh one place only, all other places have none."""
    torch.manual_seed(0)

    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x)[:, :, 0, 0]
            return out

    seen = observed(Corner(), torch.rand(64, 1, 6, 6) + 1)
    # The corner's patch is the one whose first row and column are padding.
    corner = (seen.patches["conv"][:, 0, 0] == 0).all(1) & (
        seen.patches["conv"][:, 0, :, 0] == 0
    ).all(1)
    given = seen.gradients["conv"].abs().sum(dim=1) > 0
    assert corner.any() and torch.equal(given, corner)


class Tokens(nn.Module):
    """The same function of an image's pixels, however they are handed to the layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.mix, self.head = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        count, length, channels = pixels.shape
        if self.how == "windows":
            mixed = self.mix(pixels.reshape(count * 4, length // 4, channels))
        elif self.how == "sequence first":
            mixed = self.mix(pixels.transpose(0, 1)).transpose(0, 1)
        elif self.how == "one by one":
            mixed = torch.stack([self.mix(one) for one in pixels])
        elif self.how == "recomputed":
            mixed = checkpoint(self.mix, pixels.requires_grad_(), use_reentrant=False)
        elif self.how == "recomputed, reentrant":
            mixed = checkpoint(self.mix, pixels.requires_grad_(), use_reentrant=True)
        else:
            mixed = self.mix(pixels)
        out: Tensor = self.head(mixed.reshape(count, length, -1).relu().mean(1))
        return out


@pytest.mark.parametrize(
    "how", ["windows", "sequence first", "one by one", "recomputed", "recomputed, reentrant"]
)
def test_derivatives_are_those_of_an_image_however_a_layer_is_called(how: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(96, 3, 4, 4)
    plain, other = Tokens("plain"), Tokens(how)
    other.load_state_dict(plain.state_dict())
    squares = [
        observed(model, images).gradients["mix"].square().sum(1).mean() for model in (plain, other)
    ]
    assert float(squares[1]) == pytest.approx(float(squares[0]), rel=0.1)


def test_convolutions_of_single_images_are_observed() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.conv(one).mean((1, 2)) for one in x])

    class Batch(Single):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x).mean((2, 3))
            return out

    torch.manual_seed(0)
    images, single, batch = torch.randn(64, 3, 5, 6), Single(), Batch()
    batch.load_state_dict(single.state_dict())
    one, other = (observed(model, images) for model in (single, batch))
    assert one.patches["conv"].shape == other.patches["conv"].shape == (4096, 3, 3, 3)
    squares = [seen.gradients["conv"].square().sum(1).mean() for seen in (one, other)]
    assert float(squares[0]) == pytest.approx(float(squares[1]), rel=0.1)


def test_layers_of_an_early_exit_are_observed_on_the_images_that_go_on() -> None:
    class Early(nn.Module):
        def __init__(self, limit: float) -> None:
            super().__init__()
            self.limit = limit
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.first(x)
            unsure = x[:, 0] > self.limit
            return out.index_put((unsure,), self.second(out[unsure]))

    torch.manual_seed(0)
    images = torch.randn(96, 4)
    images[0, 0], images[1:64, 0] = 2.0, -1.0  # the second chunk has none
    seen = observed(Early(0.5), images)
    share = float((images[:, 0] > 0.5).float().mean())
    square = float(seen.gradients["second"].square().sum(1).mean())
    assert square == pytest.approx(4 * share, rel=0.7)
    images[1:, 0] = -1.0
    model = Early(0.5)
    layers, _ = inspect_layers(model, (images[:1],))
    rest = [(images[1:], torch.zeros(95, dtype=torch.long))]
    task = Task(model, rest, rest, rest)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="exclude = \\['second'\\]"):
        observe_layers(model, task, layers, images=95)


def test_without_derivatives_the_impact_is_the_squared_error() -> None:
    class Closed(Chain):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = Closed(1.0)
    seen = observed(model, torch.randn(64, 8))
    assert not seen.gradients and seen.patches["first"].shape == (4096, 8)
    layers, _ = inspect_layers(model, (torch.randn(1, 8),))
    table = build_table(model, layers, FactorCache(model, seen.patches), seen, ("svd",))
    for choices in table.choices.values():
        assert all(choice.impact == choice.error**2 for choice in choices)


def test_the_network_is_left_as_it_was(task: Task) -> None:
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    layers, _ = inspect_layers(task.model, task.example())
    observe_layers(task.model, task, layers, images=64, patches=64)
    assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())
    assert not task.model.training and all(p.grad is None for p in task.model.parameters())


@pytest.mark.parametrize("size", [1, 8, 100])
def test_whatever_the_batches_as_many_patches_are_kept(size: int) -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    loader = [(torch.randn(size, 1, 8, 8), torch.zeros(size, dtype=torch.long))] * (200 // size)
    task = Task(conv, loader, loader, loader)  # type: ignore[arg-type]
    layers, _ = inspect_layers(conv, (torch.randn(1, 1, 8, 8),))
    seen = observe_layers(conv, task, layers, images=200, patches=500)
    assert seen.patches["0"].shape == (500, 1, 3, 3) and seen.gradients["0"].shape == (500, 2)
