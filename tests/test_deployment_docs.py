"""Code in docs/deployment.md runs, in order, beside a finished study's folder."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from autocompress.export import save_model
from autocompress.formats import FORMATS
from autocompress.manifest import CLASSIFICATION
from autocompress.models import build_model
from autocompress.plan import Plan
from autocompress.profiler import profile_model
from autocompress.study import app
from autocompress.surgery import apply_plan
from autocompress.transforms import SVD

PAGE = Path(__file__).parent.parent / "docs" / "deployment.md"


def blocks(language: str) -> list[tuple[int, str]]:
    text = PAGE.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"num_classes": 10, "in_channels": 1, "width": 8}
    plan = Plan({"fc": SVD(4)})
    model = apply_plan(build_model("zoo:resnet_small", arguments, None), plan).eval()
    example = (torch.zeros(1, 1, 8, 8),)
    save_model(
        tmp_path / "runs" / "quickstart" / "best",
        model,
        plan,
        {"source": "zoo:resnet_small", "arguments": arguments},
        example,
        profile_model(model, example, latency=False),
        classes=tuple("0123456789"),
        normalization={"mean": [0.3], "std": [0.4]},
        image={"mode": "L", "resize": 8, "crop": [8, 8]},
        task={"kind": CLASSIFICATION, "metric": None},
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "deployment"}
    found = blocks("python")
    assert len(found) >= 5
    for line, text in found:
        if "# needs openvino" in text and importlib.util.find_spec("openvino") is None:
            continue
        if "# needs a compiler" in text:
            continue  # the test below compiles
        exec(compile("\n" * line + text, str(PAGE), "exec"), names)
    assert names["again"](names["images"]).shape == (64, 10)
    assert names["about"].classifies and set(names["report"].checks) == {"model.onnx"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_the_compiled_network_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = (text for _, text in blocks("python") if "# needs a compiler" in text)
    model = build_model("zoo:resnet_small", {"in_channels": 1, "width": 8}, None)
    example = (torch.zeros(1, 1, 8, 8),)
    save_model(
        tmp_path / "runs" / "quickstart" / "best", model, Plan({}), None, example,
        profile_model(model, example, latency=False), formats=("pt2",),
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"torch": torch}
    exec(compile(text, str(PAGE), "exec"), names)
    with torch.no_grad():
        expected = model(torch.zeros(3, 1, 8, 8))
    torch.testing.assert_close(names["logits"], expected, rtol=1e-4, atol=1e-4)


def test_every_format_is_in_the_table_and_in_the_help() -> None:
    text = PAGE.read_text(encoding="utf-8")
    (option,) = (p for p in _parameters("export") if "--format" in p.opts)
    for name, kind in FORMATS.items():
        assert f"`{name}`" in text and f"`{kind.file}`" in text
        assert name in option.help.replace(",", " ").split()


def _parameters(command: str) -> list[Any]:
    import typer.main

    group: Any = typer.main.get_command(app)
    return list(group.commands[command].params)
