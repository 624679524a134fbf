"""What is kept between studies: decoded images, trained baselines, times of layers.

All of it can be made again. So a cache that can't be written costs time and no result: whoever
writes there warns and goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from autocompress.artifacts import replacing


def keep(path: Path, write: Callable[[Path], object]) -> bool:
    """Write a file of the cache, beside and then renamed; warn where that can't be done.

    Args:
        path: Where it belongs.
        write: Writes the file at the path that it is given. Of what it began nothing is left if it
            fails.

    Returns:
        Whether it is there now.
    """
    try:
        with replacing(path) as beside:
            write(beside)
    except OSError as error:
        warnings.warn(f"{cannot_keep(path, error)} It is made anew next time.", stacklevel=2)
        return False
    return True


def cannot_keep(path: Path, error: OSError) -> str:
    """Why a file of the cache can't be written, and the cure."""
    return (
        f"The cache can't keep {path} ({error.strerror or error}): free some space, or set "
        "AUTOCOMPRESS_HOME to a folder that can be written."
    )
