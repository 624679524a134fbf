"""Programs that are written beside a network: each runs one kind of file on images.

They need numpy, Pillow and the runtime, read `model.json` beside them, and know nothing of
autocompress; `predict_safetensors.py` alone uses it, to build the network again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import jinja2

from autocompress import __version__
from autocompress.formats import FORMATS, INT8_FILE
from autocompress.manifest import Manifest

WEIGHTS = "safetensors"
"""The runtime that is autocompress itself."""
SCRIPTS = tuple(
    f"predict_{runtime}.py"
    for runtime in dict.fromkeys([*(kind.runtime for kind in FORMATS.values()), WEIGHTS])
)
"""All names that such a program may have."""


def script_of(file: str) -> str:
    """The program that runs a file, by the file's name; "" where there is none."""
    if file == f"model.{WEIGHTS}":
        return f"predict_{WEIGHTS}.py"
    if file == INT8_FILE:
        return f"predict_{FORMATS['onnx'].runtime}.py"
    return next((f"predict_{k.runtime}.py" for k in FORMATS.values() if k.file == file), "")


def text_templates() -> jinja2.Environment:
    """The package's templates of files that are no HTML."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("autocompress"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def write_scripts(folder: Path, manifest: Manifest, files: Iterable[str]) -> tuple[str, ...]:
    """Write a program for each runtime that one of the files is for.

    Args:
        folder: Where the files are.
        manifest: What the network says of itself.
        files: Names of the files.

    Returns:
        The programs' names, in the order of the table of formats.
    """
    environment = text_templates()
    present = set(files)
    needs = {kind.runtime: kind.needs for kind in FORMATS.values()} | {WEIGHTS: "autocompress"}
    # In the order of the table: where a runtime has several files, the first is the default.
    names = [kind.file for kind in FORMATS.values()] + [INT8_FILE, f"model.{WEIGHTS}"]
    default: dict[str, str] = {}
    for name in names:
        if name in present and (name != f"model.{WEIGHTS}" or manifest.origin is not None):
            default.setdefault(script_of(name), name)
    limits = {kind.runtime: kind.largest_batch for kind in FORMATS.values()}
    for script, file in default.items():
        runtime = script.removeprefix("predict_").removesuffix(".py")
        text = environment.get_template("predict.py.j2").render(
            script=script,
            file=file,
            runtime=runtime,
            needs=needs[runtime],
            largest=limits.get(runtime),
            version=__version__,
        )
        (folder / script).write_text(text, encoding="utf-8")
    return tuple(default)
