"""What a release is made of: versions, dependencies, image, workflows and papers."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
NEEDED = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BROUGHT = ("botocore",)
"""Parts of a dependency that have a name of their own: boto3 is a face of botocore."""
PAPERS = ("CONTRIBUTING.md", "SECURITY.md")
GIT = ("git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")


def version_of(folder: Path) -> str:
    """The version that would be installed from a folder."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SETUPTOOLS_SCM")}
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "version"],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stderr} (Is the dev extra installed?)"
    return done.stdout.strip()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What decides on the version, in a folder that git knows nothing of."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".git_archival.txt", ".gitattributes"):
        shutil.copy(ROOT / name, folder)
    return folder


def git(folder: Path, *arguments: str) -> bytes:
    return subprocess.run([*GIT, *arguments], cwd=folder, check=True, capture_output=True).stdout


def test_a_copy_without_git_can_be_installed(source: Path) -> None:
    assert version_of(source) == "0.0.0"


def test_versions_are_those_of_tags(source: Path, tmp_path: Path) -> None:
    git(source, "init", "--quiet")
    git(source, "add", "--all")
    git(source, "commit", "--quiet", "--message", "one")
    assert re.match(r"0\.0\.1\.dev1\+g[0-9a-f]+$", version_of(source))
    git(source, "tag", "v1.2.3")
    git(source, "tag", "results-4")
    assert version_of(source) == "1.2.3"
    (tmp_path / "archive").mkdir()
    archive = git(source, "archive", "HEAD")
    subprocess.run(["tar", "x"], input=archive, cwd=tmp_path / "archive", check=True)
    assert version_of(tmp_path / "archive") == "1.2.3"
    git(source, "commit", "--quiet", "--allow-empty", "--message", "two")
    assert version_of(source).startswith("1.2.4.dev1+g")


def imported(folder: Path) -> set[str]:
    """Packages of others that the files of a folder import anywhere."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"autocompress"}


def test_what_is_imported_is_required() -> None:
    every = [Requirement(line) for lines in EXTRAS.values() for line in lines]
    known = {canonicalize_name(one.name) for one in [*NEEDED, *every]}
    known.update(BROUGHT)
    homes = packages_distributions()
    missing = {
        name
        for name in imported(ROOT / "autocompress")
        if not known & {canonicalize_name(home) for home in homes.get(name, [name])}
    }
    assert missing == set(), "imported, but no dependency brings them"


def test_every_dependency_has_a_lower_bound() -> None:
    lines = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    lines += [line for extra in EXTRAS.values() for line in extra]
    for one in map(Requirement, lines):
        bounds = {bound.operator for bound in one.specifier}
        assert ">=" in bounds or one.name == "autocompress", one


def test_pythons_are_the_same_everywhere() -> None:
    pattern = r"Programming Language :: Python :: (3\.\d+)"
    classified = re.findall(pattern, "\n".join(PROJECT["project"]["classifiers"]))
    assert PROJECT["project"]["requires-python"] == f">={classified[0]}"
    matrix = workflow("ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == classified
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (image,) = re.findall(r"^ARG PYTHON=(.*)$", dockerfile, flags=re.MULTILINE)
    # The newest two: libraries follow a new Python late.
    assert image in classified[-2:]


def test_the_dockerfile_fits_the_project() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE):
        for path in line.split()[:-1]:
            assert (ROOT / path).exists() and f"!{path}" in allowed, path
    for extras in re.findall(r"EXTRAS=(\S+)", text):
        assert set(extras.split(",")) <= EXTRAS.keys()
    bounds = {one.name: one.specifier for one in NEEDED}
    installed = [Requirement(line) for line in re.findall(r"'(torch\S*)'", text)]
    assert {one.name for one in installed} == {"torch", "torchvision"}
    assert all(one.specifier == bounds[one.name] for one in installed)
    for image in re.split(r"^FROM ", text, flags=re.MULTILINE):
        assert "ENTRYPOINT" not in image or "\nUSER 1000\n" in image


def workflow(name: str) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(
        (ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8")
    )
    return found


def steps_of(path: Path) -> list[dict[str, Any]]:
    jobs = workflow(path.name)["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_is_there(path: Path) -> None:
    commands = "\n".join(step.get("run", "") for step in steps_of(path))
    assert commands.strip()
    for name in re.findall(r"(?<![\w/.])((?:scripts|tests|docs)/[\w./-]+)", commands):
        assert (ROOT / name).exists(), name
        assert not name.startswith("scripts/") or os.access(ROOT / name, os.X_OK), name
    for extras in re.findall(r"'\.\[([\w,]+)\]'", commands):
        assert set(extras.split(",")) <= EXTRAS.keys()
    targets = re.findall(r"^FROM .* AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for job in workflow(path.name)["jobs"].values():
        assert set(job.get("strategy", {}).get("matrix", {}).get("target", [])) <= set(targets)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_trust_little(path: Path) -> None:
    found = workflow(path.name)
    assert found["permissions"] == {"contents": "read"}
    assert "concurrency" in found
    for job in found["jobs"].values():
        assert job["timeout-minutes"] <= 350
    for step in steps_of(path):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step.get("uses", "x@" + 40 * "0"))
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_tags_that_are_released_are_those_that_are_versions() -> None:
    # YAML reads a bare `on` as true.
    (pattern,) = workflow("release.yml")[True]["push"]["tags"]
    options = PROJECT["tool"]["hatch"]["version"]["raw-options"]
    assert options["scm"]["git"]["describe_command"][-1] == pattern


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_name_only_what_is_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in re.findall(
        r"`((?:studies|scripts|tests|autocompress|docs|\.github)/[\w./-]*)`", text
    ):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!http)([\w./-]+)", text):
        assert (ROOT / path).exists(), path
    for extras in re.findall(r"\[([a-z0-9,]+)\]'", text):
        assert set(extras.split(",")) <= EXTRAS.keys()


def test_it_can_be_cited() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "type", "authors"} <= found.keys()
    assert found["title"] == PROJECT["project"]["name"]
    assert found["license"] == PROJECT["project"]["license"]
