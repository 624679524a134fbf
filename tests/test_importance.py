"""Which channels go first, and what their absence is predicted to break."""

from __future__ import annotations

import pytest
import torch
from conftest import TinyNet, make_loader
from test_channels import Dense, Depthwise, Residual, randomized
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autocompress.channels import ChannelGroup, Member, remove_channels
from autocompress.grouping import find_groups
from autocompress.importance import (
    POINTS,
    ChannelLadder,
    Importance,
    build_ladders,
    keep_counts,
)
from autocompress.layers import inspect_layers
from autocompress.observation import observe_layers
from autocompress.plan import Plan
from autocompress.surgery import apply_plan
from autocompress.task import Task

IMPORTANCES: tuple[Importance, ...] = ("outputs", "norm", "bn", "taylor")


def ladders_of(
    model: nn.Module, importance: Importance, task: Task | None = None
) -> dict[str, ChannelLadder]:
    task = task or task_of(model)
    example = task.example()
    layers, _ = inspect_layers(model, example)
    groups, _ = find_groups(model, example)
    seen = observe_layers(model, task, layers, images=128, patches=2048)
    return build_ladders(model, task, groups, seen, importance)


def task_of(model: nn.Module, size: int = 8) -> Task:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(128, 3, size, size, generator=generator)
    labels = torch.randint(5, (128,), generator=generator)
    loader: DataLoader[tuple[Tensor, ...]] = DataLoader(
        TensorDataset(images, labels), batch_size=32
    )
    return Task(model.eval(), loader, loader, loader)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_channels_that_nobody_needs_go_first(importance: Importance) -> None:
    torch.manual_seed(0)
    net = TinyNet().eval()
    needless = [3, 11]
    with torch.no_grad():
        net.bn1.weight[needless] = 0.0
        net.stem.weight[needless] = 0.0
        net.conv.weight[:, needless] = 0.0
    loader = make_loader(128, seed=0)
    ladder = ladders_of(net, importance, Task(net, loader, loader, loader))["stem"]
    assert set(ladder.order[-2:]) == set(needless)
    assert sorted(ladder.order) == list(range(16))
    mild = ladder.choices[-1]
    assert mild.keep == 14 and mild.impact == pytest.approx(0.0, abs=1e-9)
    assert set(ladder.kept(14).removed) == set(needless)
    impacts = [choice.impact for choice in ladder.choices]
    assert impacts == sorted(impacts, reverse=True) and impacts[0] > 0


def test_the_loss_misses_what_the_weights_do_not_tell() -> None:
    """A channel with large weights that the classifier ignores is last by loss, first by norm."""
    torch.manual_seed(0)
    net = TinyNet().eval()
    with torch.no_grad():
        net.conv.weight[5] *= 50.0
        net.fc.weight[:, 5] = 0.0
    loader = make_loader(128, seed=0)
    task = Task(net, loader, loader, loader)
    assert ladders_of(net, "norm", task)["conv"].order[0] == 5
    for importance in ("outputs", "taylor"):
        assert ladders_of(net, importance, task)["conv"].order[-1] == 5  # type: ignore[arg-type]


def test_what_the_loss_does_not_ask_for_has_no_derivative() -> None:
    class Two(TinyNet):
        """Its second output counts for nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.Linear(32, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            found: list[Tensor] = []
            hook = self.fc.register_forward_pre_hook(lambda _, given: found.append(given[0]))
            logits = super().forward(x)
            hook.remove()
            return logits, self.aside(found[0])

    torch.manual_seed(0)
    net, loader = Two().eval(), make_loader(64, seed=0)
    task = Task(net, loader, loader, loader, loss=lambda output, batch: output[0].square().mean())
    assert ladders_of(net, "taylor", task)["conv"].order


def test_norm_and_scale_are_what_they_say() -> None:
    torch.manual_seed(0)
    net = TinyNet().eval()
    with torch.no_grad():
        net.bn1.weight.copy_(torch.linspace(1.6, 0.1, 16))
    loader = make_loader(64, seed=0)
    task = Task(net, loader, loader, loader)
    assert ladders_of(net, "bn", task)["stem"].order == tuple(range(16))
    squares = net.stem.weight.square().sum((1, 2, 3)) + net.conv.weight.square().sum((0, 2, 3))
    order = torch.argsort(squares, descending=True).tolist()
    assert list(ladders_of(net, "norm", task)["stem"].order) == order


def test_the_impact_is_the_change_of_the_outputs_where_these_are_near() -> None:
    """With one linear layer behind the channels nothing is left out of the prediction."""

    class Head(nn.Module):
        """The classifier by itself, on what the network gives it."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.make, self.read = nn.Linear(3, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(self.make(x.mean((2, 3))).tanh())

    head = Head().eval()
    task = task_of(head)
    images = torch.cat([batch[0] for batch in task.train])
    ladder = ladders_of(head, "outputs", task)["make"]
    layers, _ = inspect_layers(head, task.example())
    cache = observe_layers(head, task, layers, images=128, patches=2048).factor_cache(head)
    with torch.no_grad():
        exact = head(images)
        for choice in ladder.choices:
            plan = Plan({}, {"make": ladder.kept(choice.keep)})
            small, plain = apply_plan(head, plan, cache), apply_plan(head, plan)
            assert (exact - small(images)).norm() < 0.5 * (exact - plain(images)).norm()
            change = exact - small(images)
            real = float((change - change.mean(dim=0)).square().sum(dim=1).mean())
            assert 0.3 * real < choice.impact < 3 * real, choice


@pytest.mark.parametrize("model", [Dense(), Depthwise(groups=4), Residual()])
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_all_kinds_of_groups_are_measured(model: nn.Module, importance: Importance) -> None:
    """Behind concatenations, flattenings and grouped convolutions, too."""
    model = randomized(model)
    for ladder in ladders_of(model, importance).values():
        assert ladder.choices[0].error > 0 and ladder.choices[0].impact > 0
        for choice in ladder.choices:
            assert 0 <= choice.error < 3 and choice.impact >= 0
            kept = ladder.kept(choice.keep)  # refuses unequal parts
            assert len(kept.kept) == choice.keep
        remove_channels(model, [ladder.kept(ladder.choices[0].keep)])


def test_what_passes_a_channel_on_at_several_positions_has_as_many_parameters() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm1d(8 * 16)
            self.fc = nn.Linear(8 * 16, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(self.norm(self.stem(x).relu().flatten(1)))
            return out

    model = randomized(Flat())
    ladder = ladders_of(model, "norm", task_of(model, 4))["stem"]
    assert ladder.params_each == 2 * 16
    small = remove_channels(model, [ladder.kept(ladder.choices[0].keep)])
    removed = 8 - ladder.choices[0].keep
    counts = [
        sum(p.numel() for p in net.get_submodule("norm").parameters()) for net in (model, small)
    ]
    assert counts[0] - counts[1] == removed * ladder.params_each


def test_what_two_readers_miss_is_added_up() -> None:
    model = randomized(Residual())
    with_both = ladders_of(model, "norm")["stem"].choices[0].impact
    with torch.no_grad():
        model.get_submodule("inner").weight.zero_()  # type: ignore[operator, union-attr]
    assert ladders_of(model, "norm")["stem"].choices[0].impact < with_both


def group(channels: int, chunks: int = 1) -> ChannelGroup:
    return ChannelGroup("a", channels, (Member("a", "out"), Member("b", "in")), chunks)


@pytest.mark.parametrize(
    ("channels", "chunks", "multiple"),
    [(512, 1, 16), (128, 1, 16), (96, 1, 8), (40, 1, 4), (16, 1, 2), (128, 32, 32), (12, 4, 4)],
)
def test_keep_counts_are_multiples_that_hardware_likes(
    channels: int, chunks: int, multiple: int
) -> None:
    counts = keep_counts(group(channels, chunks))
    assert counts and counts == sorted(set(counts)) and len(counts) <= POINTS
    assert all(count % multiple == 0 and channels / 8 <= count < channels for count in counts)


def test_a_group_that_is_too_narrow_has_no_keep_counts() -> None:
    assert keep_counts(group(1)) == []
    assert keep_counts(group(8, chunks=8)) == []
