"""Where a run of `fit` keeps its state, so that another process can go on with it."""

from __future__ import annotations

import logging
import pickle
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from autocompress.artifacts import replacing
from autocompress.errors import DamagedArtifact

logger = logging.getLogger("autocompress")

NAME = "checkpoint.pt"


class Checkpoint:
    """Keeps the latest state of one run.

    A state is read by PyTorch's reader of plain tensors and numbers, which runs no code. What it
    can't read, as the state of a scheduler of one's own may be, is as good as none.

    Args:
        keep: Stores a file in the place of the one before; what it raises costs nothing.
        fetch: Writes the stored file to a path; tells whether there is one.
        every: Seconds between two states.
        clock: Seconds that only go up.
    """

    def __init__(
        self,
        keep: Callable[[Path], None],
        fetch: Callable[[Path], bool],
        every: float = 180.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keep, self._fetch = keep, fetch
        self._every, self._clock = every, clock
        self._last = clock()

    @classmethod
    def in_file(cls, path: Path, every: float = 180.0) -> Checkpoint:
        """One in a file, which whoever made it deletes when the run has ended.

        Args:
            path: Of the file.
            every: Seconds between two states.
        """

        def put(source: Path) -> None:
            with replacing(path) as beside:
                shutil.copyfile(source, beside)

        def fetch(target: Path) -> bool:
            if path.exists():
                shutil.copyfile(path, target)
            return target.exists()

        return cls(put, fetch, every)

    def due(self) -> bool:
        """Whether it is time for the next state."""
        return self._clock() - self._last >= self._every

    def save(self, run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Keep a state; where that fails, as on a full disk, the one before stays.

        Args:
            run: What tells this run from others, as plain values.
            state: Tensors and plain values.
        """
        self._last = self._clock()
        try:
            with TemporaryDirectory() as folder:
                path = Path(folder) / NAME
                torch.save({"run": dict(run), "state": dict(state)}, path)
                self._keep(path)
        except (OSError, RuntimeError, pickle.PicklingError, AttributeError, TypeError) as error:
            # torch.save tells of a full disk by a RuntimeError, and of functions by the others.
            logger.warning("A checkpoint could not be kept: %s", error)

    def load(self, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """The latest state of a run; None if there is none of this run that can be read."""
        try:
            with TemporaryDirectory() as folder:
                path = Path(folder) / NAME
                if not self._fetch(path):
                    return None
                kept = torch.load(path, map_location="cpu", weights_only=True)
        except (DamagedArtifact, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            logger.warning("The run begins anew, for its checkpoint can't be read: %s", error)
            return None
        if not isinstance(kept, dict) or kept.get("run") != dict(run):
            return None
        state: dict[str, Any] = kept["state"]
        return state
