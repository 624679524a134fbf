"""The reference pages: what the code says, and found out when they say something else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import reference  # noqa: E402

from autocompress.fields import sections  # noqa: E402
from autocompress.study import app  # noqa: E402


def test_the_pages_are_what_the_code_says() -> None:
    for path, text in reference.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"run scripts/reference.py: {path.name}"


def test_every_field_and_command_has_its_place() -> None:
    fields, commands = reference.pages().values()
    for section in sections():
        for field in section.fields:
            assert f"| `{field.name}` |" in fields
    for name, _ in reference.commands(app):
        assert f"\n## {name}\n" in commands
    assert {"run", "status", "models train"} <= {name for name, _ in reference.commands(app)}


def test_options_have_all_their_names_and_no_hidden_one_is_shown() -> None:
    _, commands = reference.pages().values()
    assert "| `--quiet`, `-q` | - |" in commands
    assert "| `--stage exploration\\|annealing\\|both` | - |" in commands
    assert "`--patience NUMBER` | `60.0`" in commands and "--child" not in commands


def test_a_stale_page_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["reference.py"])
    assert reference.main() == 0
    monkeypatch.setattr(sys, "argv", ["reference.py", "--check"])
    assert reference.main() == 0
    page = tmp_path / "reference-commands.md"
    page.write_text(page.read_text(encoding="utf-8").replace("--quiet", "--silent"))
    assert reference.main() == 1
    assert "reference-commands.md is stale" in capsys.readouterr().err
