"""The documents: their code is carried out, their links lead somewhere, their tables are right."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import doc_pages
import pytest
import transform_cases
from doc_pages import ROOT, Block, Page, blocks, check_install, check_script, commands, invoke

from autocompress import api, selection, transforms
from autocompress.conductor import Outcome, _check_training
from autocompress.config import NAMED_DATA, StudyConfig
from autocompress.evaluation import evaluate, metric_drop
from autocompress.export import save_model
from autocompress.progress import Display
from autocompress.studies import scenes
from autocompress.task import Task, check_outputs
from autocompress.training import fit

DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
}
FOR_REAL = ("digits", "mine", "extended")
"""Studies of the pages that are run to their end, for they are short; others are only begun."""

QUICK = """\
name = "quickstart"
delta = 30.0
confidence = 0.5

[model]
source = "zoo:resnet_small"
arguments = { num_classes = 10, in_channels = 1, width = 4 }

[data]
source = "digits"

[baseline]
epochs = 3

[search]
include = ["*"]
trials = 1
annealing_trials = 0

[finetune]
epochs = 0.3
final_epochs = 0.5
learning_rate = 0.05
"""
"""A study that has the quickstart's name, network and data, and takes seconds."""


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study."""
    place = tmp_path_factory.mktemp("finished")
    (place / "quick.toml").write_text(QUICK)
    # Milliseconds are of no interest here.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "TIMING_SECONDS", 0.1)
        invoke([str(place / "quick.toml"), "--out", str(place / "runs"), "--workers", "0"])
    return place / "runs" / "quickstart"


@pytest.fixture
def folder(quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder in which that study is; what a page registers or imports is undone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(quickstart)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    known, modules = dict(transforms.TRANSFORMS), set(sys.modules)
    yield tmp_path
    transforms.TRANSFORMS.clear()
    transforms.TRANSFORMS.update(known)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def brief_study(
    config: StudyConfig, task: Task, display: Display, command: str, **_: Any
) -> Outcome:
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
    best = {"val_drop": drop, "test_drop": drop}
    return Outcome(student, None, {"best": best}, Path(config.run.out))


def readme_names() -> dict[str, Any]:
    """What the README's examples take for granted: a trained network and loaders."""
    from conftest import TinyNet, make_loader

    return {
        "model": TinyNet(),
        "train_loader": make_loader(64, 0, shuffle=True),
        "test_loader": make_loader(64, 1),
    }


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_the_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def study(config: StudyConfig, *args: Any, **more: Any) -> Outcome:
        real = config.name in FOR_REAL
        return (whole if real else brief_study)(config, *args, **more)

    def export(place: Path, *args: Any, **more: Any) -> Any:
        # Seconds each; pages of studies that are run read the winner's ONNX file alone.
        formats = ("onnx",) if place.name == "best" else ()
        return save_model(place, *args, **{**more, "formats": formats})

    whole = api.run_study
    monkeypatch.setattr(api, "run_study", study)
    monkeypatch.setattr(selection, "TIMING_SECONDS", 0.1)
    monkeypatch.setattr(selection, "save_model", export)
    for part, count in {"train": 64, "val": 24, "test": 24}.items():
        monkeypatch.setitem(scenes.COUNTS, part, count)
    page = Page(PAGES[name], folder, FOR_REAL, names={"__name__": Path(name).stem})
    if name == "README.md":
        page.names |= readme_names()
    page.carry_out()
    check = CHECKS.get(name)
    if check is not None:
        check(page.names)


def check_tasks(names: dict[str, Any]) -> None:
    """The functions of the study file's example."""
    assert names["task"](classes=11).keys() == {"loss", "distillation", "metric"}


def check_extending(names: dict[str, Any]) -> None:
    """The page's transform passes the conformance suite."""
    from test_transforms import (
        test_full_rank_reproduces_the_output,
        test_ladder_saves_and_error_falls,
        test_replacements_answer_for_the_settings_of_their_layer,
    )

    kind = names["InputSVD"]
    taken = [
        case
        for case in transform_cases.LAYERS
        if kind.refusal(transform_cases.make(case)[2]) is None
    ]
    assert {"plain", "stride", "reflect", "dilation"} <= set(taken)
    for case in taken:
        test_full_rank_reproduces_the_output(kind, case)
        test_replacements_answer_for_the_settings_of_their_layer(kind, case)
        test_ladder_saves_and_error_falls(kind, case)


def check_choosing(names: dict[str, Any]) -> None:
    """The table of margins is what the package's own interval says."""
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    header, *rows = re.findall(r"^\| (?:images|[\d,]+) \|.*\|$", text, flags=re.MULTILINE)
    shares = [float(share) / 100 for share in re.findall(r"([\d.]+) %", header)]
    assert len(rows) >= 5 and len(shares) >= 3
    for row in rows:
        images, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        for share, cell in zip(shares, cells, strict=True):
            assert f"{names['margin'](int(images.replace(',', '')), share):.2f}" == cell, row


CHECKS = {
    "docs/tasks.md": check_tasks,
    "docs/extending.md": check_extending,
    "docs/choosing.md": check_choosing,
}


@pytest.mark.parametrize("name", PAGES)
def test_commands_within_the_text(name: str, folder: Path) -> None:
    """Lines in backticks: our commands are parsed, scripts have the options, extras exist."""
    text = PAGES[name].read_text(encoding="utf-8")
    plain = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`([^`]+)`", plain):
        line = " ".join(span.split())
        if re.match(r"([A-Z_]+=\S+ )*python scripts/", line):
            Page(PAGES[name], folder).command(line)
        elif line.startswith("python -m autocompress.study ") and line.isascii():
            if not re.search(r"\b[A-Z]{3,}$|\.\.\.", line):
                doc_pages.parsed(line.split()[3:])
        elif line.startswith("pip install "):
            Page(PAGES[name], folder).command(line)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = PAGES[name]
    text = page.read_text(encoding="utf-8")
    for target in doc_pages.links(text):
        place, _, anchor = target.partition("#")
        at = (page.parent / place).resolve() if place else page
        assert at.exists(), target
        if anchor:
            assert anchor in doc_pages.headings(at.read_text(encoding="utf-8")), target
        # What the site does not hold can't be linked to from within it.
        assert name == "README.md" or at.is_relative_to(DOCS), f"{target} is outside of docs/"


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    for path in re.findall(r"`((?:studies|scripts|tests|autocompress|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation_and_the_map() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for path in PAGES.values():
        if path.is_relative_to(DOCS):
            name = path.relative_to(DOCS).as_posix()
            assert f": {name}\n" in navigation, name
            assert name == "index.md" or name.startswith("api/") or f"]({name})" in index, name


def test_every_source_of_images_is_in_the_table() -> None:
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    for name in NAMED_DATA:
        assert f"\n| `{name}` |" in text


def test_blocks_and_commands_are_found() -> None:
    text = "# P\n\n```python\n1 / 0\n```\n\n- item\n\n  ```bash\n  a\n  ```\n"
    assert blocks(text) == [Block(3, "python", "1 / 0\n"), Block(9, "bash", "  a\n")]
    text = "a --x 1 \\\n    --y   # why\n# all\nb && c\npython -c '\nf(\"#\")'\n"
    assert commands(text) == ["a --x 1 --y", "b", "c", "python -c '\nf(\"#\")'"]


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        (Block(3, "python", "1 / 0\n"), "division"),
        (Block(3, "toml", "[search]\ntrails = 3\n"), "Did you mean 'trials'"),
        (Block(3, "bash", "python -m autocompress.study status --nonsense\n"), "No such option"),
        (Block(3, "bash", "pip install 'autocompress[nonsense]'\n"), "no extra 'nonsense'"),
        (Block(3, "bash", "make me a sandwich\n"), "no rule for the command"),
        (Block(3, "rust", "fn main() {}\n"), "no rule for blocks of 'rust'"),
    ],
    ids=lambda value: value.language if isinstance(value, Block) else None,
)
def test_a_wrong_block_is_noticed(block: Block, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(BaseException, match=complaint):
        Page(tmp_path / "page.md", tmp_path).block(block)


def test_a_wrong_script_or_option_is_noticed() -> None:
    check_script("measure.py", ["quickstart", "--images", "FOLDER"])
    with pytest.raises(AssertionError, match="no --pictures"):
        check_script("measure.py", ["quickstart", "--pictures", "FOLDER"])
    with pytest.raises(AssertionError, match="no scripts/nonsense.py"):
        check_script("nonsense.py", [])
    check_install([".", "autocompress[ray,slurm]", "nncf"])


def test_a_broken_site_is_noticed(tmp_path: Path) -> None:
    """What `scripts/docs` looks for in the site that it has built."""
    (tmp_path / "a.html").write_text(
        '<h1 id="a">[see this][gone.away]</h1><a href="b.html#b"></a><a href="b.html#c"></a>'
        '<img src="c.png"><code>[x][y]</code><a href="https://elsewhere"></a>'
    )
    (tmp_path / "b.html").write_text('<h1 id="b"></h1><a href="../out.py"></a>')
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_site.py", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "a.html: b.html#c: there is no such place in b.html",
        "a.html: c.png leads nowhere",
        "a.html: [see this][gone.away] was not resolved",
        "b.html: ../out.py leads nowhere",
    ]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("zensical") is None, reason="needs the extra docs")
def test_the_site_can_be_built() -> None:
    done = subprocess.run([ROOT / "scripts" / "docs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compress(" in (ROOT / "site" / "api" / "index.html").read_text(encoding="utf-8")
