from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autocompress.errors import ConfigError
from autocompress.models import build_model, list_models, load_state, load_weights

SMALL = {"width": 4, "num_classes": 3}


def small() -> nn.Module:
    return build_model("zoo:resnet20", SMALL, None)


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_networks_come_in_evaluation_mode() -> None:
    assert not small().training
    assert build_model("torchvision:resnet18", {"num_classes": 7}, None).fc.out_features == 7


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"model_state_dict": state},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    ],
    ids=["plain", "state_dict", "model", "model_state_dict", "module.", "_orig_mod.", "both"],
)
def test_state_dicts_load_however_they_are_wrapped(wrap: Any, tmp_path: Path) -> None:
    trained = small()
    torch.save(wrap(trained.state_dict()), tmp_path / "w.pth")
    assert same(build_model("zoo:resnet20", SMALL, str(tmp_path / "w.pth")), trained)


def test_safetensors_load(tmp_path: Path) -> None:
    trained = small()
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    assert same(build_model("zoo:resnet20", SMALL, str(tmp_path / "w.safetensors")), trained)


def test_checkpoints_from_before_batch_counters_load(tmp_path: Path) -> None:
    trained = small()
    old = {k: v for k, v in trained.state_dict().items() if "num_batches" not in k}
    torch.save(old, tmp_path / "w.th")
    assert same(build_model("zoo:resnet20", SMALL, str(tmp_path / "w.th")), trained)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state = small().state_dict()
    del state["bn1.bias"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ConfigError) as caught:
        load_weights(build_model("zoo:resnet20", {"width": 4}, None), tmp_path / "w.pt")
    text = str(caught.value)
    assert "missing: bn1.bias;" in text and "unexpected: extra;" in text
    assert "linear.weight (file (3, 16), network (10, 16))" in text


def test_long_lists_of_names_are_cut(tmp_path: Path) -> None:
    torch.save({"conv1.weight": small().state_dict()["conv1.weight"]}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"missing: ([\w.]+, ){4}[\w.]+ and \d+ more"):
        load_weights(small(), tmp_path / "w.pt")


def test_weights_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = small().state_dict()
    del state["bn1.bias"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ConfigError):
        load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_pickled_networks_are_refused(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "whole.pt")
    with pytest.raises(ConfigError, match=r"holds Python objects.*torch.save\(model.state_dict"):
        load_weights(small(), tmp_path / "whole.pt")


@pytest.mark.parametrize(
    ("name", "content"),
    [("w.pt", b""), ("w.pt", b"hello"), ("w.safetensors", b"hello")],
)
def test_broken_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        load_weights(small(), tmp_path / name)


def test_files_without_names_are_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="no weights by name"):
        load_weights(small(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="no such file"):
        load_weights(small(), tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("zoo:resnet21", "no such network. Did you mean 'resnet"),
        ("zo:resnet20", "no such source. Did you mean 'zoo'"),
        ("torchvision:resnt18", "Did you mean 'resnet18'"),
        ("nosuch.module:net", "no module 'nosuch.module'"),
        (
            "autocompress.zoo.resnet:resnet_smal",
            "no function 'resnet_smal'. Did you mean 'resnet_small'",
        ),
        ("python:Net", "only Python can give it again"),
    ],
)
def test_unknown_networks_are_refused_without_building(source: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(source, {}, None)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("zoo:resnet20", {"clases": 3}, "unexpected keyword argument 'clases'"),
        ("zoo:resnet20", {"shortcut": "C"}, "'A' or 'B', got 'C'"),
        ("torchvision:resnet18", {"clases": 3}, "unexpected keyword argument 'clases'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    source: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(source, arguments, None)


def test_the_zoo_has_no_pretrained_weights() -> None:
    with pytest.raises(ConfigError, match="zoo:resnet20 has none"):
        build_model("zoo:resnet20", {}, "pretrained")


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models.get_model", offline)
    with pytest.raises(ConfigError, match=r"can't be downloaded \(no network\).*a file"):
        build_model("torchvision:resnet18", {}, "pretrained")


def test_a_function_of_the_users_is_found_in_the_studys_folder(tmp_path: Path) -> None:
    (tmp_path / "my_networks_1.py").write_text(
        "from torch import nn\n"
        "def net(width=2):\n    return nn.Conv2d(1, width, 3)\n"
        "def number():\n    return 3\n",
        encoding="utf-8",
    )
    path = list(sys.path)
    try:
        model = build_model("my_networks_1:net", {"width": 5}, None, tmp_path)
        assert isinstance(model, nn.Conv2d) and model.out_channels == 5
        with pytest.raises(ConfigError, match="must return a torch.nn.Module, got int"):
            build_model("my_networks_1:number", {}, None, tmp_path)
        with pytest.raises(ConfigError, match="Did you mean 'net'"):
            build_model("my_networks_1:nett", {}, None, tmp_path)
    finally:
        sys.path[:] = path


def test_a_module_that_lacks_a_package_says_which(tmp_path: Path) -> None:
    (tmp_path / "my_networks_2.py").write_text("import nosuchpackage\n", encoding="utf-8")
    path = list(sys.path)
    try:
        with pytest.raises(ConfigError, match="my_networks_2 needs nosuchpackage"):
            build_model("my_networks_2:net", {}, None, tmp_path)
    finally:
        sys.path[:] = path


def test_networks_are_listed_by_source() -> None:
    names = list_models()
    assert "resnet20" in names["zoo"] and "resnet50" in names["torchvision"]
    assert "fasterrcnn_resnet50_fpn" not in names["torchvision"]


def test_timm_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'autocompress\[zoo\]'"):
        build_model("timm:resnet18", {}, None)
    assert "timm" not in list_models()


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm_networks_build() -> None:
    model = build_model("timm:resnet10t", {"num_classes": 3, "in_chans": 1}, None)
    output: Tensor = model(torch.randn(1, 1, 32, 32))
    assert output.shape == (1, 3)
    with pytest.raises(ConfigError, match="Did you mean 'resnet18'"):
        build_model("timm:resnt18", {}, None)


def test_a_web_page_is_no_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_text("<!DOCTYPE html>")
    with pytest.raises(ConfigError, match="Was a web page saved instead"):
        load_weights(build_model("zoo:resnet20", {}, None), tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("zoo:resnet20", {"num_classes": -1}, "num_classes = -1 must be a whole number >= 1"),
        ("zoo:resnet20", {"width": 0.5}, "width = 0.5 must be a whole number >= 1"),
        ("zoo:vgg19", {"width": 0}, "width = 0 must be a number > 0"),
        ("torchvision:vit_b_16", {"image_size": 100}, "don't fit torchvision:vit_b_16"),
        (".net:make", {}, "is no name of a module"),
    ],
)
def test_what_can_not_be_built_is_said_in_a_line(
    source: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(source, arguments, None)


class _Versioned(nn.Module):
    """Refuses a state that doesn't say which version of it wrote it, as torchvision's MNASNet."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
        if local.get("version") != 2:
            raise ValueError(f"version should be 2, not {local.get('version')}")
        super()._load_from_state_dict(state, prefix, local, *rest)


def test_bare_tensors_are_of_the_versions_of_today(tmp_path: Path) -> None:
    one, other = _Versioned(), _Versioned()
    state = dict(one.state_dict())
    load_state(other, state)
    assert torch.equal(one.fc.weight, other.fc.weight)
    with pytest.raises(RuntimeError, match="fc.bias"):
        load_state(other, {"fc.weight": one.fc.weight})
    torch.save(state, tmp_path / "w.pt")
    load_weights(_Versioned(), tmp_path / "w.pt")
