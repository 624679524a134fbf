"""Writes the reference pages in `docs/` from the code: every study field, and every command.

python scripts/reference.py            # write docs/reference-study-file.md, -commands.md
python scripts/reference.py --check    # exit code 1 if they are not what the code says
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from autocompress.fields import Field, Section, sections
from autocompress.study import app

DOCS = Path(__file__).resolve().parent.parent / "docs"
PROGRAM = "python -m autocompress.study"

STUDY_FILE = """\
# The study file, field by field

A study file is [TOML](https://toml.io). Two fields are required beside `name`: `model.source` and
`data.source`; all others have defaults. `python -m autocompress.study fields PATTERN` prints these
lines in a terminal. From Python the same fields go by their dotted names: `compress(...,
settings={"finetune.epochs": 2})`.

A dash as default means that the field may be left out, which the description calls None. "Later"
says whether a study that has begun may be continued with another value; with another value of any
other field it is refused, and a new name makes a new study. Relative paths are relative to the
file's folder.

This page is made from `autocompress/config.py` by `scripts/reference.py`.
"""

COMMANDS = """\
# The commands

```bash
python -m autocompress.study [COMMAND] [STUDY] [OPTIONS]
```

Once installed, `autocompress` is short for `python -m autocompress.study`. Without a command `run`
is meant: `python -m autocompress.study my.toml`. STUDY is a study file, a study's folder, or the
name of a ready study (quickstart without one).

This page is made from `autocompress/study.py` by `scripts/reference.py`.

## Exit codes

| code | meaning |
|---|---|
| 0 | done; for `run`: a network within delta was found |
| 1 | a fault of the program; a traceback tells where |
| 2 | wrong input: the study file, an option, or a place that can't be used |
| 3 | `run` came to its end, but nothing met delta |
| 130 | interrupted by Ctrl-C or SIGTERM; the same command goes on |

## What is printed

On a terminal `run` keeps a few lines at the bottom: the stage with time elapsed and left, what
each worker does, and the best so far; ended trials scroll away above them. 110 columns and more
show further facts of each trial. In a pipe, in CI (`CI` or `GITHUB_ACTIONS` is set) and on
`TERM=dumb` there is one line for each event, and at most one in 30 seconds for each worker.
`NO_COLOR` is respected.

`--quiet` leaves errors and the final result. `--verbose` adds what else the log has: warnings of
libraries, tracebacks of failed trials, the lines of workers. Whatever the terminal shows,
`study.log` in the study's folder has everything: command, versions and settings at its head,
records of all levels, warnings, tracebacks, and what workers print. It goes on where a study is
continued; at 32 MiB it becomes `study.log.1`, and three old ones are kept. Workers on other
machines write `workers/HOST-PROCESS.log` in the study's folder where they see it, else in
`~/.cache/autocompress/logs/`; why a trial failed there is in `study.log` too.

## JSON

With `--json` standard output holds exactly one JSON document, at the end; progress and messages go
to standard error. Exit codes stay. An error gives `{"error": "...", "exit_code": 2}`, an
interrupted `run` the same with 130 and `study`, `folder`, `trials`. New keys may be added; those
named here stay.

**run**: `study`, `folder`, `exit_code`, `met`, `objective`, `delta`, `confidence`, `metric` (name,
unit, higher_is_better), `trials` and `seconds` (by stage), `best` (null if nothing met delta;
`stage`, `trial`, `val_score`, `val_drop`, `val_drop_expected`, `val_drop_bound`,
`tolerance_unused`, `test_score`, `test_drop`, `test_drop_interval`), `comparison` (rows of
`metric`, `unit`, `before`, `after`, `ratio`), `nearest` (likewise, where nothing met delta),
`int8`, and the paths `result` (result.json, which has all the rest), `report`, `network`.

**status**: `study`, `place`, `state` (running, silent: no sign of life, interrupted, failed,
finished, unknown), `heard_seconds_ago`, `conducted_by`, `objective`, `delta`, `confidence`,
`metric`, `stage`, `elapsed_seconds`, `left_seconds`, `stages` (by name: `trials`, `ended`,
`stopped`, `failed`, `running`, `within_delta`, `best`), `best` (`trial`, `drop`, `drop_bound`,
`ratio`, `score`, `ratios`, `plan`), `workers` (rows of `worker`, `trial`, `phase`, `done`,
`total`, `note`, `seconds`).

**profile**: `params`, `size_bytes`, `macs`, `memory_bytes`, `latency`, `score`, `uncounted`,
`compatible`, and `layers`, each with its costs, `may_become` and `left_alone`.

**report**: `report`. **models list**: `networks` (by source), `recipes`. **fields**: `fields`.
"""


def main() -> int:
    """Write the pages, or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one is stale")
    options = parser.parse_args()
    stale = [
        path for path, text in pages().items() if not path.exists() or path.read_text() != text
    ]
    if options.check:
        for path in stale:
            print(f"{path} is stale: run python scripts/reference.py.", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(pages()[path], encoding="utf-8")
        print(f"Written: {path}")
    return 0


def pages() -> dict[Path, str]:
    """The pages as the code has them now."""
    return {
        DOCS / "reference-study-file.md": study_file_page(),
        DOCS / "reference-commands.md": commands_page(),
    }


def study_file_page() -> str:
    """Every field of a study file, by table."""
    return "\n".join([STUDY_FILE, *(_section(section) for section in sections())])


def _section(section: Section) -> str:
    heading = f"[{section.name}]" if section.name else "At the top of the file"
    if section.name.endswith("[]"):
        heading = f"Each of {section.name.removesuffix('[]')}"
    lines = [f"## {heading}", "", section.description, ""]
    lines += ["| field | type | default | allowed | later | meaning |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_field_row, section.fields), ""])


def _field_row(field: Field) -> str:
    default = f"`{field.default}`" if field.default not in ("", "required") else field.default
    cells = [
        f"`{field.name}`",
        field.type,
        default or "-",
        field.allowed or "any",
        "yes" if field.free else "no",
        field.description,
    ]
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def commands_page() -> str:
    """Every command with its options."""
    found = [COMMANDS, *(_command(name, function) for name, function in commands(app))]
    return "\n".join(found)


def commands(group: typer.Typer, before: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    """The commands of a group and of the groups in it: name and function."""
    for command in group.registered_commands:
        function = command.callback
        assert function is not None
        yield f"{before}{command.name or function.__name__.replace('_', '-')}", function
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from commands(inner.typer_instance, f"{before}{inner.name} ")


def _command(name: str, function: Callable[..., Any]) -> str:
    parameters = list(parameters_of(function))
    arguments = [p for p in parameters if p.is_argument]
    options = [p for p in parameters if not p.is_argument]
    words = " ".join(p.usage for p in arguments)
    lines = [
        f"## {name}",
        "",
        f"```bash\n{PROGRAM} {name} [OPTIONS] {words}".rstrip() + "\n```",
        "",
    ]
    lines += [*_help(inspect.getdoc(function) or ""), ""]
    for title, rows in (("argument", arguments), ("option", options)):
        if rows:
            lines += [f"| {title} | default | meaning |", "|---|---|---|"]
            lines += [f"| {p.cell} | {p.default} | {_cell(p.help)} |" for p in rows]
            lines += [""]
    return "\n".join(lines)


class Parameter:
    """An argument or option of a command, as it is documented.

    Args:
        name: Of the function's parameter.
        kind: Its type, without `None`.
        info: What Typer knows of it.
        default: Of the function's parameter.
    """

    def __init__(self, name: str, kind: Any, info: ArgumentInfo | OptionInfo, default: Any) -> None:
        self.is_argument = isinstance(info, ArgumentInfo)
        self.help = " ".join((info.help or "").split())
        self.required = default is inspect.Parameter.empty
        self.default = (
            "-" if default in (None, False, "", inspect.Parameter.empty) else f"`{default}`"
        )
        if self.required:
            self.default = "required"
        metavar = info.metavar or name.upper()
        self.usage = metavar if self.required else f"[{metavar}]"
        if self.is_argument:
            self.cell = f"`{metavar}`"
            return
        declared = list(getattr(info, "param_decls", None) or ())
        if isinstance(info.default, str):  # where Typer keeps the first of them
            declared.insert(0, info.default)
        declared = declared or [f"--{name.replace('_', '-')}"]
        value = "" if kind is bool else f" {info.metavar or _value(kind)}"
        if get_origin(kind) is list:
            value += " ..."
        self.cell = ", ".join(f"`{each}{value}`" for each in declared).replace("|", "\\|")


def parameters_of(function: Callable[..., Any]) -> Iterator[Parameter]:
    """The arguments and options of a command that are shown."""
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = get_args(hints[name])[:2]
        if not info.hidden:
            yield Parameter(name, _bare(kind), info, parameter.default)


def _bare(kind: Any) -> Any:
    parts = [part for part in get_args(kind) if part is not type(None)]
    is_union = get_origin(kind) not in (None, list, Literal, Annotated)
    return parts[0] if is_union and len(parts) == 1 else kind


def _value(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return {int: "INTEGER", float: "NUMBER"}.get(kind, "TEXT")


def _help(text: str) -> list[str]:
    """A command's help as Markdown: examples become blocks of code."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        body = paragraph.replace("\b\n", "").replace("\b", "").strip("\n")
        head, *rest = body.split("\n")
        if re.fullmatch(r"Examples?:", head.strip()) and rest:
            code = "\n".join(line.removeprefix("  ") for line in rest)
            lines += [f"```bash\n{code}\n```", ""]
        else:
            lines += [body, ""]
    return lines[:-1]


if __name__ == "__main__":
    raise SystemExit(main())
