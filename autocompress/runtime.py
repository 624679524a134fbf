"""How exported networks run on other runtimes than PyTorch: ONNX Runtime, OpenVINO, ExecuTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ERRORS_ONLY = 3


def open_onnx(
    network: str | Path | bytes, threads: int | None = None
) -> Callable[..., list[Tensor]]:
    """An ONNX network as a function of its inputs, batch first, on ONNX Runtime's CPU kernels.

    Args:
        network: A file, or its content.
        threads: CPU threads; None for as many as PyTorch has.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Threads that wait busily for the next batch would disturb what is timed in turns with this.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        network if isinstance(network, bytes) else str(network),
        options,
        providers=["CPUExecutionProvider"],
    )
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, arrays)]

    return run


def open_openvino(
    network: str | Path | bytes, threads: int | None = None
) -> Callable[..., list[Tensor]]:
    """The same on OpenVINO's CPU plugin, in float32."""
    import openvino

    core = openvino.Core()
    model = core.read_model(network if isinstance(network, bytes) else str(network))
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()

    def run(*inputs: Tensor) -> list[Tensor]:
        request.infer([value.numpy() for value in inputs], share_inputs=True)
        return [torch.from_numpy(output.data.copy()) for output in request.output_tensors]

    return run


def open_executorch(network: str | Path) -> Callable[..., list[Tensor]]:
    """The same of an ExecuTorch file, on the backends that it was written for."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(str(network))
    method = program.load_method("forward")

    def run(*inputs: Tensor) -> list[Tensor]:
        # Outputs lie in memory that the next run uses again.
        return [value.clone() for value in method.execute(inputs)]

    return run
