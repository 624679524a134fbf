"""Image files: read one, or decode all of them once and keep them as one array of bytes.

The array lies in the cache folder and is mapped into memory, so it is there at once the next time,
and processes share it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from autocompress.cache import keep
from autocompress.config import cache_folder
from autocompress.errors import ConfigError
from autocompress.imagesets import Arrays, Encoded, Part, Pixels, Split

MEMORY_LIMIT = 4 * 2**30
"""Images are decoded once if they take no more than this many bytes, whatever their size."""
MAPPED_SIZE = 96
"""Images of up to this height and width are decoded once however many they are: reading them again
takes longer than learning from them."""

_CHUNK = 2_048
"""Images that are decoded before they are written."""
_TOGETHER = 64
"""Images that a thread decodes at a time."""
_SHOWN = 3
"""So many broken images an error names."""
_LOOKED_AT = 256
"""Of images that are read anew in every pass, so many are tried at the start."""

Shape = tuple[int, int, int]


def read_file(files: Sequence[str], mode: str, index: int) -> Image.Image:
    """The image in a file, in a mode of Pillow's ("L" or "RGB").

    Raises:
        ConfigError: If it can't be read, has more than 8 bits, or is coloured where grey is asked.
    """
    file = files[index]
    with _opened(file) as image:
        if mode == "L" and image.mode not in ("1", "L", "LA"):
            raise ValueError(
                "it has colours, which most others have not; convert it, or all others"
            )
        return image.convert(mode)


def file_name(files: Sequence[str], index: int) -> str:
    """What the image in a file is called in messages."""
    return files[index]


def all_grey(files: Sequence[str]) -> bool:
    """Whether no file has colours; those that can't be read are passed over."""
    for file in files:
        try:
            with _opened(file) as image:
                if image.mode not in ("1", "L"):
                    return False
        except ConfigError:
            continue
    return True


@contextmanager
def _opened(file: str) -> Iterator[Image.Image]:
    """An image file; what goes wrong with it inside the block is named."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are of mode {image.mode}; convert it to 8 bits")
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"The image '{file}' can't be read: {error}.") from error


def decoded(found: Encoded, size: int | None) -> Arrays | Encoded:
    """The images as arrays, or as they are if they are large and many.

    Args:
        found: Encoded images.
        size: Height and width that they get; None if they have one size.

    Raises:
        ConfigError: If images can't be read (the first few are named), or differ in size; of images
            that stay encoded a sample is tried.
    """
    first, image = _first_readable(found.train)
    width, height = image.size if size is None else (size, size)
    shape = (len(image.getbands()), height, width)
    parts = (found.train, found.val, found.test)
    total = sum(len(part.labels) for part in parts if part is not None) * int(np.prod(shape))
    if total > MEMORY_LIMIT and max(height, width) > MAPPED_SIZE:
        for part in parts:
            if part is not None:
                _try_some(part)
        return found
    reference = "" if size is not None else found.train.name(first)
    train, val, test = (
        None
        if part is None
        else Split(_kept_pixels(_Decoder(part, shape, size, reference)), part.labels)
        for part in parts
    )
    assert train is not None and test is not None
    return Arrays(found.name, train, val, test, found.classes)


def _first_readable(part: Part) -> tuple[int, Image.Image]:
    """An image that can be read, among the first few, and its position."""
    broken = []
    for index in range(min(len(part.labels), _SHOWN)):
        try:
            return index, part.read(index)
        except ConfigError as error:
            broken.append(str(error))
    raise ConfigError("\n".join(broken))


def _try_some(part: Part) -> None:
    """Read images from all over a part."""
    broken = _Broken()
    count = len(part.labels)
    tried = np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(np.int64))

    def look(index: int) -> None:
        with broken.noted():
            part.read(index)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(look, tried.tolist()))
    broken.check(f"of {len(tried)} that were tried")


class _Broken:
    """What is wrong with images, collected so that all can be mended at once."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note an error about an image instead of raising it."""
        try:
            yield
        except ConfigError as error:
            self._lines.append(str(error))

    def check(self, among: str) -> None:
        """Raise what was noted.

        Raises:
            ConfigError: If anything was.
        """
        if not self._lines:
            return
        count = len(self._lines)
        lines = sorted(self._lines)[:_SHOWN]
        if count > 1:
            lines.append(f"{count} images {among} are broken; mend or remove them.")
        raise ConfigError("\n".join(lines))


class _Decoder:
    """Decodes a part's images.

    Args:
        part: The images.
        shape: Channels, height and width of each.
        size: Height and width that they get; None if they have one size.
        reference: The image that the shape was taken from, for messages.
    """

    def __init__(self, part: Part, shape: Shape, size: int | None, reference: str) -> None:
        self.part, self.shape, self.size, self.reference = part, shape, size, reference
        key = f"{shape} {size}\n{part.listing}"
        self.key = hashlib.sha256(key.encode()).hexdigest()[:24]
        self.whole = (len(part.labels), *shape)

    def chunks(self) -> Iterator[Pixels]:
        """All images in turn, `n x c x h x w`.

        Raises:
            ConfigError: If any can't be read, at the end; if one has another size, at once.
        """
        broken = _Broken()
        # Decoding happens outside Python's lock, so threads do.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, self.whole[0], _CHUNK):
                pixels = np.zeros((min(_CHUNK, self.whole[0] - start), *self.shape), np.uint8)
                starts = range(0, len(pixels), _TOGETHER)
                list(pool.map(partial(self._decode, pixels, start, broken), starts))
                yield pixels
        broken.check(f"of {self.whole[0]}")

    def _decode(self, pixels: Pixels, start: int, broken: _Broken, first: int) -> None:
        for place in range(first, min(first + _TOGETHER, len(pixels))):
            index = start + place
            with broken.noted():
                image = self.part.read(index)
                if self.size is not None:
                    image = _fitted(image, self.size)
                array = np.asarray(image)
                array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
                if array.shape != self.shape:
                    raise _OtherSize(self._sizes(index, image))
                pixels[place] = array

    def _sizes(self, index: int, image: Image.Image) -> str:
        _, height, width = self.shape
        return (
            f"The images differ in size ({width} x {height} pixels: {self.reference}; "
            f"{image.width} x {image.height}: {self.part.name(index)}): set data.image_size."
        )


class _OtherSize(Exception):
    """An image of another size: all have to be given one, so the others matter no more."""


def _kept_pixels(decoder: _Decoder) -> Pixels:
    """All images of a part, from the cache if they were decoded before."""
    path = cache_folder() / "images" / f"{decoder.key}.npy"
    try:
        found = _mapped(path, decoder.whole)
        if found is not None:
            return found
        if keep(path, partial(_write, decoder)):
            found = _mapped(path, decoder.whole)
            assert found is not None, "it has just been written"
            return found
        if np.prod(decoder.whole) > MEMORY_LIMIT:
            raise ConfigError(
                f"The decoded images take {np.prod(decoder.whole) / 2**30:.1f} GiB, too much to "
                f"hold in memory, and {path.parent} can't keep them: free some space, or set "
                "AUTOCOMPRESS_HOME to a folder that can be written."
            )
        return np.concatenate(list(decoder.chunks()))
    except _OtherSize as error:
        raise ConfigError(str(error)) from None


def _mapped(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """The array in a file, read as it is needed; None if there is none such."""
    try:
        # Copy on write: PyTorch wants arrays that could be written to.
        found: Pixels = np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.uint8 else None


def _write(decoder: _Decoder, path: Path) -> None:
    """Write all images as a .npy file, chunk by chunk: they need not fit into memory.

    Not through a map: there a full disk would end the process instead of raising an error.
    """
    with path.open("wb") as file:
        _header(file, decoder.whole)
        for pixels in decoder.chunks():
            file.write(pixels.data)


def _header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    facts = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, facts)


def _fitted(image: Image.Image, size: int) -> Image.Image:
    """`image` with its shorter side scaled to `size` and the middle cut out."""
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    return scaled.crop((left, top, left + size, top + size))
