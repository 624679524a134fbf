"""Which layers read a network's input, which make its output, whose weights are used elsewhere."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.flow import Flow


class Net(nn.Module):
    """Layers `a`, `b`, ... of four channels in the order that a function calls them."""

    def __init__(self, path: Callable[[Net, Tensor], object], count: int = 4) -> None:
        super().__init__()
        self.path = path
        for name in "abcdef"[:count]:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> object:
        return self.path(self, x)


def follow(model: nn.Module, x: Tensor | None = None) -> Flow:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    flow = Flow(layers)
    inputs = (torch.randn(2, 4) if x is None else x,)
    with torch.no_grad(), flow.following(inputs) as end:
        end(model(*inputs))
    return flow


def residual(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    x = x + net.b(x)
    x += net.c(x.relu())
    return net.d(x)


def two_inputs_two_heads(net: Net, x: Tensor) -> dict[str, Tensor]:
    joined = net.a(x * 2) + net.b(x.flip(0))
    return {"class": net.c(joined), "box": net.d(joined).sigmoid()}


def averaged_heads(net: Net, x: Tensor) -> tuple[Tensor, ...]:
    x = net.b(net.a(x))
    return ((net.c(x) + net.d(x)) / 2,)


def raw_input_again_and_a_head_for_nobody(net: Net, x: Tensor) -> Tensor:
    """`b` reads the input beside `a`'s output; nobody uses what `d` makes."""
    y = net.b(torch.cat([net.a(x), x])[:2])
    net.d(y)
    return net.c(y)


def written_into_a_view(net: Net, x: Tensor) -> Tensor:
    y = torch.zeros(4, 4)
    y[:2] = net.a(x)
    y[2:].copy_(net.b(y[:2]))
    return net.d(net.c(y))


def constants(net: Net, x: Tensor) -> Tensor:
    """`b` reads a constant, as networks of position tables do: it doesn't read the input."""
    return net.d(net.c(net.a(x) + net.b(torch.ones(2, 4))))


@pytest.mark.parametrize(
    ("path", "first", "last"),
    [
        (residual, "a", "d"),
        (two_inputs_two_heads, "ab", "cd"),
        (averaged_heads, "a", "cd"),
        (raw_input_again_and_a_head_for_nobody, "a", "c"),
        (written_into_a_view, "a", "d"),
        (constants, "a", "d"),
        (lambda net, x: net.a(x), "a", "a"),
        (lambda net, x: net.a(net.a(x)), "a", "a"),
        (lambda net, x: net.b(net.a(x)).detach().relu(), "a", "b"),
    ],
)
def test_ends(path: Callable[[Net, Tensor], object], first: str, last: str) -> None:
    flow = follow(Net(path))
    assert (flow.first, flow.last) == (set(first), set(last))
    assert flow.read_outside == set()


def test_a_table_of_embeddings_is_a_layer() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    flow = follow(model, torch.tensor([[0, 3]]))
    assert (flow.first, flow.last) == ({"0"}, {"2"})


def test_weights_that_are_used_without_their_layers() -> None:
    def path(net: Net, x: Tensor) -> Tensor:
        x = F.linear(net.a(x), net.b.weight)
        return F.linear(net.c(x), net.c.weight.T).to(net.d.weight.dtype)

    assert follow(Net(path)).read_outside == {"b", "c"}


def test_nothing_stays_behind() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def path(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        kept.append(weakref.ref(y.untyped_storage()))  # type: ignore[type-var]
        return net.b(y).sum()

    model = Net(path)
    flow = follow(model)
    gc.collect()
    assert flow.first == {"a"} and kept[0]() is None
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_hooks_go_away_when_the_forward_pass_fails() -> None:
    model = Net(lambda net, x: net.a(x[:, :3]))
    with pytest.raises(RuntimeError):
        follow(model)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
