"""How fast a network is on the runtime that will serve it, always beside the baseline.

A latency in milliseconds means little on a machine that does other work, or a minute later. So a
network is timed turn by turn with the baseline in one process, and what is kept is how many times
as long it took. `LatencyMeter` gives that in milliseconds, as the ratio times the baseline's own
milliseconds, which are measured once in a study: so the latencies of all trials can be compared.

With one thread on a CPU the clock is the processor time that this process has had. On an idle
machine that is the wall clock's time; on a busy one it leaves out the waiting for a turn, which
hits long runs always and short ones seldom. With more threads, and on a GPU, the wall tells.
"""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import nn

from autocompress.config import LatencyConfig
from autocompress.errors import ConfigError
from autocompress.formats import quick_onnx
from autocompress.profiler import Example, Latency, batch_of, time_in_turns
from autocompress.runtime import open_onnx, open_openvino

Runner = Callable[[], object]
"""Runs a network once, on one batch, and returns when that is done."""

TITLES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "PyTorch",
    "torch-compile": "compiled PyTorch",
    "cuda": "PyTorch on the GPU",
}

REFERENCE_SECONDS = 1.0
"""Time for the baseline's own latency, which a study measures once."""
MIN_RUNS = 20


@dataclass(frozen=True)
class Deployment:
    """The runtime that will serve the network, and how.

    Attributes:
        runtime: A key of `TITLES`.
        batch_size: Images in a batch.
        threads: CPU threads.
    """

    runtime: str = "onnxruntime"
    batch_size: int = 1
    threads: int = 1

    @classmethod
    def from_config(cls, config: LatencyConfig) -> Deployment:
        """What a study file asks for.

        Raises:
            ConfigError: If this machine doesn't have that runtime.
        """
        if config.runtime == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "latency.runtime = 'cuda': PyTorch finds no GPU here. Run the study where there is "
                "one, or name another runtime (onnxruntime, torch)."
            )
        if config.runtime == "openvino" and importlib.util.find_spec("openvino") is None:
            raise ConfigError(
                "latency.runtime = 'openvino': OpenVINO is not installed. Run "
                "pip install 'autocompress[openvino]', or name another one (onnxruntime, torch)."
            )
        return cls(config.runtime, config.batch_size, config.threads or torch.get_num_threads())

    @property
    def name(self) -> str:
        """The runtime with its version, such as "ONNX Runtime 1.32.0"."""
        package = self.runtime if self.runtime in ("onnxruntime", "openvino") else "torch"
        return f"{TITLES[self.runtime]} {version(package)}"

    @property
    def device(self) -> str:
        """What it runs on: the model of the processor or the GPU."""
        return torch.cuda.get_device_name() if self.runtime == "cuda" else processor()

    def made(self, latency: Latency) -> bool:
        """Whether a latency was measured on this runtime, on such a machine and in this way."""
        ways = (latency.runtime, latency.device, latency.batch_size, latency.threads)
        return ways == (self.name, self.device, self.batch_size, self.threads)

    @property
    def clock(self) -> Callable[[], float]:
        """Tells the seconds that a run takes."""
        alone = self.threads == 1 and self.runtime != "cuda"
        return time.process_time if alone else time.perf_counter

    def latency(self, times: Sequence[float]) -> Latency:
        """The latency of batches that took `times`, in seconds."""
        return Latency.of(times, self.batch_size, self.device, self.threads, self.name)


def processor() -> str:
    """The model of the machine's processor, as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def lower_quartile(times: Sequence[float]) -> float:
    """What a quarter of the times stays below."""
    return quantiles(times, n=4, method="inclusive")[0]


def describe(how: Latency | Deployment) -> str:
    """How a latency is measured: "ONNX Runtime 1.32.0, batch 1, 2 threads"."""
    name = how.name if isinstance(how, Deployment) else how.runtime
    return f"{name}, batch {how.batch_size}, {how.threads} thread{'' if how.threads == 1 else 's'}"


def prepare(model: nn.Module, example: Example, deployment: Deployment) -> Runner:
    """Make a network ready to run one batch on a runtime.

    Args:
        model: The network, on any device; it is copied.
        example: Its inputs, batch first; the first sample is repeated to the batch.
        deployment: The runtime.

    Returns:
        A function that runs the batch; under `threads_of` it has its threads.
    """
    batch = batch_of(tuple(value.detach().cpu() for value in example), deployment.batch_size)
    if deployment.runtime in ("onnxruntime", "openvino"):
        opened = open_onnx if deployment.runtime == "onnxruntime" else open_openvino
        run = opened(quick_onnx(model, batch), deployment.threads)
        return lambda: run(*batch)
    return _prepare_torch(model, batch, deployment)


def _prepare_torch(model: nn.Module, batch: Example, deployment: Deployment) -> Runner:
    on_gpu = deployment.runtime == "cuda"
    device = torch.device("cuda" if on_gpu else "cpu")
    own: Any = deepcopy(model).eval().requires_grad_(False).to(device)
    own = own.to(memory_format=torch.contiguous_format)
    inputs = tuple(value.to(device) for value in batch)
    if deployment.runtime == "torch-compile":
        own = torch.compile(own, dynamic=False)

    def run() -> None:
        with torch.inference_mode():
            own(*inputs)
        if on_gpu:
            torch.cuda.synchronize()

    return run


@contextmanager
def threads_of(deployment: Deployment) -> Iterator[None]:
    """Give PyTorch the deployment's threads; the other runtimes have theirs already."""
    before = torch.get_num_threads()
    torch.set_num_threads(deployment.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class LatencyMeter:
    """Times networks beside the baseline on one runtime.

    Args:
        baseline: The baseline.
        example: Its inputs, batch first.
        deployment: The runtime.
        reference: The baseline's latency as measured earlier in the study; None to measure it now.

    Attributes:
        deployment: The runtime.
        example: The networks' inputs.
        reference: The baseline's latency, which all others of the study refer to.
        runner: Runs the baseline on one batch.

    Raises:
        ConfigError: If the baseline doesn't run there.
    """

    def __init__(
        self,
        baseline: nn.Module,
        example: Example,
        deployment: Deployment,
        reference: Latency | None = None,
    ) -> None:
        self.deployment = deployment
        self.example = example
        try:
            with threads_of(deployment):
                self.runner = prepare(baseline, example, deployment)
                if reference is None:
                    (times,) = time_in_turns(
                        [self.runner], REFERENCE_SECONDS, MIN_RUNS, deployment.clock
                    )
                    reference = deployment.latency(times)
                else:
                    self.runner()
        except Exception as error:
            # Exporters, compilers and runtimes fail in more ways than can be named.
            raise ConfigError(
                f"The network can't be timed with latency.runtime = '{deployment.runtime}': "
                f"{type(error).__name__}: {error}. Name another runtime (torch runs all networks)."
            ) from error
        self.reference = reference

    def measure(self, model: nn.Module, seconds: float = 1.0, min_runs: int = MIN_RUNS) -> Latency:
        """A network's latency, as its ratio to the baseline's of the same turns.

        The ratio is that of the lower quartiles: other processes only ever add time, and on a busy
        machine they add milliseconds to more than every other turn of a small network.

        Args:
            model: The network.
            seconds: Time to spend on both, the warm-up not counted.
            min_runs: Turns at least.

        Returns:
            That ratio times the reference's milliseconds; the spread in the same measure.
        """
        with threads_of(self.deployment):
            runner = prepare(model, self.example, self.deployment)
            before, after = time_in_turns(
                [self.runner, runner], seconds, min_runs, self.deployment.clock
            )
        found = self.deployment.latency(after)
        scale = self.reference.median_ms / lower_quartile(before)
        spread = scale * found.iqr_ms / 1e3
        return replace(found, median_ms=scale * lower_quartile(after), iqr_ms=spread)

    def speedup(self, latency: Latency) -> float:
        """How many times as fast as the baseline a network is that took so long."""
        return self.reference.median_ms / latency.median_ms
