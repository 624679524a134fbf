"""Processes that train one network together, one on each GPU, as `torchrun` starts them.

Each reads the same batches and learns from its part of them; gradients are averaged. What only one
process can decide, the first one (rank 0) decides for all.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autocompress.batch import Batch, part_of, samples_in, to_device
from autocompress.capture import Gradient
from autocompress.errors import AutocompressError, ConfigError

PATIENCE = timedelta(hours=1)
"""How long a process waits for the others; rank 0 evaluates alone meanwhile."""

LEAST = 2
"""Samples in a part of a batch: batch norm needs two."""


def world() -> int:
    """How many processes train together; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if world() > 1 else 0


def join_group(device: torch.device) -> torch.device:
    """Join the processes that `torchrun` started along with this one; alone it does nothing.

    Args:
        device: What to train on; of "cuda" each process of a machine takes a GPU of its own.

    Returns:
        This process's device.

    Raises:
        ConfigError: If torchrun's environment is incomplete or the machine has too few GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return device
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start "
            "the processes with torchrun, or unset WORLD_SIZE."
        )
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ConfigError(
                f"Each process needs a GPU of its own: LOCAL_RANK is {local}, this machine has "
                f"{count}; start fewer processes (torchrun --nproc-per-node)."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return device


def leave_group() -> None:
    """Undo `join_group`."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def share(value: Any) -> Any:
    """Rank 0's value, in every process: it travels as JSON, so tuples come out as lists."""
    return json.loads(_share_bytes(json.dumps(value).encode() if rank() == 0 else b""))


def ask_first(question: Callable[[], Any]) -> Any:
    """What `question` answers on rank 0, in every process; it is called nowhere else.

    Args:
        question: Gives a JSON value. It must not wait for other processes.

    Raises:
        KeyboardInterrupt: In all of them, if the question raised it.
        AutocompressError: Where rank 0 raised anything else, which it raises there itself: no
            process waits for one that is gone.
    """
    if world() == 1:
        return question()
    answer, failure = None, None
    if rank() == 0:
        try:
            answer = json.dumps(question())
        except BaseException as error:
            failure = error
    stop = isinstance(failure, KeyboardInterrupt)
    answer, stop, reason = share([answer, stop, repr(failure) if failure else None])
    if failure is not None:
        raise failure
    if stop:
        raise KeyboardInterrupt
    if reason is not None:
        raise AutocompressError(f"The first of {world()} processes ended with {reason}; see there.")
    return json.loads(answer)


def share_state(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """Rank 0's dict of tensors and plain values, in every process, on the CPU."""
    if world() == 1:
        return state
    buffer = io.BytesIO()
    if rank() == 0:
        torch.save(state, buffer)
    data = io.BytesIO(_share_bytes(buffer.getvalue()))
    if rank() == 0:
        return state
    received: dict[str, Any] | None = torch.load(data, map_location="cpu", weights_only=True)
    return received


def share_buffers(model: nn.Module) -> None:
    """Give every process rank 0's buffers, such as batch-norm statistics."""
    if world() > 1:
        for buffer in model.buffers():
            value = buffer.detach().contiguous()
            dist.broadcast(value, 0)
            buffer.detach().copy_(value)


def mean_over_group(values: Tensor) -> Tensor:
    """The mean of each process's `values`, in every process."""
    if world() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world()


def shared_gradient(
    model: nn.Module, loss: Callable[[Batch], Tensor], device: torch.device
) -> Gradient:
    """A `Gradient` of whole batches, of which each process computes a part.

    All get the same gradients, those of the mean over the whole batch, and start with rank 0's
    weights. The returned losses are such that their mean over the processes is the batch's.

    Args:
        model: What is trained.
        loss: `loss(batch)` runs it on a part of a batch; a mean over its samples.
        device: This process's.
    """
    # Auxiliary classifiers, and layers that chance leaves out, get no gradient. Where there are
    # none, the reducer says once that it looks for them in vain.
    together = DistributedDataParallel(_Loss(model, loss), find_unused_parameters=True)

    def gradient(batch: Batch) -> Tensor:
        size = samples_in(batch)
        weight = 1.0
        if size >= LEAST * world():
            batch = part_of(batch, rank(), world())
            weight = samples_in(batch) * world() / size
        # Of a batch that is too small to be shared out, each process takes all.
        value: Tensor = weight * together(to_device(batch, device))
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    return gradient


class _Loss(nn.Module):
    """A loss as a network: what DistributedDataParallel wraps is called in one way only."""

    def __init__(self, model: nn.Module, loss: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(batch)


def _share_bytes(data: bytes) -> bytes:
    """Rank 0's bytes; not pickled, for a pickle can run code."""
    if world() == 1:
        return data
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    size = torch.tensor(len(data), device=device)
    dist.broadcast(size, 0)
    buffer = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if rank() == 0:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, 0)
    return buffer.cpu().numpy().tobytes()
