"""A plan and a network in, a smaller network out; the given network stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TinyNet
from torch import nn

from autocompress.errors import ConfigError, UnsupportedLayer
from autocompress.layers import inspect_layers
from autocompress.plan import Plan
from autocompress.surgery import (
    ErrorMeter,
    FactorCache,
    Latest,
    apply_plan,
    build_plan,
    dense_weight,
    load_kernels,
    replace_module,
)
from autocompress.transforms import CP, SVD, TensorTrain, Tucker2

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _net() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet().eval()


def test_apply_plan_replaces_only_what_it_names() -> None:
    net = _net()
    before = copy.deepcopy(net.state_dict())
    small = apply_plan(net, Plan({"conv": Tucker2(4, 8), "fc": SVD(2)}))
    assert isinstance(small.get_submodule("conv"), nn.Sequential)
    assert small(IMAGES).shape == net(IMAGES).shape and not small.training
    assert isinstance(net.conv, nn.Conv2d)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    for key in ("stem.weight", "bn1.weight", "bn2.running_var"):
        assert torch.equal(small.state_dict()[key], before[key])
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (small, net))
    assert ours < theirs
    small.get_submodule("stem").get_parameter("weight").data.zero_()
    assert torch.equal(net.stem.weight, before["stem.weight"])


def test_full_rank_everywhere_changes_nothing() -> None:
    net = _net()
    layers, _ = inspect_layers(net, (IMAGES[:1],))
    assert [layer.name for layer in layers] == ["stem", "conv", "fc"]
    for kind in (SVD, TensorTrain):
        plan = Plan({layer.name: kind.full(layer) for layer in layers})
        torch.testing.assert_close(apply_plan(net, plan)(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-5)


def test_build_plan_takes_the_state_of_apply_plan() -> None:
    net, plan = _net(), Plan({"conv": CP(6), "fc": TensorTrain((2,))})
    filled, empty = apply_plan(net, plan), build_plan(net, plan)
    empty.load_state_dict(filled.state_dict())
    torch.testing.assert_close(empty.eval()(IMAGES), filled(IMAGES))


def test_half_precision_and_gradients() -> None:
    net = _net().to(torch.bfloat16)
    net.conv.weight.requires_grad_(False)
    small = apply_plan(net, Plan({"conv": SVD(6)}))
    conv = small.get_submodule("conv")
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in conv.parameters())


def test_unknown_and_unfit_layers_are_named() -> None:
    with pytest.raises(ConfigError, match="layer 'conb', .*Did you mean 'conv'"):
        apply_plan(_net(), Plan({"conb": SVD(2)}))
    with pytest.raises(UnsupportedLayer, match="Layer 'conv': SVD needs 1 <= rank <= 32, got 99"):
        apply_plan(_net(), Plan({"conv": SVD(99)}))
    with pytest.raises(UnsupportedLayer, match="Layer 'bn1': .*got BatchNorm2d"):
        build_plan(_net(), Plan({"bn1": SVD(1)}))


def test_a_network_of_one_layer() -> None:
    layer = nn.Linear(6, 4)
    small = apply_plan(layer, Plan({"": SVD(4)}))
    x = torch.randn(2, 6)
    assert isinstance(small, nn.Sequential)
    torch.testing.assert_close(small(x), layer(x))


def test_replace_module_reaches_inside() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    replace_module(net, "0.1", nn.Tanh())
    assert isinstance(net[0][1], nn.Tanh)


class _Counted(SVD):
    """An SVD that counts its factorizations."""

    calls = 0

    @classmethod
    def factorize(cls, *args, **kwargs):  # type: ignore[no-untyped-def]
        cls.calls += 1
        return super().factorize(*args, **kwargs)


def test_a_fused_kernel_does_not_pass_by_what_was_replaced() -> None:
    """Without derivatives PyTorch's encoder layer reads its weights itself, and calls no layer."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    small = apply_plan(encoder, Plan({"linear1": SVD(8), "linear2": SVD(8)})).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        fused = small(x)
    assert fused.isfinite().all()
    torch.testing.assert_close(fused, small(x), rtol=1e-4, atol=1e-5)


def test_the_cache_factors_once_per_layer_and_method() -> None:
    _Counted.calls = 0
    cache = FactorCache(_net())
    for rank in (2, 3, 2):
        cache.kernels("conv", _Counted(rank))
    assert _Counted.calls == 1
    cache.kernels("fc", _Counted(2))
    assert _Counted.calls == 2
    assert cache.kernels("conv", CP(4)) is cache.kernels("conv", CP(4))


def test_what_was_used_last_is_kept() -> None:
    made = []
    kept = Latest(limit=3 * 40)

    def get(key: str, count: int = 10) -> None:
        def make() -> tuple[torch.Tensor, ...]:
            made.append(key)
            return (torch.zeros(count),)

        assert kept.get(key, make)[0].shape == (count,)

    for key in "abcabc":
        get(key)
    assert made == list("abc")
    get("d")  # in place of a, which was not used for longest
    for key in "bcd":
        get(key)
    assert made == list("abcd")
    get("large", 100)  # kept, though it is too large by itself
    get("large", 100)
    get("a")
    assert made == [*"abcd", "large", "a"]
    for key in "bca":
        get(key)
    assert made == [*"abcd", "large", *"abc"]


def test_apply_plan_uses_the_patches_of_its_cache() -> None:
    net, plan = _net(), Plan({"conv": SVD(4)})
    patches = torch.randn(64, 16, 3, 3).double() * torch.logspace(0, -3, 16)[:, None, None]
    plain, weighted = (
        apply_plan(net, plan),
        apply_plan(net, plan, FactorCache(net, {"conv": patches})),
    )
    cache = FactorCache(net, {"conv": patches})
    for model, sign in ((plain, 1), (weighted, -1)):
        kernels = [p.detach() for p in model.get_submodule("conv").parameters()]
        meter = ErrorMeter(net.conv, patches)
        error, best = (
            meter.relative_error(meter.outputs(SVD(4), own))
            for own in (kernels, cache.kernels("conv", SVD(4)))
        )
        assert error > best * 1.05 if sign > 0 else error == pytest.approx(best)


def test_relative_error_is_that_of_the_outputs() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, padding_mode="circular")
    patches = torch.randn(32, 4, 3, 3)
    kernels = FactorCache(conv).kernels("", SVD(2))
    dense = torch.einsum("ri,or->oi", kernels[0].flatten(1), kernels[1].flatten(1))
    exact = patches.flatten(1) @ conv.weight.detach().flatten(1).T
    wanted = (exact - patches.flatten(1) @ dense.T).norm() / exact.norm()
    meter = ErrorMeter(conv, patches)
    cut = meter.relative_error(meter.outputs(SVD(2), kernels))
    assert cut == pytest.approx(float(wanted), rel=1e-4)
    full = FactorCache(conv).kernels("", SVD(6))
    assert meter.relative_error(meter.outputs(SVD(6), full)) < 1e-5


def test_dense_weight_is_exact_and_leaves_its_arguments() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    replacement = SVD(3).build(conv)
    load_kernels(replacement, FactorCache(conv).kernels("", SVD(3)))
    nn.init.constant_(replacement.get_parameter("1.bias"), 1e4)
    before = copy.deepcopy(replacement.state_dict())
    dense = dense_weight(replacement, conv)
    assert dense.shape == conv.weight.shape and not dense.requires_grad
    torch.testing.assert_close(dense, conv.weight.detach(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in replacement.state_dict().items())
    assert replacement.get_submodule("0").stride == (2, 2)


def test_dense_weight_of_a_wide_linear_goes_in_parts() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(1500, 8)
    replacement = SVD(8).build(linear)
    load_kernels(replacement, FactorCache(linear).kernels("", SVD(8)))
    torch.testing.assert_close(
        dense_weight(replacement, linear), linear.weight.detach(), rtol=1e-3, atol=1e-5
    )


def test_load_kernels_wants_as_many_as_there_are_weights() -> None:
    replacement = SVD(2).build(nn.Linear(4, 4))
    with pytest.raises(ValueError):
        load_kernels(replacement, [torch.zeros(2, 4)])


@pytest.mark.parametrize("transform", [SVD(4), Tucker2(6, 4)])
def test_outputs_that_weigh_more_lose_less(transform: SVD | Tucker2) -> None:
    """And at full rank the weights change nothing."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, bias=False)
    importance = torch.tensor([10.0, 10.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    weight = conv.weight.detach()

    def lost(cache: FactorCache, choice: SVD | Tucker2) -> torch.Tensor:
        new = choice.build(conv)
        load_kernels(new, cache.kernels("", choice))
        return (dense_weight(new, conv) - weight).flatten(1).norm(dim=1)

    plain, aware = FactorCache(conv), FactorCache(conv, None, {"": importance})
    assert lost(aware, transform)[:2].sum() < 0.5 * lost(plain, transform)[:2].sum()
    assert lost(aware, SVD(8)).max() < 1e-5 and lost(aware, Tucker2(8, 8)).max() < 1e-5
