"""autocompress makes trained convolutional networks small and fast, within an accuracy tolerance.

    import autocompress

    outcome = autocompress.compress(model, train, test, delta=1.0)
    model = autocompress.load("runs/study/best")

From the command line: `python -m autocompress.study --help`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from autocompress.api import compress as compress
    from autocompress.conductor import Outcome as Outcome
    from autocompress.conductor import run_study as run_study
    from autocompress.config import StudyConfig as StudyConfig
    from autocompress.config import load_config as load_config
    from autocompress.errors import AutocompressError as AutocompressError
    from autocompress.export import load as load
    from autocompress.export import save as save
    from autocompress.handout import export_trial as export_trial
    from autocompress.metrics import MeanScore as MeanScore
    from autocompress.metrics import TorchMetric as TorchMetric
    from autocompress.plan import Plan as Plan
    from autocompress.profiler import profile_model as profile_model
    from autocompress.quantization import quantize_onnx as quantize_onnx
    from autocompress.runtime import open_onnx as open_onnx
    from autocompress.scale import Scale as Scale
    from autocompress.surgery import apply_plan as apply_plan
    from autocompress.task import Task as Task

_HOMES = {
    "AutocompressError": "errors",
    "MeanScore": "metrics",
    "Outcome": "conductor",
    "Plan": "plan",
    "Scale": "scale",
    "StudyConfig": "config",
    "Task": "task",
    "TorchMetric": "metrics",
    "apply_plan": "surgery",
    "compress": "api",
    "export_trial": "handout",
    "load": "export",
    "load_config": "config",
    "open_onnx": "runtime",
    "profile_model": "profiler",
    "quantize_onnx": "quantization",
    "run_study": "conductor",
    "save": "export",
}

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Find a public name when it is first used, so that `--help` doesn't wait for torch."""
    if name == "__version__":
        globals()[name] = found = _version()
        return found
    if name not in _HOMES:
        raise AttributeError(f"module 'autocompress' has no attribute {name!r}")
    value = getattr(import_module(f"autocompress.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("autocompress")
    except PackageNotFoundError:
        return "0.0.0"


def __dir__() -> list[str]:
    return __all__
