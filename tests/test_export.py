"""A saved network comes back bit by bit; exported files agree with it; nothing half is left."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyNet, make_images
from torch import Tensor, nn

from autocompress import export, formats
from autocompress.errors import AutocompressError, ConfigError
from autocompress.export import ExportReport, load, save_model
from autocompress.formats import check_onnx, check_pt2, export_onnx, export_pt2, quick_onnx
from autocompress.manifest import read_manifest
from autocompress.models import build_model
from autocompress.plan import Plan
from autocompress.profiler import Profile, profile_model
from autocompress.runtime import open_onnx
from autocompress.surgery import apply_plan
from autocompress.transforms import SVD, Tucker2

PLAN = Plan({"stem": SVD(4), "conv": Tucker2(8, 12)})
EXAMPLE = (torch.zeros(1, 1, 8, 8),)
IMAGES = make_images(16, seed=5)[0]
NORMALIZATION = {"mean": [0.5], "std": [0.25]}


class TwoHeads(nn.Module):
    """Two inputs and a mapping of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(2, 3)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"sum": self.left(a) + self.right(b), "left": self.left(a)}


class Branching(nn.Module):
    """Can't be traced: the values decide what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else -self.fc(x)


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def compressed() -> nn.Module:
    torch.manual_seed(3)
    model = TinyNet()
    model(IMAGES)  # batch-norm statistics that are not the initial ones
    return apply_plan(model.eval(), PLAN)


def save(folder: Path, model: nn.Module, **options: Any) -> ExportReport:
    """Save with little around it; nothing is exported unless `formats` says so."""
    settings: dict[str, Any] = {
        "plan": Plan({}), "origin": None, "example": EXAMPLE, "profile": Profile(1, 4, 1, 8),
        "formats": (), **options,
    }  # fmt: skip
    return save_model(folder, model, **settings)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return compressed()


@pytest.fixture(scope="module")
def saved(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    folder = tmp_path_factory.mktemp("study") / "best"
    report = save_model(
        folder, model, PLAN, None, EXAMPLE, profile_model(model, EXAMPLE, latency=False),
        images=IMAGES, classes=("a", "b", "c", "d"), normalization=NORMALIZATION,
    )  # fmt: skip
    return folder, report


def test_folder_is_complete(saved: tuple[Path, ExportReport], model: nn.Module) -> None:
    folder, report = saved
    names = {"model.safetensors", "plan.json", "model.json", "profile.json", "model.onnx"}
    assert set(report.files) == names | {"model.pt2"}
    assert report.scripts == ("predict_onnx.py", "predict_pt2.py")
    others = {"export.json", "README.md", *report.scripts}
    assert {path.name for path in folder.iterdir()} == {*report.files, *others}
    assert all(path.name[0] != "." for path in folder.parent.iterdir())
    assert all((folder / name).stat().st_size == size for name, size in report.files.items())
    written = json.loads((folder / "export.json").read_text())
    assert written == {
        "files": report.files,
        "checks": report.checks,
        "skipped": {},
        "checked_with": "16 real inputs",
        "scripts": list(report.scripts),
    }
    profile = Profile.from_dict(json.loads((folder / "profile.json").read_text()))
    assert profile == profile_model(model, EXAMPLE, latency=False)


def test_exported_files_agree_at_any_batch_size(
    saved: tuple[Path, ExportReport], model: nn.Module
) -> None:
    folder, report = saved
    assert set(report.checks) == {"model.onnx", "model.pt2"}
    largest = model(IMAGES).abs().max().item()
    assert all(0 <= value <= 1e-4 * largest for value in report.checks.values())
    for size in (1, 3, 7):
        assert check_onnx(folder / "model.onnx", model, IMAGES[:size]) <= 1e-4 * largest
        assert check_pt2(folder / "model.pt2", model, IMAGES[:size]) <= 1e-4 * largest


def test_onnx_has_plain_names_and_a_free_batch(saved: tuple[Path, ExportReport]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(saved[0] / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (image,), (output,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape) == ("input", ["batch", 1, 8, 8])
    assert (output.name, output.shape) == ("output", ["batch", 4])


def test_exported_files_tell_nothing_of_the_machine(saved: tuple[Path, ExportReport]) -> None:
    import zipfile

    place = str(Path(__file__).parent).encode()
    library = os.path.dirname(torch.__file__).encode()
    contents = [(saved[0] / "model.onnx").read_bytes()]
    with zipfile.ZipFile(saved[0] / "model.pt2") as archive:
        contents += [archive.read(name) for name in archive.namelist()]
    assert not any(path in content for path in (place, library) for content in contents)


def test_loaded_network_is_bit_equal(saved: tuple[Path, ExportReport], model: nn.Module) -> None:
    baseline = TinyNet()
    before = {name: value.clone() for name, value in baseline.state_dict().items()}
    loaded = load(saved[0], model=baseline)
    assert not loaded.training
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert all(torch.equal(value, before[name]) for name, value in baseline.state_dict().items())


def test_network_with_an_origin_needs_no_model(tmp_path: Path) -> None:
    origin = {"source": "zoo:resnet_small", "arguments": {"width": 8, "num_classes": 3}}
    network = build_model(origin["source"], origin["arguments"], None)
    plan = Plan({"fc": SVD(2)})
    made = apply_plan(network, plan)
    example = (torch.zeros(1, 3, 16, 16),)
    save(tmp_path / "best", made, plan=plan, origin=origin, example=example)
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(load(tmp_path / "best")(images), made(images))


def test_manifest_says_how_images_must_be(saved: tuple[Path, ExportReport]) -> None:
    manifest = read_manifest(saved[0])
    assert manifest.classes == ("a", "b", "c", "d")
    assert manifest.inputs == ((1, 1, 8, 8),)
    assert manifest.normalization == NORMALIZATION
    assert manifest.origin is None
    assert manifest.versions["torch"] == torch.__version__


def test_python_network_asks_for_an_instance(saved: tuple[Path, ExportReport]) -> None:
    with pytest.raises(ConfigError, match=r"load\('.*best', model=YourNet\(\)\)"):
        load(saved[0])


def test_another_network_is_refused(saved: tuple[Path, ExportReport]) -> None:
    with pytest.raises(ConfigError, match="don't fit the network TinyNet that was given.*size"):
        load(saved[0], model=TinyNet(width=32))


def test_code_of_others_runs_only_when_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Linear(4, 3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    network = nn.Linear(4, 3)
    origin = {"source": "own_networks:make", "arguments": {}}
    save(tmp_path / "best", network, origin=origin, example=(torch.zeros(1, 4),))
    with pytest.raises(ConfigError, match="trust=True"):
        load(tmp_path / "best")
    assert "own_networks" not in sys.modules
    loaded = load(tmp_path / "best", trust=True)
    assert torch.equal(loaded.get_parameter("weight"), network.weight)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    with pytest.raises(ConfigError, match="no folder"):
        load(folder)
    folder.mkdir()
    with pytest.raises(ConfigError, match="has no model.json"):
        load(folder)
    for name in ("model.safetensors", "plan.json"):
        save(folder, TinyNet())
        (folder / name).unlink()
        with pytest.raises(ConfigError, match=f"has no {name}"):
            load(folder, model=TinyNet())
    for name in ("model.safetensors", "model.json"):
        save(folder, TinyNet())
        (folder / name).write_text("{}")
        with pytest.raises(ConfigError, match=f"{name} is damaged"):
            load(folder, model=TinyNet())


def test_newer_folder_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "best", TinyNet())
    path = tmp_path / "best" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(ConfigError, match="version 99"):
        load(tmp_path / "best", model=TinyNet())


def test_tied_weights_and_half_precision_come_back(tmp_path: Path) -> None:
    network = Tied().half().eval()
    save(tmp_path / "tied", network, example=(torch.zeros(1, 4),))
    loaded = load(tmp_path / "tied", model=Tied())
    x = torch.randn(5, 4).half()
    assert torch.equal(loaded(x), network(x))
    assert loaded.get_parameter("first.weight").dtype == torch.float16


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    network = TwoHeads()
    example = (torch.randn(1, 4), torch.randn(1, 2))
    images = (torch.randn(6, 4), torch.randn(6, 2))
    export_onnx(network, example, tmp_path / "two.onnx")
    export_pt2(network, example, tmp_path / "two.pt2")
    assert check_onnx(tmp_path / "two.onnx", network, images) < 1e-5
    assert check_pt2(tmp_path / "two.pt2", network, images) < 1e-5
    assert network.training and network.left.weight.requires_grad


def test_differing_file_is_refused_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Linear(4, 3)
    other = nn.Linear(4, 3)
    example = (torch.randn(2, 4),)
    export_pt2(network, example, tmp_path / "own.pt2")
    with pytest.raises(AutocompressError, match="own.pt2 differs from the network: by"):
        check_pt2(tmp_path / "own.pt2", other, example)

    wrong = formats._trace(formats._portable(other), example)
    monkeypatch.setattr(formats, "_trace", lambda model, example: wrong)
    report = save(tmp_path / "best", network, example=example, formats=("pt2", "onnx"))
    assert report.checks == {}
    assert "model.pt2 differs" in report.skipped["model.pt2"]
    assert "model.onnx differs" in report.skipped["model.onnx"]
    assert not list((tmp_path / "best").glob("model.[op]*"))
    assert torch.equal(load(tmp_path / "best", nn.Linear(4, 3))(example[0]), network(example[0]))


def test_network_that_cannot_be_traced_keeps_its_weights(tmp_path: Path) -> None:
    example = (torch.ones(1, 4),)
    report = save(tmp_path / "best", Branching(), example=example, formats=("onnx", "pt2"))
    assert set(report.skipped) == {"model.onnx", "model.pt2"}
    assert "can't trace Branching" in report.skipped["model.pt2"]
    assert isinstance(load(tmp_path / "best", Branching()), Branching)


def test_unknown_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'onnx'"):
        save(tmp_path / "best", TinyNet(), formats=("onx",))
    assert not list(tmp_path.iterdir())


def test_earlier_network_is_replaced_and_foreign_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    save(folder, TinyNet())
    (folder / "model.onnx").write_text("of the earlier network")
    (folder / "notes.txt").write_text("mine")
    (folder / "figures").mkdir()
    (folder / "figures" / "a.txt").write_text("mine too")
    network = TinyNet()
    save(folder, network)
    assert torch.equal(load(folder, TinyNet())(IMAGES), network.eval()(IMAGES))
    assert not (folder / "model.onnx").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "figures" / "a.txt").read_text() == "mine too"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is no saved network"):
        save(tmp_path, TinyNet())
    with pytest.raises(ConfigError, match="is no saved network"):
        save(tmp_path / "thesis.txt", TinyNet())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("step", ["_write_formats", "_keep_foreign_files"])
def test_crash_leaves_the_earlier_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder = tmp_path / "best"
    network = TinyNet().eval()
    save(folder, network)

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, step, crash)
    with pytest.raises(KeyboardInterrupt):
        save(folder, TinyNet())
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert torch.equal(load(folder, TinyNet())(IMAGES), network(IMAGES))


def test_leftover_of_a_kill_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".best.partial").mkdir()
    (tmp_path / ".best.partial" / "junk").write_text("half")
    save(tmp_path / "best", TinyNet())
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert not (tmp_path / "best" / "junk").exists()


def test_network_set_aside_by_a_kill_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = TinyNet().eval()
    save(tmp_path / "best", network)
    (tmp_path / "best").rename(tmp_path / ".best.replaced")
    monkeypatch.setattr(export, "_write_formats", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path / "best", TinyNet())
    assert torch.equal(load(tmp_path / "best", TinyNet())(IMAGES), network(IMAGES))


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"steps": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(AutocompressError, match="only tensors can be saved"):
        save(tmp_path / "best", Stateful(4, 3))
    assert not list(tmp_path.iterdir())


def test_a_quick_export_is_quick_even_where_warnings_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(*_: Any) -> None:
        raise AssertionError("the slow exporter was asked")

    monkeypatch.setattr(formats, "export_onnx", slow)
    assert quick_onnx(torch.nn.Conv2d(1, 2, 3).eval(), (torch.rand(1, 1, 5, 5),))


def test_a_quick_export_falls_back_on_the_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch may drop the TorchScript exporter, and it knows fewer operations."""
    real = torch.onnx.export

    def without(*args: Any, dynamo: bool = True, **settings: Any) -> Any:
        if not dynamo:
            raise RuntimeError("no such exporter")
        return real(*args, dynamo=dynamo, **settings)

    monkeypatch.setattr(torch.onnx, "export", without)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten()).eval()
    image = torch.rand(1, 1, 5, 5)
    with torch.no_grad():
        expected = network(image)
    (output,) = open_onnx(quick_onnx(network, (image,)))(image)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_a_network_that_copies_its_sizes_is_traced_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Warnings are errors here, and after an error the slow exporter would be called.
    monkeypatch.setattr(formats, "export_onnx", lambda *_: pytest.fail("not traced"))

    class Copying(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            height = torch.tensor(x.shape[2], dtype=torch.float32)
            return x / height

    assert quick_onnx(Copying(), (torch.zeros(1, 3, 8, 8),))
