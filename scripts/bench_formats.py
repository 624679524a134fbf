"""Size, largest difference and latency of each format that a network can be exported to.

    python scripts/bench_formats.py torchvision:resnet18 --input 3 224 224
    python scripts/bench_formats.py runs/quickstart/best

One image and one thread; the formats take turns, and the clock is the processor's time. "load" is
PyTorch itself, "aoti" a PT2 file compiled by AOTInductor (needs a C++ compiler; `--aoti`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from autocompress.export import load
from autocompress.formats import FORMATS, Source, first_line, write_format
from autocompress.manifest import read_manifest
from autocompress.models import build_model
from autocompress.profiler import time_in_turns
from autocompress.runtime import open_onnx, open_openvino


def network(name: str, shape: list[int] | None) -> tuple[nn.Module, torch.Tensor]:
    """A saved network, or an untrained one by name, and a batch of random images."""
    torch.manual_seed(0)
    if Path(name).is_dir():
        return load(name), torch.randn(8, *read_manifest(name).inputs[0][1:])
    return build_model(name, {}, None), torch.randn(8, *(shape or (3, 224, 224)))


def compiled(source: Source, folder: Path) -> Callable[..., Any]:
    """The network compiled by AOTInductor."""
    path = torch._inductor.aoti_compile_and_package(
        source.program, package_path=str(folder / "aoti.pt2")
    )
    package: Callable[..., Any] = torch._inductor.aoti_load_package(path)
    return package


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", help="a saved network's folder, or a name as in a study file")
    parser.add_argument("--input", type=int, nargs=3, help="channels, height, width")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--aoti", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, images = network(given.network, given.input)
    source = Source(model, (images[:1],))
    sizes: dict[str, str] = {"load": ""}
    runs: dict[str, Callable[[], Any]] = {"load": torch.no_grad()(partial(model, images[:1]))}
    openers = {"onnx": open_onnx, "openvino": open_openvino}
    with TemporaryDirectory() as place:
        for name, kind in FORMATS.items():
            try:
                difference = write_format(kind, source, images, Path(place))
            except Exception as error:
                print(f"{name}: {first_line(error)}")
                continue
            path = Path(place) / kind.file
            parts = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
            size = sum(part.stat().st_size for part in parts) / 1e6
            sizes[name] = f"{size:.3f} MB | {difference:.1g}"
            if kind.runtime in openers:
                run: Callable[..., Any] = openers[kind.runtime](path, threads=1)
            else:
                run = kind.open(path)
            runs[name] = torch.no_grad()(partial(run, images[:1]))
        if given.aoti:
            package = compiled(source, Path(place))
            sizes["aoti"] = f"{(Path(place) / 'aoti.pt2').stat().st_size / 1e6:.3f} MB | "
            runs["aoti"] = torch.no_grad()(partial(package, images[:1]))
        print("| format | size | largest difference | ms |\n|---|---:|---:|---:|")
        spent = time_in_turns([*runs.values()], given.seconds, 5, clock=time.process_time)
        for name, seconds in zip(runs, spent, strict=True):
            print(f"| {name} | {sizes[name] or ' | '} | {1000 * median(seconds):.3g} |")


if __name__ == "__main__":
    main()
