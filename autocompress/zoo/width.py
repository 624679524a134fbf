"""How a width multiplier changes numbers of channels."""

from __future__ import annotations


def scaled(channels: int, width: float) -> int:
    """`width * channels`, rounded, and at least 1.

    Raises:
        ValueError: If `width` isn't positive.
    """
    if not width > 0:
        raise ValueError(f"width must be greater than 0, got {width}.")
    return max(1, round(channels * width))


def scaled_by_eights(channels: int, width: float) -> int:
    """`width * channels` as a multiple of 8 and no more than 10 % below it.

    The rule of the MobileNet authors' code and of torchvision, so that the counts of the usual
    multipliers are the published ones.

    Raises:
        ValueError: If `width` isn't positive.
    """
    scaled(channels, width)
    wanted = channels * width
    eights = max(8, int(wanted + 4) // 8 * 8)
    return eights + 8 if eights < 0.9 * wanted else eights
