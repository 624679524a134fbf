"""A saved network is loaded where only its folder is, trained further, and saved again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet, make_images
from torch import Tensor, nn

import autocompress
from autocompress.channels import KeptChannels
from autocompress.errors import ConfigError
from autocompress.export import load, save, save_model
from autocompress.grouping import find_groups
from autocompress.manifest import read_manifest
from autocompress.models import build_model, rebuilding_arguments
from autocompress.plan import Plan
from autocompress.profiler import Profile, profile_model
from autocompress.surgery import apply_plan
from autocompress.transforms import SVD, Tucker2

IMAGES, LABELS = make_images(64, seed=1)
EXAMPLE = (IMAGES[:1],)


class Tied(TinyNet):
    """A convolution under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.and_again = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.and_again.weight = self.again.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        x = self.bn2(self.conv(x)).relu()
        x = self.and_again(self.again(x).relu())
        return self.fc(x.mean((2, 3)))


def train(model: nn.Module, images: Tensor, labels: Tensor, rate: float) -> tuple[float, float]:
    """Some steps of plain PyTorch; the loss before and after."""
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    model.train()
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses[0], losses[-1]


def saved(folder: Path, model: nn.Module, plan: Plan, example: Any, origin: Any = None) -> None:
    profile = profile_model(model, example, latency=False)
    save_model(
        folder, model, plan, origin, example, profile, formats=(), classes=("a", "b", "c", "d"),
        normalization={"mean": [0.5], "std": [0.25]},
    )  # fmt: skip


def test_a_loaded_network_is_trained_further_and_saved_again(tmp_path: Path) -> None:
    plan = Plan({"stem": SVD(4), "conv": Tucker2(8, 12)})
    torch.manual_seed(0)
    saved(tmp_path / "best", apply_plan(TinyNet().eval(), plan), plan, EXAMPLE)
    model = load(tmp_path / "best", model=TinyNet())
    before, after = train(model, IMAGES, LABELS, 0.01)
    assert after < before
    report = save(model, tmp_path / "new", like=tmp_path / "best", images=IMAGES)
    assert set(report.checks) == {"model.onnx", "model.pt2"}
    assert report.checked_with == "64 real inputs"
    again = load(tmp_path / "new", model=TinyNet())
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert not torch.equal(again(IMAGES), load(tmp_path / "best", model=TinyNet())(IMAGES))
    old, new = (read_manifest(tmp_path / name) for name in ("best", "new"))
    assert new == old
    (output,) = autocompress.open_onnx(tmp_path / "new" / "model.onnx")(IMAGES)
    torch.testing.assert_close(output, model(IMAGES).detach(), rtol=1e-3, atol=1e-4)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    plan = Plan({"conv": SVD(4)})
    torch.manual_seed(0)
    saved(tmp_path / "best", apply_plan(Tied().eval(), plan), plan, EXAMPLE)
    model = load(tmp_path / "best", model=Tied())
    before, after = train(model, IMAGES, LABELS, 0.01)
    assert after < before
    assert model.get_parameter("again.weight") is model.get_parameter("and_again.weight")
    save(model, tmp_path / "best", like=tmp_path / "best", formats=())
    assert torch.equal(load(tmp_path / "best", model=Tied())(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    "source", ["zoo:resnet_small", "torchvision:resnet18", "torchvision:mobilenet_v2",
               "timm:resnet10t"],
)  # fmt: skip
def test_networks_by_name_lose_channels_and_ranks_and_go_on(tmp_path: Path, source: str) -> None:
    if source.startswith("timm:"):
        pytest.importorskip("timm")
    arguments = {"num_classes": 4}
    torch.manual_seed(0)
    base = build_model(source, arguments, None)
    example = (torch.randn(1, 3, 32, 32),)
    groups, _ = find_groups(base, example)
    group = next(g for g in groups if g.channels >= 16)
    inner = [n for n, m in base.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    plan = Plan(
        {inner[-1]: SVD(8)}, {group.name: KeptChannels(group, tuple(range(group.channels // 2)))}
    )
    model = apply_plan(base, plan).eval()
    saved(tmp_path / "best", model, plan, example, {"source": source, "arguments": arguments})
    own = load(tmp_path / "best")
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    assert torch.equal(own(images), model(images))
    before, after = train(own, images, labels, 0.003)
    assert after < before
    save(own, tmp_path / "new", like=tmp_path / "best", formats=())
    assert torch.equal(load(tmp_path / "new")(images), own(images))


def test_another_network_is_not_saved(tmp_path: Path) -> None:
    plan = Plan({"fc": SVD(2)})
    saved(tmp_path / "best", apply_plan(TinyNet().eval(), plan), plan, EXAMPLE)
    with pytest.raises(ConfigError, match=r"is not the one in .*Give what autocompress.load"):
        save(TinyNet(), tmp_path / "new", like=tmp_path / "best")
    with pytest.raises(ConfigError, match="There is no folder"):
        save(TinyNet(), tmp_path / "new", like=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="Unknown format"):
        save(TinyNet(), tmp_path / "new", like=tmp_path / "best", formats=("onx",))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", ["zoo:resnet_small", "torchvision:resnet18"])
def test_only_the_folder_is_needed(tmp_path: Path, source: str) -> None:
    arguments = {"num_classes": 4}
    plan = Plan({"fc": SVD(2)})
    model = apply_plan(build_model(source, arguments, None), plan).eval()
    example = (torch.randn(1, 3, 32, 32),)
    saved(tmp_path / "best", model, plan, example, {"source": source, "arguments": arguments})
    shutil.move(tmp_path / "best", tmp_path / "elsewhere")
    program = (
        "import sys, torch, autocompress\n"
        "model = autocompress.load('elsewhere')\n"
        "torch.save(model(torch.ones(2, 3, 32, 32)).detach(), 'out.pt')\n"
        "names = ('optuna', 'autocompress.task', 'autocompress.training', 'autocompress.data')\n"
        "sys.exit(', '.join(name for name in names if name in sys.modules) or None)\n"
    )
    root = str(Path(autocompress.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": root, "HOME": str(tmp_path), "TORCH_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    output = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(output, model(torch.ones(2, 3, 32, 32)).detach())
    assert not (tmp_path / "cache").exists()  # nothing was downloaded


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("torchvision:resnet19", "no such network"),
        ("zoo:resnet_smal", "no such network"),
        ("nowhere.networks:make", "there is no module 'nowhere.networks'"),
    ],
)
def test_what_a_network_needs_is_said(tmp_path: Path, source: str, wanted: str) -> None:
    saved(tmp_path / "best", nn.Linear(4, 3), Plan({}), (torch.zeros(1, 4),))
    path = tmp_path / "best" / "model.json"
    origin = {"source": source, "arguments": {}}
    versions = {"torch": "2.99", "torchvision": "0.99"}
    stored = json.loads(path.read_text()) | {"origin": origin, "versions": versions}
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="can't be built here: ") as error:
        load(tmp_path / "best", trust=True)
    assert wanted in str(error.value)
    assert "saved with torch 2.99, torchvision 0.99" in str(error.value)
    assert "model=YourNet()" in str(error.value)
    instance = load(tmp_path / "best", model=nn.Linear(4, 3))
    assert isinstance(instance, nn.Linear)


def test_pretrained_networks_are_built_again_as_they_were() -> None:
    import torchvision

    found = rebuilding_arguments("torchvision:googlenet", {"num_classes": 10}, "pretrained")
    assert found == {"num_classes": 10, "transform_input": True, "aux_logits": False}
    network = torchvision.models.googlenet(init_weights=False, **found)
    assert network.transform_input and network.aux1 is None
    for source, weights in (
        ("torchvision:googlenet", None),
        ("torchvision:resnet18", "pretrained"),
    ):
        assert rebuilding_arguments(source, {"num_classes": 10}, weights) == {"num_classes": 10}


def test_a_folder_of_an_earlier_version_loads(tmp_path: Path) -> None:
    saved(tmp_path / "best", nn.Linear(4, 3), Plan({}), (torch.zeros(1, 4),))
    path = tmp_path / "best" / "model.json"
    stored = json.loads(path.read_text())
    for name in ("image", "task"):
        del stored[name]
    path.write_text(json.dumps(stored))
    assert isinstance(load(tmp_path / "best", model=nn.Linear(4, 3)), nn.Linear)
    assert read_manifest(tmp_path / "best").image is None
    assert Profile.from_dict(json.loads((tmp_path / "best" / "profile.json").read_text()))
