"""One conformance suite for all transforms, over the table in `transform_cases.py`."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tensorly import backend_context
from tensorly.cp_tensor import cp_to_tensor
from tensorly.decomposition import parafac
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transform_cases import LAYERS, METHODS, accepted, filled, make, refused

from autocompress import plan as plan_module
from autocompress import transforms
from autocompress.errors import ConfigError, UnsupportedLayer
from autocompress.layers import LayerSpec
from autocompress.plan import Plan
from autocompress.surgery import ErrorMeter, dense_weight
from autocompress.transforms import CP, SVD, SpatialSVD, TensorTrain, Transform, Tucker2
from autocompress.transforms.base import climb
from autocompress.transforms.cp import _fit, _least_squares, _start

every = pytest.mark.parametrize(("method", "name"), list(accepted()))


@every
def test_full_rank_reproduces_the_output(method: type[Transform], name: str) -> None:
    module, x, spec = make(name)
    for patches in (None, _patches(spec, 64)):
        replacement = filled(module, method.full(spec), patches)
        torch.testing.assert_close(replacement(x), module(x), rtol=1e-4, atol=1e-4)


@every
def test_replacements_answer_for_the_settings_of_their_layer(
    method: type[Transform], name: str
) -> None:
    module, _, spec = make(name)
    replacement = copy.deepcopy(method.full(spec).build(module))
    keys = ("in_features", "out_features")
    if isinstance(module, nn.Conv2d):
        keys = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
    assert all(getattr(replacement, key) == getattr(module, key) for key in keys)
    own, stand_in = module.get_parameter("weight"), replacement.weight
    assert (stand_in.shape, stand_in.dtype) == (own.shape, own.dtype) and stand_in.isnan().all()
    assert (replacement.bias is None) == (module.bias is None)


@every
def test_ladder_saves_and_error_falls(method: type[Transform], name: str) -> None:
    module, _, spec = make(name)
    ladder = method.ladder(spec)
    costs = [choice.cost(spec) for choice in ladder]
    assert 1 <= len(ladder) <= 16
    assert all(c.params < spec.cost.params and c.macs < spec.cost.macs for c in costs)
    params = [cost.params for cost in costs]
    assert params == sorted(set(params))

    weight = module.get_parameter("weight").detach()
    errors = [float((dense_weight(filled(module, c), module) - weight).norm()) for c in ladder]
    assert all(later <= earlier * 1.001 for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1] < float(weight.norm())


@every
def test_cost_is_that_of_the_built_layers(method: type[Transform], name: str) -> None:
    module, x, spec = make(name)
    ladder = method.ladder(spec)
    for choice in (ladder[0], ladder[-1], method.full(spec)):
        replacement = choice.build(module)
        assert choice.cost(spec).params == sum(p.numel() for p in replacement.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            replacement(x[:1])
        assert choice.cost(spec).macs == counter.get_total_flops() // 2


@every
def test_same_weights_twice(method: type[Transform], name: str) -> None:
    module, _, spec = make(name)
    choice = method.ladder(spec)[-1]
    one, two = filled(module, choice).state_dict(), filled(module, choice).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("method", METHODS)
def test_json_round_trip(method: type[Transform]) -> None:
    specs = [make(name)[2] for name in ("plain", "groups", "linear")]
    choices = [choice for spec in specs for choice in method.ladder(spec)]
    plan = Plan({f"layer.{index}": choice for index, choice in enumerate(choices)})
    back = Plan.from_json(plan.to_json())
    assert back == plan and hash(back) == hash(plan) and back.digest == plan.digest


@every
def test_build_leaves_the_layer_and_keeps_its_state(method: type[Transform], name: str) -> None:
    module, _, spec = make(name)
    module = module.double().eval()
    before = copy.deepcopy(module.state_dict())
    replacement = filled(module, method.ladder(spec)[0])
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert all(p.dtype == torch.float64 for p in replacement.parameters())
    assert not any(part.training for part in replacement.modules())
    biases = [p for key, p in replacement.named_parameters() if key.endswith("bias")]
    assert [bias.tolist() for bias in biases] == ([before["bias"].tolist()] if spec.bias else [])


@every
def test_dense_weight_is_what_the_layer_does(method: type[Transform], name: str) -> None:
    module, x, spec = make(name)
    replacement = filled(module, method.ladder(spec)[-1])
    dense = copy.deepcopy(module)
    with torch.no_grad():
        dense.get_parameter("weight").copy_(dense_weight(replacement, module))
    torch.testing.assert_close(dense(x), replacement(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "name"), list(refused()))
def test_refusals_have_a_reason(method: type[Transform], name: str) -> None:
    reason = method.refusal(make(name)[2])
    assert reason is not None and len(reason) > 10


def test_who_refuses_what() -> None:
    """The table of refusals in full, so that a change of it is seen."""
    acts = {
        method.name: {name for name in LAYERS if method.refusal(make(name)[2]) is None}
        for method in METHODS
    }
    linear = {"linear", "linear_no_bias", "linear_tokens"}
    ones, depthwise = {"one_by_one", "one_by_one_stride"}, {"depthwise", "depthwise_double"}
    everything = set(LAYERS)
    assert acts["svd"] == everything - {"depthwise"}
    assert acts["spatial_svd"] == everything - linear - ones - {"row"}
    assert acts["tucker2"] == everything - linear - ones - depthwise
    assert acts["cp"] == everything - linear - ones - depthwise
    assert acts["tt"] == everything - ones - depthwise - {"row"}


CHOICES: dict[str, tuple[Transform, str]] = {
    "svd": (SVD(4), "reflect"),
    "svd-linear": (SVD(4), "linear"),
    "spatial_svd": (SpatialSVD(4), "same"),
    "tucker2": (Tucker2(4, 5), "groups"),
    "cp": (CP(6), "strides"),
    "tt": (TensorTrain((4, 6, 5)), "circular"),
    "tt-linear": (TensorTrain((3,)), "linear_tokens"),
}


@pytest.mark.parametrize("key", CHOICES)
def test_torch_export(key: str) -> None:
    transform, name = CHOICES[key]
    module, x, _ = make(name)
    replacement = filled(module, transform).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(replacement, (x,), dynamic_shapes=({0: batch},))
    more = torch.cat([x, x, x])
    torch.testing.assert_close(exported.module()(more), replacement(more))


@pytest.mark.parametrize("key", ["svd", "spatial_svd", "tucker2", "cp", "tt", "tt-linear"])
def test_onnx_agrees(key: str) -> None:
    transform, name = CHOICES[key]
    module, x, _ = make(name)
    replacement = filled(module, transform).eval()
    program = torch.onnx.export(
        replacement,
        (x,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        verbose=False,
    )
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    more = torch.cat([x, x, x])
    (answer,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    np.testing.assert_allclose(answer, replacement(more).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (SVD(4), "plain"),
        (SVD(2), "groups"),
        (SVD(4), "linear"),
        (SVD(4), "one_by_one"),
        (Tucker2(4, 4), "plain"),
        (Tucker2(6, 12), "wide_kernel"),
        (Tucker2(2, 3), "groups"),
    ],
)
def test_patches_lower_the_error_on_real_inputs(transform: Transform, name: str) -> None:
    module, _, spec = make(name)
    seen, unseen = _patches(spec, 1024, seed=1), _patches(spec, 512, seed=2)
    kind = type(transform)
    weight = module.get_parameter("weight").detach()
    plain = transform.kernels(kind.factorize(weight, spec.groups, None))
    weighted = transform.kernels(kind.factorize(weight, spec.groups, seen))
    meter = ErrorMeter(module, unseen)
    best, worse = (
        meter.relative_error(meter.outputs(transform, kernels)) for kernels in (weighted, plain)
    )
    assert best < 0.9 * worse


def test_every_replacement_takes_its_input_by_name() -> None:
    """As `nn.Conv2d`, `nn.Linear` and `nn.Sequential` do."""
    for kind, name in ((SVD, "linear"), (TensorTrain, "linear"), (SVD, "plain")):
        module, x, spec = make(name)
        built = kind.full(spec).build(module)
        torch.testing.assert_close(built(input=x), built(x))


def test_weighted_svd_is_optimal_on_its_patches() -> None:
    """No rank-4 map loses less of the outputs than their own truncated SVD."""
    module, _, spec = make("plain")
    patches = _patches(spec, 2048)
    weight = module.get_parameter("weight").detach()
    outputs = patches.flatten(1) @ weight.flatten(1).T
    values = torch.linalg.svdvals(outputs)
    best = float(values[4:].norm() / values.norm())
    kernels = SVD(4).kernels(SVD.factorize(weight, 1, patches))
    meter = ErrorMeter(module, patches)
    error = meter.relative_error(meter.outputs(SVD(4), kernels))
    assert best <= error + 1e-6 and error < best * 1.02


def test_svd_and_spatial_svd_are_truncated_svds() -> None:
    module, _, _ = make("plain")
    weight = module.get_parameter("weight").detach()
    flat, crossed = weight.flatten(1), weight.permute(1, 2, 0, 3).reshape(48, 48)
    for transform, matrix in ((SVD(5), flat), (SpatialSVD(9), crossed)):
        values = torch.linalg.svdvals(matrix)
        lost = (dense_weight(filled(module, transform), module) - weight).norm()
        torch.testing.assert_close(lost, values[transform.rank :].norm(), rtol=1e-4, atol=1e-5)


def test_tensor_train_is_as_good_as_tensorly() -> None:
    from tensorly.decomposition import tensor_train

    module, _, _ = make("plain")
    weight = module.get_parameter("weight").detach()
    ranks = (8, 14, 8)
    with backend_context("pytorch"):
        reference = tensor_train(weight.permute(1, 2, 3, 0), [1, *ranks, 1]).to_tensor()
    theirs = float((reference.permute(3, 0, 1, 2) - weight).norm())
    ours = float((dense_weight(filled(module, TensorTrain(ranks)), module) - weight).norm())
    assert ours < 1.02 * theirs


def test_cp_takes_the_steps_of_tensorly() -> None:
    module, _, _ = make("plain")
    block = module.get_parameter("weight").detach().flatten(2)
    block = block / block.norm()
    start = _start(block, 12)
    ours = torch.einsum("or,ir,pr->oip", *_least_squares(block, start, 0.0))
    with backend_context("pytorch"):
        init = (torch.ones(12), [factor.clone() for factor in start])
        theirs = cp_to_tensor(parafac(block, 12, n_iter_max=10, init=init, tol=0))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


def test_cp_components_do_not_diverge() -> None:
    """A tensor of rank 3 and border rank 2: plain least squares cancels ever larger components."""
    a, b = torch.eye(2)
    block = (
        torch.einsum("i,j,k->ijk", a, a, b)
        + torch.einsum("i,j,k->ijk", a, b, a)
        + torch.einsum("i,j,k->ijk", b, a, a)
    )
    block = 1e3 * nn.functional.pad(block, (0, 2, 0, 2, 0, 2))
    factors = _fit(block, 2)
    sizes = torch.stack([factor.norm(dim=0) for factor in factors]).prod(0)
    assert bool(sizes.isfinite().all()) and float(sizes.max() / block.norm()) < 30
    assert float((torch.einsum("or,ir,pr->oip", *factors) - block).norm()) < float(block.norm())


@pytest.mark.parametrize("method", METHODS)
def test_a_kernel_of_zeros_stays_finite(method: type[Transform]) -> None:
    module, x, spec = make("plain")
    nn.init.zeros_(module.get_parameter("weight"))
    replacement = filled(module, method.ladder(spec)[-1], torch.zeros(8, 16, 3, 3))
    torch.testing.assert_close(replacement(x), module(x))


@pytest.mark.parametrize("method", [SVD, SpatialSVD, Tucker2, CP, TensorTrain])
def test_ranks_suit_the_hardware(method: type[Any]) -> None:
    spec = _spec(256, 128)
    ladder = method.ladder(spec)
    assert len(ladder) >= 4
    for choice in ladder:
        ranks = np.ravel(list(vars(choice).values()))
        assert all(rank % 8 == 0 for rank in ranks[: 2 if method is Tucker2 else 1])
    assert len(method.ladder(spec, points=3)) == 3
    assert method.ladder(spec, points=1) == ladder[-1:]


def test_climb_is_empty_where_nothing_saves() -> None:
    spec = _spec(1, 2)
    assert climb(spec, lambda share: SVD(9), 16) == ()
    assert Tucker2.refusal(spec) is not None


class _Padded(nn.Conv2d):
    """A convolution that does more in its forward pass."""


@pytest.mark.parametrize(
    ("transform", "module", "reason"),
    [
        (SVD(99), nn.Conv2d(4, 8, 3), "1 <= rank <= 8, got 99"),
        (Tucker2(5, 2), nn.Conv2d(4, 8, 3), "1 <= rank_in <= 4, got 5"),
        (CP(0), nn.Conv2d(4, 8, 3), "1 <= rank"),
        (TensorTrain((2,)), nn.Conv2d(4, 8, 3), "3 ranks for Conv2d, got (2,)"),
        (TensorTrain((2, 2, 2)), nn.Linear(4, 8), "1 ranks for Linear"),
        (SVD(2), _Padded(4, 8, 3), "plain Conv2d only, got _Padded"),
        (SpatialSVD(2), nn.Linear(4, 8), "plain Conv2d only, got Linear"),
        (Tucker2(2, 2), nn.ConvTranspose2d(4, 8, 3), "got ConvTranspose2d"),
    ],
)
def test_build_refuses(transform: Transform, module: nn.Module, reason: str) -> None:
    with pytest.raises(UnsupportedLayer) as error:
        transform.build(module)
    assert reason in str(error.value)


def _spec(width_in: int, width_out: int) -> LayerSpec:
    """A 3x3 convolution at 8x8 that keeps the resolution."""
    one = (1, 1)
    return LayerSpec(
        name="layer",
        kind="conv2d",
        in_channels=width_in,
        out_channels=width_out,
        kernel_size=(3, 3),
        stride=one,
        padding=one,
        dilation=one,
        groups=1,
        padding_mode="zeros",
        bias=False,
        in_size=(8, 8),
        out_size=(8, 8),
    )


def _patches(spec: LayerSpec, count: int, seed: int = 0) -> Tensor:
    """Correlated inputs of unequal size, the same law for every seed."""
    generator = torch.Generator().manual_seed(100)
    shape = (spec.in_channels,) if spec.kind == "linear" else (spec.in_channels, *spec.kernel_size)
    channels = spec.in_channels
    mixing = torch.randn(channels, channels, generator=generator)
    mixing = mixing * torch.logspace(0, -2, channels)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *shape, generator=generator)
    return torch.einsum("nj...,ij->ni...", noise, mixing)


def test_tall_matrices_are_factored_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, patches = torch.randn(48, 12, dtype=torch.float64), torch.randn(64, 12)
    for seen in (None, patches):
        full = SVD.factorize(weight, 1, seen)
        with monkeypatch.context() as patch:
            patch.setattr("autocompress.transforms.svd.TALL", 48)
            tall = SVD.factorize(weight, 1, seen)
        assert tall[0].shape == (1, 48, 12) and full[0].shape == (1, 48, 48)
        torch.testing.assert_close(tall[0], full[0][:, :, :12])
        for rank in (3, 12):
            first, second = SVD(rank).kernels(tall)
            wanted, beside = SVD(rank).kernels(full)
            torch.testing.assert_close(second @ first, beside @ wanted)


def test_a_transform_of_ones_own_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "TRANSFORMS", dict(transforms.TRANSFORMS))
    monkeypatch.setattr(plan_module, "TRANSFORMS", transforms.TRANSFORMS)

    @dataclass(frozen=True)
    class Mine(SVD):
        name = "mine"

    class Other(Mine):
        pass

    row = '{"version": 2, "layers": {"a": {"transform": "mine", "rank": 3}}}'
    with pytest.raises(ConfigError, match=r"Unknown transform 'mine'.*register\(YourClass\)"):
        Plan.from_json(row)
    assert transforms.register(Mine, alias="module:Mine") is Mine
    assert Plan.from_json(row).layers == {"a": Mine(3)}
    assert transforms.TRANSFORMS["module:Mine"] is Mine
    transforms.register(Mine)
    with pytest.raises(ConfigError, match="a transform 'mine' already.*give .*Other another name"):
        transforms.register(Other)
