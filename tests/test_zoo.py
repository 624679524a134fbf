from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocompress.zoo import ZOO, BasicBlock, CifarResNet, PaddedShortcut, ResNet


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
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = CifarResNet(8, width=4).eval()
    path = tmp_path / "net.onnx"
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    torch.onnx.export(
        model, (torch.randn(2, 3, 16, 16),), path, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    session = runtime.InferenceSession(path)
    images = torch.randn(5, 3, 16, 16)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), atol=1e-4, rtol=1e-4)
