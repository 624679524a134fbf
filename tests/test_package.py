"""The shape of the package: its public names, the order of imports, the README, the studies."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

import autocompress
from autocompress.config import load_config, parse_config
from autocompress.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "autocompress"
STUDIES = sorted((ROOT / "studies").glob("*.toml"))


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("autocompress", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it; not those for type checkers only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found & set(modules()) - {"autocompress"}


def test_public_names_are_there() -> None:
    for name in autocompress.__all__:
        assert getattr(autocompress, name) is not None
    assert sorted(autocompress.__all__, key=str.lower) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        autocompress.nonsense  # noqa: B018


def test_imports_have_no_cycle() -> None:
    left = {name: imports_of(path) - {name} for name, path in modules().items()}
    while left:
        free = {name for name, wanted in left.items() if not wanted & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {name: wanted for name, wanted in left.items() if name not in free}


def test_the_command_line_is_a_leaf() -> None:
    importers = {n for n, path in modules().items() if "autocompress.study" in imports_of(path)}
    assert importers == {"autocompress.__main__"}


def test_the_readme_knows_every_file() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    file_map = text[text.index("## File map") :]
    for path in PACKAGE.glob("*.py"):
        if not path.stem.startswith("__"):
            assert path.name in file_map, path.name
    for path in (ROOT / "scripts").iterdir():
        if path.name != "__pycache__":
            assert path.name in file_map, path.name


def test_the_readme_names_only_what_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:studies|scripts|tests|autocompress)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for source in re.findall(r'"zoo:(\w+)"', text):
        assert source in ZOO


def test_the_readmes_study_file_is_valid() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    assert parse_config(tomllib.loads(block)).name == "mine"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_ready_studies_are_valid(path: Path) -> None:
    config = parse_config(tomllib.loads(path.read_text(encoding="utf-8")))
    assert config.name == path.stem


def test_the_studies_are_shipped_in_the_package() -> None:
    assert (ROOT / "studies").resolve() == PACKAGE / "studies"
    assert load_config().name == "quickstart"


def test_a_study_file_has_few_fields() -> None:
    from autocompress.config import StudyConfig, flatten

    config = load_config()
    fields = flatten(config.model_dump())
    assert 20 <= len(fields) - len(config.model.arguments) <= 60
    for section in (StudyConfig, *(type(getattr(config, n)) for n in ("model", "data", "search"))):
        assert all(field.description for field in section.model_fields.values())
