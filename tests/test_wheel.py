"""A stranger's path: from the built wheel alone, without the checkout, to a network in service.

The folder `stranger` is somebody's project, with a network, loaders, batches and a metric of its
own. It is copied away and compressed there, by a study file and from Python; the ONNX file is
carried to a third place, and gives there what the report says.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stranger.shapes import draw

ROOT = Path(__file__).resolve().parent.parent
STRANGER = ROOT / "tests" / "stranger"
OURS = (".toml", ".py", ".j2", ".typed")


@dataclass(frozen=True)
class Installed:
    """An environment that has the wheel, and all that this one has, but not the checkout."""

    folder: Path

    def run(self, *arguments: str | Path, cwd: Path, program: str = "python") -> str:
        """What a program of the environment prints, started somewhere else."""
        variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            [self.folder / "bin" / program, *arguments],
            cwd=cwd,
            env={**variables, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built here and now."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr} (Is the dev extra installed?)"
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in a new environment. Lines of a .pth file are not searched for .pth files: the
    editable install of this environment is not seen there."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    theirs = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "theirs.pth").write_text("\n".join(theirs))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    options = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    done = subprocess.run([*pip, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Installed(folder)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The stranger's project."""
    return Path(shutil.copytree(STRANGER, tmp_path / "project"))


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def served(installed: Installed, folder: Path, seed: int, place: Path) -> float:
    """The metric of the ONNX file on the study's test images, in a place that has little else."""
    place.mkdir()
    shutil.copy(folder / "best" / "model.onnx", place)
    shutil.copy(STRANGER / "serve.py", place)
    pixels, kinds = draw(256, 3 * seed + 2)
    np.savez(place / "images.npz", pixels=pixels, kind=kinds)
    return float(installed.run("-I", "serve.py", cwd=place))


def test_the_wheel_holds_all_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    package = ROOT / "autocompress"
    wanted = {str(p.relative_to(ROOT)) for p in package.rglob("*") if p.suffix in OURS}
    assert wanted <= found
    # Nothing else but what describes it: no tests, scripts, caches or runs.
    assert {n for n in found - wanted if ".dist-info/" not in n} == set()
    assert any(name.endswith("licenses/LICENSE") for name in found)


def test_the_wheel_is_what_is_imported(installed: Installed, tmp_path: Path) -> None:
    ask = "import autocompress; print(autocompress.__file__); print(autocompress.__version__)"
    place, version = installed.run("-c", ask, cwd=tmp_path).split()
    assert Path(place).is_relative_to(installed.folder)
    said = installed.run("--version", cwd=tmp_path, program="autocompress")
    assert said.strip() == f"autocompress {version}"


def test_ready_studies_are_known_by_name(installed: Installed, tmp_path: Path) -> None:
    ask = "from autocompress.config import load_config as load; print(load().name, load({!r}).name)"
    said = installed.run("-c", ask.format("segmentation"), cwd=tmp_path)
    assert said.split() == ["quickstart", "segmentation"]


def test_by_a_study_file_to_a_served_network(
    installed: Installed, home: Path, tmp_path: Path
) -> None:
    options = ("--workers", "0", "--device", "cpu")
    installed.run("study.toml", *options, cwd=home, program="autocompress")
    folder = home / "runs" / "by-file"
    result = result_of(folder)
    assert result["met"] and result["trials"]["exploration"] == 2
    assert result["best"]["profile"]["params"] < result["baseline"]["profile"]["params"]
    assert (folder / "report.html").stat().st_size > 10_000
    # Better than guessing, so that to be equal means something.
    assert result["best"]["test_score"] > 40.0
    score = served(installed, folder, seed=0, place=tmp_path / "product")
    assert score == pytest.approx(result["best"]["test_score"], abs=0.01)


@pytest.mark.slow
def test_from_python_to_a_served_network(installed: Installed, home: Path, tmp_path: Path) -> None:
    said = installed.run("compress_it.py", cwd=home)
    folder = home / said.strip()
    result = result_of(folder)
    assert result["best"]["profile"]["params"] < result["baseline"]["profile"]["params"]
    assert result["best"]["test_score"] > 40.0
    score = served(installed, folder, seed=1, place=tmp_path / "product")
    assert score == pytest.approx(result["best"]["test_score"], abs=0.01)
