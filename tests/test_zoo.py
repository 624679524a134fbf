from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from autocompress.layers import inspect_layers
from autocompress.models import build_model
from autocompress.zoo import ZOO, BasicBlock, CifarResNet, PaddedShortcut, ResNet
from autocompress.zoo.width import scaled, scaled_by_eights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import sweep_models  # noqa: E402

NARROW: dict[str, dict[str, Any]] = {
    "pre_act_resnet18": {"width": 8},
    "vgg19": {"width": 0.125},
    "densenet121": {"width": 0.25},
    "googlenet": {"width": 0.25},
    "mobilenet_v1": {"width": 0.25},
    "mobilenet_v2": {"width": 0.25},
    "mobilenet_v2_0.35": {},
}
"""The networks of the published table, thin enough for quick tests."""
LONG = ("densenet121", "googlenet", "mobilenet_v2_0.35")
"""Those that take seconds to export."""


def millions(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("resnet20", {}, 0.269722),
        ("resnet20", {"shortcut": "B"}, 0.272474),
        ("resnet32", {}, 0.464154),
        ("resnet44", {}, 0.658586),
        ("resnet56", {}, 0.853018),
        ("resnet110", {}, 1.727962),
        ("resnet18", {"num_classes": 100}, 11.220132),
        ("resnet34", {"num_classes": 100}, 21.328292),
        ("resnet50", {"num_classes": 100}, 23.705252),
        ("pre_act_resnet18", {"num_classes": 100}, 11.217316),
        ("vgg19", {"num_classes": 100}, 20.086692),
        ("densenet121", {"num_classes": 100}, 7.048548),
        ("googlenet", {"num_classes": 100}, 6.258500),
        ("mobilenet_v1", {"num_classes": 100}, 3.309476),
        ("mobilenet_v2", {"num_classes": 100}, 2.412212),
    ],
)
def test_networks_have_the_published_sizes(
    name: str, arguments: dict[str, int], expected: float
) -> None:
    with torch.device("meta"):
        assert millions(ZOO[name](**arguments)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_cifar_resnet_halves_twice_and_starts_from_the_images(shortcut: str) -> None:
    model = ZOO["resnet20"](num_classes=7, in_channels=1, width=4, shortcut=shortcut).eval()
    assert isinstance(model, CifarResNet)
    images = torch.randn(2, 1, 28, 28)
    assert model(images).shape == (2, 7)
    features = model.layer3(model.layer2(model.layer1(model.conv1(images))))
    assert features.shape == (2, 16, 7, 7)


def test_option_a_adds_nothing_but_zeros() -> None:
    x = torch.randn(2, 4, 5, 6)
    y = PaddedShortcut(4)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 6:].any()


def test_names_are_those_of_published_checkpoints() -> None:
    cifar = ZOO["resnet20"]().state_dict().keys()
    assert {"conv1.weight", "bn1.bias", "layer2.0.conv1.weight", "linear.bias"} <= cifar
    assert not any("shortcut" in key for key in cifar)
    stem = ZOO["resnet18"]().state_dict().keys()
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.bias", "fc.weight"} <= stem


def test_shapes_of_resnet18_are_torchvisions_but_for_the_stem() -> None:
    from torchvision.models import resnet18

    with torch.device("meta"):
        theirs, ours = resnet18(num_classes=10).state_dict(), ZOO["resnet18"]().state_dict()
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if ours[k].shape != theirs[k].shape] == ["conv1.weight"]


@pytest.mark.parametrize("size", [8, 28, 32])
def test_the_small_network_takes_small_images(size: int) -> None:
    model = ZOO["resnet_small"](num_classes=5, in_channels=1, width=8, blocks=(1, 2)).eval()
    assert isinstance(model, ResNet)
    assert model(torch.randn(3, 1, size, size)).shape == (3, 5)


@pytest.mark.parametrize("depth", [2, 21])
def test_impossible_depths_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"got {depth}"):
        CifarResNet(depth)


def test_unknown_shortcuts_are_refused() -> None:
    with pytest.raises(ValueError, match="'A' or 'B', got 'C'"):
        CifarResNet(20, shortcut="C")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "model",
    [CifarResNet(8, width=4), CifarResNet(8, width=4, shortcut="B"), ResNet(BasicBlock, (1, 1))],
    ids=["A", "B", "stem"],
)
def test_networks_export_with_any_batch_size(model: nn.Module) -> None:
    model.eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: batch},))
    images: Tensor = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program.module()(images), model(images))


def test_option_a_exports_to_onnx(tmp_path: Path) -> None:
    model = CifarResNet(8, width=4).eval()
    path = tmp_path / "net.onnx"
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    torch.onnx.export(
        model, (torch.randn(2, 3, 16, 16),), path, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    session = onnxruntime.InferenceSession(path)
    images = torch.randn(5, 3, 16, 16)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NARROW)
def test_narrow_forms_run_forwards_and_backwards_on_small_images(name: str) -> None:
    torch.manual_seed(0)
    model = ZOO[name](num_classes=7, in_channels=1, **NARROW[name])
    logits: Tensor = model(torch.randn(4, 1, 32, 32))
    assert logits.shape == (4, 7)
    logits.logsumexp(1).sum().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Biases before a batch norm have no effect; a rounding error alone may leave them without one.
    assert not [n for n in unused if not n.endswith("bias")]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in NARROW]
)
def test_narrow_forms_export_with_any_batch_size(name: str) -> None:
    torch.manual_seed(0)
    model = ZOO[name](**NARROW[name]).eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.parametrize("name", NARROW)
def test_narrow_forms_have_the_layers_of_the_whole(name: str) -> None:
    with torch.device("meta"):
        whole, narrow = ZOO[name](), ZOO[name](**NARROW[name])
    keys, own = whole.state_dict().keys(), narrow.state_dict().keys()
    assert own <= keys
    # Where rounding makes the channels of two stages of MobileNet v2 equal, nothing is projected.
    assert all(".shortcut." in key for key in keys - own)
    assert keys == own or name == "mobilenet_v2"
    assert millions(narrow) <= millions(whole)


@pytest.mark.parametrize("name", NARROW)
def test_larger_images_fit_too(name: str) -> None:
    model = ZOO[name](num_classes=3, **NARROW[name]).eval()
    assert model(torch.randn(1, 3, 64, 48)).shape == (1, 3)


@pytest.mark.parametrize("name", NARROW)
def test_all_layers_but_the_first_and_the_last_may_change(name: str) -> None:
    model = ZOO[name](**NARROW[name]).eval()
    layers, left_alone = inspect_layers(model, (torch.randn(1, 3, 32, 32),), include=None)
    own = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert list(left_alone) == [own[0], own[-1]]
    assert {layer.name for layer in layers} == set(own[1:-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROW)
def test_narrow_forms_are_compressed_by_half(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> nn.Module:
        return build_model(f"zoo:{name}", NARROW[name], None)

    monkeypatch.setattr(sweep_models, "build_model", build)
    monkeypatch.setattr("autocompress.export.build_model", build)
    monkeypatch.setattr(sweep_models, "SIZES", (32,))
    row = sweep_models.attempt(f"zoo:{name}", sweep_models.METHODS)
    assert (row["outcome"], row["reason"]) == ("ok", ""), row.get("trace")
    assert row["macs"] > 1.9 and row["groups"] > 0 and row["difference"] < 1e-3


def test_names_are_those_of_the_published_code() -> None:
    with torch.device("meta"):
        keys = {name: set(make().state_dict()) for name, make in ZOO.items()}
    assert {"features.0.weight", "features.50.running_mean", "classifier.bias"} <= keys["vgg19"]
    assert {"dense1.0.bn1.weight", "trans3.conv.weight", "bn.bias", "linear.weight"} <= keys[
        "densenet121"
    ]
    assert {"pre_layers.0.bias", "a3.b1.0.weight", "e4.b3.7.weight", "b5.b4.1.weight"} <= keys[
        "googlenet"
    ]
    assert {"conv1.weight", "layers.12.bn2.weight", "linear.bias"} <= keys["mobilenet_v1"]
    assert {"layers.0.shortcut.1.weight", "layers.16.conv3.weight", "bn2.weight"} <= keys[
        "mobilenet_v2"
    ]
    assert {"layer2.0.shortcut.0.weight", "layer4.1.bn2.bias"} <= keys["pre_act_resnet18"]


def test_widths_round_as_published() -> None:
    assert [scaled(n, 0.25) for n in (64, 3, 1)] == [16, 1, 1]
    # torchvision's MobileNet v2 of width 0.35: 11.2, 5.6, 8.4 and 112 channels.
    assert [scaled_by_eights(n, 0.35) for n in (32, 16, 24, 320)] == [16, 8, 8, 112]
    assert [scaled_by_eights(n, 1.0) for n in (16, 24, 1280)] == [16, 24, 1280]
    for rule in (scaled, scaled_by_eights):
        with pytest.raises(ValueError, match="width must be greater than 0, got -1"):
            rule(64, -1)


def test_the_width_of_mobilenet_v2_is_torchvisions() -> None:
    """Of the published table's 0.4089 M parameters for 10 classes."""
    with torch.device("meta"):
        theirs = build_model(
            "torchvision:mobilenet_v2", {"width_mult": 0.35, "num_classes": 10}, None
        )
        ours = ZOO["mobilenet_v2_0.35"]()
    assert millions(theirs) == pytest.approx(0.4089, abs=5e-5)
    assert sorted({m.out_channels for m in theirs.modules() if isinstance(m, nn.Conv2d)}) == sorted(
        {m.out_channels for m in ours.modules() if isinstance(m, nn.Conv2d)}
    )


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "vgg19_bn", "densenet121", "googlenet", "mobilenet_v2"]
)
def test_forms_for_large_images_are_torchvisions(name: str) -> None:
    model = build_model(f"torchvision:{name}", {"num_classes": 5}, None)
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 64, 64))
    # GoogLeNet's auxiliary classifiers are for training alone.
    assert isinstance(logits, Tensor) and logits.shape == (1, 5)
