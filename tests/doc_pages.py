"""The documents' code: found, and run or checked by the rule of its language.

A page's blocks are carried out in their order, in one folder and one Python namespace:

- `python` runs. A block whose first line is `# name.py` is written to that file, too.
- `toml` is parsed as (a part of) a study file, and written to the file that its first line names.
- `bash`: each command has a rule, see `Page.command`. What isn't run is in `NOT_RUN` and
  `NOT_RUN_PROGRAMS`, with the reason.
- `text`, or no language: what a program prints, or a layout of files.

Any other language is an error, and so is a command without a rule: nothing is passed over.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import typer
from typer.testing import CliRunner

from autocompress.config import flatten, load_config, parse_config
from autocompress.study import app

ROOT = Path(__file__).resolve().parent.parent
MINIMAL = {"name": "page", "model.source": "zoo:resnet20", "data.source": "digits"}

SHOWN = ("text", "")
"""Languages of blocks that are no code."""

NOT_RUN = {
    "dashboard": "it serves until Ctrl-C",
    "worker": "it joins a study that runs; tests/test_workers.py does",
    "train": "it trains a network for long; tests/test_pretrain.py does",
}
"""Commands of ours whose lines are only parsed."""

NOT_RUN_WITH = {
    "watch": "it goes on until the study ends",
    "storage": "there is no such server",
    "formats": "it wants other packages, and minutes; tests/test_formats.py writes them all",
}
"""Options with which a line is only parsed."""

NOT_RUN_PROGRAMS = {
    r"export [A-Z_]+=\S+": "sets a variable for the lines below, which are only parsed",
    r"python -c '.*": "loads studies that take minutes; tests/test_export.py does the same",
    r"docker .*": "there is no Docker in the tests",
    r"ssh .*": "there is no other machine",
    r"python \S+/predict_\w+\.py .*": "tests/test_predict.py runs these programs",
}
"""Other programs' lines that aren't run, as patterns."""

NEEDS = {
    "a compiler": "it takes a minute; tests/test_deployment_docs.py runs it",
    "openvino": "it is an extra; run where it is installed",
}
"""What the first line of a Python block, `# needs ...`, may name; without it none is run."""

FOREIGN = {"torchao", "nncf"}
"""Packages of others that a page tells to install."""


@dataclass(frozen=True)
class Block:
    """A block of code: the line above its first one, its language and its text."""

    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name of the file that the block's first line gives it."""
        named = re.match(r"# ([\w-]+\.(?:py|toml))\n", self.text)
        return named[1] if named else None


def blocks(text: str) -> list[Block]:
    """All blocks of a page, those in lists too."""
    found = re.finditer(r"^( *)```([^\n`]*)\n(.*?)^\1```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(text[: m.start(3)].count("\n"), m[2].strip(), m[3]) for m in found]


def commands(text: str) -> list[str]:
    """The commands of a bash block: comments cut off, continued lines joined, `&&` split.

    Of a block with prompts (`$ `) only what follows them; the rest is what was printed.
    """
    prompted = re.findall(r"^\$ (.*)$", text, flags=re.MULTILINE)
    text = "\n".join(prompted) if prompted else text
    text = re.sub(r"\s*\\\n\s*", " ", text)
    found: list[str] = []
    rest = ""
    for line in text.splitlines():
        rest += line
        # A quote that is still open goes on in the next line.
        if re.sub(r"'[^']*'", "", rest).count("'") % 2:
            rest += "\n"
            continue
        plain = re.sub(r"(^|\s)#.*$", "", rest) if "\n" not in rest else rest
        found += [part.strip() for part in plain.split(" && ") if part.strip()]
        rest = ""
    return found


@dataclass
class Page:
    """A page whose blocks are carried out.

    Attributes:
        path: The file.
        folder: The current folder; `runs/quickstart` in it is a finished study.
        runs: Studies whose `run` lines are run, in this process, if their file is in the folder.
        names: The namespace of its Python blocks.
    """

    path: Path
    folder: Path
    runs: tuple[str, ...] = ()
    names: dict[str, Any] = field(default_factory=dict)

    def carry_out(self) -> None:
        """All blocks, in order."""
        for block in blocks(self.path.read_text(encoding="utf-8")):
            try:
                self.block(block)
            except BaseException as error:
                error.add_note(f"{self.path.name}, the block in line {block.line}")
                raise

    def block(self, block: Block) -> None:
        """One block, by the rule of its language."""
        if block.file is not None:
            (self.folder / block.file).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            # So that a traceback shows the page's own lines.
            text = "\n" * block.line + block.text
            code = compile(text, str(self.path), "exec", dont_inherit=True)
            needs = re.match(r"# needs (.+)\n", block.text)
            if needs:
                assert needs[1] in NEEDS, f"no rule for what needs {needs[1]!r}"
                if " " in needs[1] or find_spec(needs[1]) is None:
                    return
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, self.names)
        elif block.language == "toml":
            parse_config({**MINIMAL, **flatten(tomllib.loads(block.text))})
        elif block.language == "bash":
            for line in commands(block.text):
                self.command(line)
        else:
            assert block.language in SHOWN, f"no rule for blocks of {block.language!r}"

    def command(self, line: str) -> None:
        """A command: ours, pip's, a script's, or one that is not run."""
        plain = re.sub(r"^(?:[A-Z_]+=\S+ )+| > \S+$", "", line)
        ours = re.match(
            r"(?:(?:python|torchrun .*?) -m autocompress\.study|autocompress)\b(.*)", plain
        )
        script = re.match(r"(?:python )?scripts/([\w.]+)(.*)", plain)
        if ours:
            self.study(shlex.split(ours[1]))
        elif line.startswith("pip install "):
            check_install(shlex.split(line)[2:])
        elif script:
            check_script(script[1], shlex.split(script[2]))
        else:
            assert any(re.fullmatch(rule, line, flags=re.DOTALL) for rule in NOT_RUN_PROGRAMS), (
                f"no rule for the command {line!r}"
            )

    def study(self, args: list[str]) -> None:
        """A command of ours: parsed, and run where that is cheap."""
        if any(arg.startswith("[") for arg in args):
            return  # "[OPTIONS]": a synopsis
        name, given = parsed(args)
        study = given.get("study")
        if name == "run":
            self.run(args, given)
        elif name in NOT_RUN or any(given.get(option) for option in NOT_RUN_WITH):
            pass
        else:
            if study is not None and re.search(r"\.toml$|/", study) and not Path(study).exists():
                args = ["runs/quickstart" if arg == study else arg for arg in args]
            # The study of the tests is short; any of its trials will do.
            args = ["best" if re.fullmatch(r"(exploration|annealing)/\d+", a) else a for a in args]
            invoke(args)

    def run(self, args: list[str], given: dict[str, Any]) -> None:
        """A line that runs a study: run where the page has its file, else its settings checked."""
        study = given["study"]
        if study is not None and (self.folder / study).is_file():
            config = load_config(study, {"delta": given["delta"], "search.trials": given["trials"]})
            if config.name in self.runs:
                invoke([*args, "--workers", "0"])
        elif study is None or not study.endswith(".toml"):
            load_config(study, {"delta": given["delta"], "search.trials": given["trials"]})


def parsed(args: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that a line calls and its parameters; a wrong option is an error."""
    command: Any = typer.main.get_command(app)
    context, rest = None, args
    while True:
        context = command.make_context(command.name or "autocompress", list(rest), parent=context)
        if not hasattr(command, "resolve_command"):
            return command.name, context.params
        rest = [*context._protected_args, *context.args]
        _, command, rest = command.resolve_command(context, rest)


def invoke(args: list[str]) -> str:
    """Run a command of ours in this process; what it prints."""
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, f"{args}: exit code {result.exit_code}\n{result.output}"
    return result.output


def check_install(names: list[str]) -> None:
    """What pip is told to install is this package with extras that it has, or known others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in names:
        own = re.fullmatch(r"(?:autocompress|\.)(?:\[([\w,]+)\])?", name)
        if own is None:
            assert name.startswith("-") or name in FOREIGN, f"pip install {name}?"
            continue
        for extra in filter(None, (own[1] or "").split(",")):
            assert extra in project["optional-dependencies"], f"no extra {extra!r}"


def check_script(name: str, args: list[str]) -> None:
    """The script is there, and takes the options that a page shows."""
    path = ROOT / "scripts" / name
    assert path.is_file(), f"no scripts/{name}"
    options = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
    if path.suffix != ".py" or not options:
        return
    first = next(i for i, arg in enumerate(args) if arg.startswith("--"))
    sub = args[: min(first, 1)]
    taken = script_help(path.stem, tuple(sub))
    for option in options:
        assert re.search(rf"{option}\b", taken), f"scripts/{name} {' '.join(sub)}: no {option}"


_HELP: dict[tuple[str, tuple[str, ...]], str] = {}


def script_help(stem: str, sub: tuple[str, ...]) -> str:
    """What `python scripts/STEM.py SUB --help` prints."""
    if (stem, sub) not in _HELP:
        with mock.patch.object(sys, "path", [str(ROOT / "scripts"), *sys.path]):
            module = importlib.import_module(stem)
        shown = io.StringIO()
        with (
            mock.patch.object(sys, "argv", [f"{stem}.py", *sub, "--help"]),
            contextlib.redirect_stdout(shown),
            contextlib.suppress(SystemExit),
        ):
            module.main()
        _HELP[stem, sub] = shown.getvalue()
    return _HELP[stem, sub]


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    plain = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ (.+)$", plain, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in found}


def links(text: str) -> Iterator[str]:
    """The targets of a page's links and pictures that are no addresses."""
    plain = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
    plain = re.sub(r"`[^`\n]*`", "", plain)
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", plain):
        place = target[0] or target[1]
        if not re.match(r"\w+:", place):
            yield place
