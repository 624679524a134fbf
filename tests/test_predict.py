"""The programs beside a network run by themselves and compute what PyTorch does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import autocompress
from autocompress.datasets import open_digits
from autocompress.export import save, save_model
from autocompress.formats import FORMATS
from autocompress.loaders import LazyImages
from autocompress.manifest import CLASSIFICATION, Manifest
from autocompress.models import build_model
from autocompress.plan import Plan
from autocompress.predict import SCRIPTS, script_of, write_scripts
from autocompress.profiler import Profile
from autocompress.surgery import apply_plan
from autocompress.transforms import SVD

PACKAGE = Path(autocompress.__file__).parent.parent
HERE = {name: kind for name, kind in FORMATS.items() if kind.missing is None}
ARGUMENTS = {"num_classes": 10, "in_channels": 1, "width": 8}
NORMALIZATION = {"mean": [0.3], "std": [0.4]}
PIXELS = open_digits().test.pixels[:5]  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network for digits, in every format that this machine can write, and three images."""
    torch.manual_seed(0)
    plan = Plan({"fc": SVD(4)})
    model = apply_plan(build_model("zoo:resnet_small", ARGUMENTS, None), plan).eval()
    folder = tmp_path_factory.mktemp("digits") / "best"
    report = save_model(
        folder,
        model,
        plan,
        {"source": "zoo:resnet_small", "arguments": ARGUMENTS},
        (torch.zeros(1, 1, 8, 8),),
        Profile(1, 4, 1, 8),
        formats=tuple(HERE),
        images=normalized(PIXELS),
        classes=tuple("0123456789"),
        normalization=NORMALIZATION,
        image={"mode": "L", "resize": 8, "crop": [8, 8]},
        task={"kind": CLASSIFICATION, "metric": None},
    )
    assert report.skipped == {}
    for number, pixels in enumerate(PIXELS[:3]):
        Image.fromarray(pixels[0]).save(folder.parent / f"{number}.png")
    return folder


def normalized(pixels: np.ndarray) -> Tensor:  # type: ignore[type-arg]
    mean, std = NORMALIZATION["mean"][0], NORMALIZATION["std"][0]
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def call(script: Path, *arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    if script.name != "predict_safetensors.py":
        environment.pop("PYTHONPATH")
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


SLOW = ("predict_pt2.py", "predict_torchscript.py", "predict_executorch.py")
"""Programs that import torch; one of those is tested always."""


@pytest.mark.parametrize(
    "script", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in SCRIPTS]
)
def test_each_program_computes_what_pytorch_does(saved: Path, tmp_path: Path, script: str) -> None:
    if not (saved / script).exists():
        pytest.skip("its runtime is not installed")
    images = [str(saved.parent / f"{number}.png") for number in range(3)]
    done = call(saved / script, *images, "--save", "raw.npz", "--top", "2", where=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = autocompress.load(saved)(normalized(PIXELS[:3]))
    with np.load(tmp_path / "raw.npz") as raw:
        np.testing.assert_allclose(raw["output_0"], expected.numpy(), rtol=1e-3, atol=1e-4)
    shares = expected.softmax(1)
    for line, name, row in zip(done.stdout.splitlines(), images, shares, strict=True):
        first, second = row.topk(2).indices.tolist()
        assert line == (
            f"{name}: {first} {100 * row[first]:.1f} %, {second} {100 * row[second]:.1f} %"
        )


def test_programs_know_nothing_of_autocompress(saved: Path) -> None:
    for script in SCRIPTS:
        text = (saved / script).read_text() if (saved / script).exists() else ""
        assert ("import autocompress" in text) == (script == "predict_safetensors.py")
        compile(text, script, "exec")


def test_arrays_are_pixels_or_inputs(saved: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "pixels.npy", PIXELS)
    np.save(tmp_path / "inputs.npy", normalized(PIXELS).numpy())
    files = {"model.onnx", "model.fp16.onnx"}
    assert files <= {path.name for path in saved.iterdir()}
    program = saved / "predict_onnx.py"
    for name in ("pixels", "inputs"):
        done = call(program, f"{name}.npy", "--save", f"{name}.npz", where=tmp_path)
        assert done.returncode == 0 and len(done.stdout.splitlines()) == 5, done.stderr
    half = str(saved / "model.fp16.onnx")
    done = call(program, "inputs.npy", "--model", half, "--save", "half.npz", where=tmp_path)
    assert done.returncode == 0, done.stderr
    raw = {name: np.load(tmp_path / f"{name}.npz")["output_0"] for name in ("pixels", "inputs")}
    np.testing.assert_allclose(raw["pixels"], raw["inputs"], rtol=1e-5, atol=1e-5)
    found = np.load(tmp_path / "half.npz")["output_0"]
    np.testing.assert_allclose(found, raw["inputs"], rtol=0.05, atol=0.02)


def functions(folder: Path, manifest: Manifest, files: tuple[str, ...]) -> dict[str, object]:
    """What a generated program defines, without running it."""
    (script,) = write_scripts(folder, manifest, files)
    names: dict[str, object] = {"__name__": "program", "__file__": str(folder / script)}
    exec(compile((folder / script).read_text(), script, "exec"), names)
    return names


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (32, 32), (20, 24)])
def test_images_become_inputs_as_in_training(tmp_path: Path, size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    small = generator.integers(0, 255, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    image.save(tmp_path / "image.png")
    normalization = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    images = LazyImages(lambda _: image, np.zeros(1, np.int64), 28, "none", normalization)
    about = {
        "inputs": [[1, 3, 28, 28]],
        "normalization": normalization,
        "image": {"mode": "RGB", "resize": images.shorter_side, "crop": [28, 28]},
    }
    program = functions(tmp_path, Manifest(), ("model.onnx",))
    (found,) = program["read_inputs"](str(tmp_path / "image.png"), about)  # type: ignore[operator]
    expected, _ = images[0]
    assert found.shape == (1, 3, 28, 28)
    # Pillow and torchvision round pixels differently: by one or two of 255.
    assert np.abs(found[0] - expected.numpy()).max() <= 2.5 / 255 / 0.2


def test_other_outputs_are_described(tmp_path: Path) -> None:
    program = functions(tmp_path, Manifest(), ("model.onnx",))
    outputs = [np.array([[1.5, -2.0]]), np.arange(48.0).reshape(1, 3, 4, 4)]
    (line,) = program["lines"](outputs, {"classes": ["x", "y"]}, 3)  # type: ignore[operator]
    assert line == "x 1.5, y -2; 3 x 4 x 4, from 0 to 47, mean 23.5"


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    program = functions(tmp_path, Manifest(), ("model.onnx",))
    read = program["read_inputs"]
    Image.fromarray(PIXELS[0, 0]).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", PIXELS)
    about = {"inputs": [[1, 1, 8, 8]], "image": None, "normalization": None}
    with pytest.raises(SystemExit, match="how images become inputs"):
        read(str(tmp_path / "a.png"), about)  # type: ignore[operator]
    with pytest.raises(SystemExit, match="how pixels are normalized"):
        read(str(tmp_path / "a.npy"), about)  # type: ignore[operator]
    with pytest.raises(SystemExit, match="has 2 inputs, not 1"):
        read(str(tmp_path / "a.npy"), {**about, "inputs": [[1], [1]]})  # type: ignore[operator]


def test_a_network_from_python_has_no_program_for_its_weights(tmp_path: Path) -> None:
    files = ("model.safetensors", "model.onnx")
    assert write_scripts(tmp_path, Manifest(), files) == ("predict_onnx.py",)
    origin = {"source": "zoo:resnet20", "arguments": {}}
    both = write_scripts(tmp_path, Manifest(origin=origin), files)
    assert both == ("predict_onnx.py", "predict_safetensors.py")


def test_an_int8_file_alone_has_a_program(tmp_path: Path) -> None:
    assert script_of("model.int8.onnx") == "predict_onnx.py"
    write_scripts(tmp_path, Manifest(), ("model.int8.onnx",))
    assert 'HERE / "model.int8.onnx"' in (tmp_path / "predict_onnx.py").read_text()


def test_a_network_that_takes_bytes_is_given_bytes(tmp_path: Path) -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.float() / 255)

    example, model = (torch.zeros(1, 4, dtype=torch.uint8),), Bytes()
    profile = Profile(1, 4, 1, 8)
    save_model(tmp_path / "one", model, Plan({}), None, example, profile, formats=("onnx",))
    # Tuned further and saved anew it still takes them.
    report = save(model, tmp_path / "two", like=tmp_path / "one", formats=("onnx", "pt2"))
    assert not report.skipped
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    np.save(tmp_path / "pixels.npy", pixels)
    for program in ("one/predict_onnx.py", "two/predict_onnx.py", "two/predict_pt2.py"):
        done = call(tmp_path / program, "pixels.npy", "--save", "raw.npz", where=tmp_path)
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / "raw.npz") as raw, torch.no_grad():
            expected = model(torch.from_numpy(pixels)).numpy()
            np.testing.assert_allclose(raw["output_0"], expected, atol=1e-5)


def test_several_inputs_come_from_one_file(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"sum": a + b, "left": a}

    example = (torch.zeros(1, 4), torch.zeros(1, 4))
    save_model(
        tmp_path / "two", Sum(), Plan({}), None, example, Profile(1, 4, 1, 8), formats=("pt2",)
    )
    a, b = np.ones((3, 4), np.float32), np.full((3, 4), 2, np.float32)
    np.savez(tmp_path / "both.npz", a=a, b=b)
    program = tmp_path / "two" / "predict_pt2.py"
    done = call(program, "both.npz", "--save", "raw.npz", where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "both.npz: 3, 3, 3, 3; 1, 1, 1, 1"
    with np.load(tmp_path / "raw.npz") as raw:
        np.testing.assert_array_equal(raw["output_0"], a + b)
    assert json.loads((tmp_path / "two" / "model.json").read_text())["image"] is None
