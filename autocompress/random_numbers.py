"""Random numbers of one's own, apart from those of the rest of the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class OwnNumbers:
    """PyTorch's random numbers on the CPU, as if nobody else drew any.

    Args:
        seed: Where they begin.
        generator: One that draws beside the default one, such as a data loader's; None for none.

    Attributes:
        state: Where the default generator's stand.
    """

    def __init__(self, seed: int, generator: torch.Generator | None = None) -> None:
        self.state = torch.Generator().manual_seed(seed).get_state()
        self._generator, self._other = generator, self.state

    @contextmanager
    def used(self) -> Iterator[None]:
        """A block that draws these; what was there before is put back after it."""
        others = torch.get_rng_state()
        torch.set_rng_state(self.state)
        kept: Tensor | None = None
        if self._generator is not None:
            kept = self._generator.get_state()
            self._generator.set_state(self._other)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(others)
            if self._generator is not None and kept is not None:
                self._other = self._generator.get_state()
                self._generator.set_state(kept)
