"""Code in the documents: Python blocks run, a namespace for each page; study files are parsed."""

from __future__ import annotations

import re
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from autocompress import api
from autocompress.conductor import Outcome, _check_training
from autocompress.config import NAMED_DATA, StudyConfig, flatten, parse_config
from autocompress.evaluation import evaluate, metric_drop
from autocompress.progress import Display
from autocompress.studies import scenes
from autocompress.task import Task, check_outputs
from autocompress.training import fit

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("tasks.md", "data.md")
MINIMAL = {"name": "page", "model.source": "zoo:resnet20", "data.source": "digits"}


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """The line at which each block of code begins, and its text."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


def brief_study(config: StudyConfig, task: Task, display: Display, command: str) -> Outcome:
    """All of the task's functions are called, as a study calls them, but only for a few steps."""
    check_outputs(task)
    _check_training(config, task)
    before = evaluate(task.model, task, task.val)
    student = deepcopy(task.model)
    taught = task.distillation is not None or task.training is not None
    fit(
        student,
        task,
        epochs=1.0,
        learning_rate=config.finetune.learning_rate or 0.001,
        seed=0,
        teacher=task.model if taught else None,
        distillation=0.5 if taught else 0.0,
    )
    drop = metric_drop(before, evaluate(student, task, task.val))
    return Outcome(student, None, {"best": {"val_drop": drop}}, Path(config.run.out))


@pytest.mark.parametrize("page", PAGES)
def test_python_in_the_documents_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "run_study", brief_study)
    for part, count in {"train": 64, "val": 24, "test": 24}.items():
        monkeypatch.setitem(scenes.COUNTS, part, count)
    found = blocks(page, "python")
    assert len(found) >= 3
    names: dict[str, Any] = {"__name__": page.removesuffix(".md")}
    for line, text in found:
        # So that a traceback shows the page's own lines.
        exec(compile("\n" * line + text, str(DOCS / page), "exec"), names)
    if page == "tasks.md":
        task = names["task"](classes=11)
        assert task.keys() == {"loss", "distillation", "metric"}


@pytest.mark.parametrize("page", PAGES)
def test_study_files_in_the_documents_are_valid(page: str) -> None:
    found = blocks(page, "toml")
    assert found
    for _, text in found:
        parse_config({**MINIMAL, **flatten(tomllib.loads(text))})


def test_a_broken_block_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_docs.DOCS", tmp_path)
    (tmp_path / "page.md").write_text("# Page\n\n```python\n1 / 0\n```\n\n```toml\nx = 1\n```\n")
    assert blocks("page.md", "python") == [(3, "1 / 0\n")]
    assert blocks("page.md", "toml") == [(7, "x = 1\n")]


@pytest.mark.parametrize("page", PAGES)
def test_links_in_the_documents_lead_somewhere(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        place, _, anchor = target.partition("#")
        assert not place or (DOCS / place).resolve().is_file(), target
        assert place or anchor in headings, target


def test_every_source_of_images_is_in_the_table() -> None:
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    for name in NAMED_DATA:
        assert f"\n| `{name}` |" in text
