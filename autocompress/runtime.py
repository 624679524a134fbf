"""How exported networks run on ONNX Runtime, and how fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from autocompress.profiler import Example, Latency, batch_of, time_in_turns

ERRORS_ONLY = 3


def open_onnx(path: str | Path) -> Callable[..., list[Tensor]]:
    """An ONNX file as a function of its inputs, batch first.

    It runs on ONNX Runtime's CPU kernels, with as many threads as PyTorch has.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, arrays)]

    return run


def compare_onnx_latency(
    baseline: str | Path,
    model: str | Path,
    example: Example,
    batch_size: int = 1,
    seconds: float = 2.0,
    min_runs: int = 20,
) -> tuple[Latency, Latency]:
    """Time two ONNX files turn by turn on ONNX Runtime's CPU kernels, with PyTorch's threads.

    Args:
        baseline: The first file.
        model: The second file.
        example: Inputs of both, batch first; the first sample is repeated to the batch.
        batch_size: Images in a batch.
        seconds: Time to spend on both, the warm-up not counted.
        min_runs: Timed batches at least.

    Returns:
        The latency of `baseline` and that of `model`.
    """
    inputs = tuple(value.cpu() for value in batch_of(example, batch_size))
    networks = [open_onnx(path) for path in (baseline, model)]
    times = time_in_turns([lambda run=run: run(*inputs) for run in networks], seconds, min_runs)  # type: ignore[misc]
    cpu = torch.device("cpu")
    before, after = (Latency.of(own, batch_size, cpu, "ONNX Runtime") for own in times)
    return before, after
