"""Loaders: batches from memory or decoded on demand, and how validation data is cut off them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from autocompress.batch import KnownBatch, samples_in, tensors_in
from autocompress.errors import ConfigError
from autocompress.manifest import dtype_name
from autocompress.task import Loader, Task, answered, call_on_images, cross_entropy

Labels = NDArray[np.int64]

FIRST_VIEWS = 4
"""Among how many of their views runs with limited ones begin, by their seeds: a child, which goes
on from its parent's weights, mostly begins with another one."""

_READ_THROUGH = 5_000
"""Data sets of up to this many samples are read once to learn their labels."""
_COMPARED = 8
"""So many of the labels that a data set keeps are compared with those that it gives."""


class ArrayLoader:
    """Batches from images in memory: normalized, augmented and shuffled as they are served.

    It can be iterated any number of times; every pass has another order and other augmentation,
    which follow from the seed and the number of the pass alone.

    Args:
        images: `n x c x h x w`, uint8.
        labels: `n`, whole numbers.
        batch_size: Images in a batch.
        mean: Per channel, of pixels scaled to 0..1.
        std: Likewise.
        augment: "none", "flip", "crop" (by up to an eighth of the size, with black borders) or
            "crop-flip".
        shuffle: Whether the order changes from pass to pass; an incomplete last batch is then left
            out (its images come earlier in other passes).
        seed: Fixes order and augmentation.
        device: Where batches are made, augmented and normalized.
        indices: Which images, in which order; None for all.
        keep_on: Where the images are kept; None for `device`. If they are kept elsewhere, each
            batch is sent over as bytes, a quarter of what its floats would take.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: str = "none",
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
        keep_on: torch.device | str | None = None,
    ) -> None:
        self.device = torch.device(device)
        self._images = images.to(self.device if keep_on is None else torch.device(keep_on))
        self._labels = labels.long().to(self.device)
        self._indices = torch.arange(len(images)) if indices is None else indices.cpu()
        self.batch_size = batch_size
        self.mean, self.std = list(mean), list(std)
        self.augment, self.shuffle = augment, shuffle
        self.reseed(seed)
        shape = (1, len(self.std), 1, 1)
        scale = torch.tensor(self.std, dtype=torch.float32, device=self.device).view(shape)
        self._scale = 1 / (255 * scale)
        self._shift = -torch.tensor(self.mean, device=self.device).view(shape) / scale

    @property
    def shape(self) -> tuple[int, ...]:
        """Number, channels, height and width of the images."""
        return (len(self._indices), *self._images.shape[1:])

    @property
    def images(self) -> Tensor:
        """The images, `n x c x h x w`, uint8 (a copy)."""
        return self._images[self._indices.to(self._images.device)]

    @property
    def labels(self) -> Tensor:
        """The labels, `n` (a copy)."""
        return self._labels[self._indices.to(self.device)]

    def __len__(self) -> int:
        full, rest = divmod(len(self._indices), self.batch_size)
        return full + (1 if rest and not (self.shuffle and full) else 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._passes)
        view = None
        if self._views is not None:
            view = (self.seed % FIRST_VIEWS + self._passes) % self._views
        self._passes += 1
        return self._serve(generator, view)

    def reseed(self, seed: int) -> None:
        """Start anew: the next pass is the first one of `seed`."""
        self.seed = seed
        self._passes = 0
        self._views: int | None = None

    def limit_views(self, count: int) -> None:
        """Show no more than `count` augmented views of each image, until `reseed`.

        A view is a crop and a flip of its own for each image, the same in all runs: those of
        different seeds begin with one of the first `FIRST_VIEWS` and go on from view to view with
        each pass. Batches are `KnownBatch`es then.
        """
        self._views = 1 if self.augment == "none" else count

    def subset(
        self, indices: Tensor, shuffle: bool | None = None, augment: str | None = None
    ) -> ArrayLoader:
        """A loader of the images at `indices` (positions in this loader); memory is shared."""
        return ArrayLoader(
            self._images,
            self._labels,
            self.batch_size,
            self.mean,
            self.std,
            augment=self.augment if augment is None else augment,
            shuffle=self.shuffle if shuffle is None else shuffle,
            seed=self.seed,
            device=self.device,
            indices=self._indices[indices.cpu()],
            keep_on=self._images.device,
        )

    def _serve(
        self, generator: torch.Generator, view: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._indices
        if self.shuffle:
            order = order[torch.randperm(len(order), generator=generator)]
        if view is not None:
            changes = self._draw(len(self._images), torch.Generator().manual_seed(view))
        there = order.to(self._images.device)
        for index in range(len(self)):
            part = slice(index * self.batch_size, (index + 1) * self.batch_size)
            places, chosen = order[part], there[part]
            # A copy, which may be changed in place.
            images = self._images.index_select(0, chosen).to(self.device)
            if view is None:
                images = self._changed(images, self._draw(len(places), generator))
            else:
                images = self._changed(images, {k: v[places] for k, v in changes.items()})
            images = images.float().mul_(self._scale).add_(self._shift)
            images = images.contiguous(memory_format=torch.channels_last)
            labels = self._labels[chosen.to(self.device)]
            if view is None:
                yield images, labels
            else:
                yield KnownBatch(images, labels, self._images, view, places)

    def _draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """How `count` images are cropped and flipped, as chance has it; on the CPU."""
        drawn = {}
        if "crop" in self.augment:
            sides = 2 * self._border + 1
            drawn["y"], drawn["x"] = torch.randint(0, sides, (2, count), generator=generator)
        if "flip" in self.augment:
            drawn["flip"] = torch.rand(count, generator=generator) < 0.5
        return drawn

    def _changed(self, images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        """Cropped and flipped copies of `n x c x h x w` images."""
        height, width = images.shape[2:]
        if "y" in drawn:
            padded = F.pad(images, (self._border,) * 4)
            images = _windows(padded, drawn["y"], drawn["x"], height, width)
        if "flip" in drawn:
            flipped = drawn["flip"].nonzero()[:, 0].to(self.device)
            images[flipped] = images[flipped].flip(-1)
        return images

    @property
    def _border(self) -> int:
        """By how many pixels crops are moved at most, in each direction."""
        return max(1, self._images.shape[2] // 8)


def _windows(images: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Of each image the window whose corner is at `y` and `x`, which are on the CPU."""
    if images.device.type == "cpu":
        # numpy copies line by line where PyTorch copies pixel by pixel: 0.4 ms instead of 1.5 for
        # 128 images of 32 x 32 pixels.
        every = sliding_window_view(images.numpy(), (height, width), axis=(2, 3))
        return torch.from_numpy(every[np.arange(len(images)), :, y.numpy(), x.numpy()])
    corners = y.to(images.device), x.to(images.device)
    windows = images.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, corners[0], corners[1]]


class LazyImages(Dataset[tuple[Tensor, int]]):
    """Images that are read and decoded when they are asked for.

    Args:
        read: Gives the image at a position.
        labels: All labels.
        size: Height and width of the result.
        augment: As for `ArrayLoader`; "crop" cuts a random part and scales it to `size`.
        normalization: Mean and standard deviation per channel, of pixels scaled to 0..1.
    """

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        labels: Labels,
        size: int,
        augment: str,
        normalization: Mapping[str, Any],
    ) -> None:
        from torchvision.transforms import v2

        self.read, self.targets, self.size = read, labels, size
        self.augment, self.normalization = augment, normalization
        self.shorter_side = round(size * 256 / 224)
        steps: list[Any] = [v2.Resize(self.shorter_side, antialias=True), v2.CenterCrop(size)]
        if "crop" in augment:
            steps = [v2.RandomResizedCrop(size, antialias=True)]
        if "flip" in augment:
            steps.append(v2.RandomHorizontalFlip())
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                *steps,
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(normalization["mean"], normalization["std"]),
            ]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.read(index).convert("RGB")), int(self.targets[index])

    def unaugmented(self) -> LazyImages:
        """The same images, unchanged by chance."""
        return LazyImages(self.read, self.targets, self.size, "none", self.normalization)


def measure_input(loader: Loader, seconds: float = 0.2) -> float:
    """Images a second that a loader serves, if nobody does anything with them.

    A loader of images in memory goes on afterwards as if it had not been read.

    Args:
        loader: Batches.
        seconds: How long it is read, after a first batch. One pass ends it too.
    """
    batches = iter(calibration_loader(loader))
    next(batches, None)
    begun = perf_counter()
    count = 0
    for batch in batches:
        count += samples_in(batch)
        if perf_counter() - begun >= seconds:
            break
    if torch.cuda.is_available():
        # Batches that are made on a GPU are only ordered so far.
        torch.cuda.synchronize()
    return count / (perf_counter() - begun)


def describe_input(loader: Loader) -> str:
    """How many training images there are, and how fast those in memory are served."""
    if isinstance(loader, ArrayLoader):
        size = " x ".join(map(str, loader.shape[1:]))
        speed = float(f"{measure_input(loader):.2g}")
        return (
            f"{loader.shape[0]:,} training images, {size}, in memory; the input alone makes "
            f"{speed:,.0f} images/s."
        )
    if isinstance(loader, DataLoader) and loader.num_workers:
        return f"{len(loader):,} training batches, made by {loader.num_workers} processes."
    return f"{len(loader):,} training batches."


def check_batches(task: Task) -> None:
    """Refuse validation and test batches, and labels, that the default loss can't take.

    Batches of the user's own loaders are looked at, where neither forward pass nor loss are the
    user's. Training batches are left alone, for some loaders give others after every look.

    Raises:
        ConfigError: If a batch is no (images, labels), or labels are no whole numbers from 0 to the
            number of the network's outputs - 1.
    """
    own_loss = task.loss is not cross_entropy or task.training is not None
    if task.forward is not call_on_images or own_loss:
        return
    if _is_ours(task.train):
        return
    outputs = None
    for role, loader in (("val", task.val), ("test", task.test)):
        images, labels = _images_and_labels(role, next(iter(loader), None))
        outputs = outputs or _output_count(task, (images, labels))
        every = loader_labels(loader)
        if every is None and labels.ndim == 1:
            every = labels.cpu().numpy()
        if every is not None and outputs is not None:
            _check_label_range(role, every, outputs)
    every = labels_of(task.train.dataset) if isinstance(task.train, DataLoader) else None
    if every is not None and outputs is not None:
        _check_label_range("train", every, outputs)


def _is_ours(loader: Loader) -> bool:
    """Whether a loader was made from images that were checked when they were opened."""
    dataset = loader.dataset if isinstance(loader, DataLoader) else None
    dataset = dataset.dataset if isinstance(dataset, Subset) else dataset
    return isinstance(loader, ArrayLoader) or isinstance(dataset, LazyImages)


def _images_and_labels(role: str, batch: Any) -> tuple[Tensor, Tensor]:
    """The two parts of a batch; refuses what has other parts."""
    own = "or give forward and loss functions of your own to autocompress.compress()."
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        length = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ConfigError(
            f"A batch of {role} must be (images, labels), got a {type(batch).__name__}{length}: "
            f"change the loader, {own}"
        )
    images, labels = batch[:2]
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise ConfigError(
            f"A batch of {role} must be (images, labels) of tensors, got "
            f"({type(images).__name__}, {type(labels).__name__}): change the loader, {own}"
        )
    if len(images) != len(labels):
        raise ConfigError(
            f"A batch of {role} has {len(images)} images and {len(labels)} labels; every image "
            "needs one."
        )
    if labels.ndim == 1 and labels.dtype not in (torch.int64, torch.uint8):
        raise ConfigError(
            f"The labels of {role} are of type {dtype_name(labels)}; "
            f"classes are whole numbers of type int64: convert them (labels.long()), {own}"
        )
    return images, labels


def _output_count(task: Task, batch: Any) -> int | None:
    """The number of classes that the network tells apart; None where that can't be told."""
    try:
        output, _ = answered(task, batch)
    except ConfigError:
        # Whether the network can take the data is asked elsewhere.
        return None
    return output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None


def _check_label_range(role: str, labels: Labels, outputs: int) -> None:
    wrong = (labels < 0) | (labels >= outputs)
    if wrong.any():
        index = int(wrong.argmax())
        raise ConfigError(
            f"The label of image {index} of {role} is {labels[index]}, but the network has "
            f"{outputs} outputs, so labels must be 0 to {outputs - 1} ({int(wrong.sum())} of "
            f"{len(labels)} are not)."
        )


def check_loader(name: str, loader: Any) -> None:
    """Refuse what can't be read again and again, or is empty.

    Raises:
        ConfigError: If so.
    """
    try:
        length = len(loader)
    except TypeError:
        length = None
    if length is None or isinstance(loader, Iterator) or not hasattr(loader, "__iter__"):
        raise ConfigError(
            f"{name} must be batches that can be counted and read again, such as a "
            f"torch.utils.data.DataLoader or a list, got a {type(loader).__name__}"
            f"{'' if length is not None else ' without a length'}."
        )
    if not length:
        raise ConfigError(f"{name} is empty; give at least one batch.")


def check_repeats(name: str, loader: Loader) -> None:
    """Refuse validation or test batches that are others in every pass.

    Networks are compared image by image, so both must see the same ones. Only first batches are
    compared.

    Raises:
        ConfigError: If two passes begin differently.
    """
    one, two = (tuple(tensors_in(next(iter(loader), ()))) for _ in range(2))
    same = len(one) == len(two) and all(
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(one, two, strict=True)
    )
    if not same:
        raise ConfigError(
            f"{name} begins with another batch in every pass, so networks can't be compared on it: "
            "it is shuffled, drawn or augmented at random. Give batches that stay the same "
            "(shuffle=False). (Where "
            "validation data was cut from augmented training data: give val, or set data.val_from "
            "= 'test'.)"
        )


def given_loaders(
    train: Loader,
    val: Loader | None,
    test: Loader,
    *,
    fraction: float,
    source: str,
    seed: int,
    where: str = "",
) -> tuple[Loader, Loader, Loader]:
    """The user's loaders, checked and in order, with validation data cut off where none is given.

    Args:
        train: Training batches.
        val: Validation batches, or None.
        test: Test batches.
        fraction: As for `cut_validation`.
        source: As for `cut_validation`.
        seed: As for `cut_validation`.
        where: Where they come from, to begin messages with.

    Returns:
        Loaders of training, validation and test data.

    Raises:
        ConfigError: If one is empty, changes from pass to pass, or can't be read again or cut.
    """
    for role, loader in (("train", train), ("test", test), ("val", val)):
        if loader is not None or role != "val":
            check_loader(f"{where}{role}", loader)
    test = in_order(test)
    if val is not None:
        val = in_order(val)
    else:
        train, val, test = cut_validation(train, test, fraction=fraction, source=source, seed=seed)
    check_repeats(f"{where}The validation data", val)
    check_repeats(f"{where}The test data", test)
    return train, val, test


def cut_validation(
    train: Loader, test: Loader, *, fraction: float, source: str, seed: int
) -> tuple[Loader, Loader, Loader]:
    """Cut validation data off the training or the test data.

    A network that was trained on the training data knows every image in it, so that a drop measured
    on some of these is larger than on new ones. Then validation data comes from the test data, of
    which the rest stays unread until the end.

    Args:
        train: Training batches.
        test: Test batches.
        fraction: Share of the images to cut off, 0 to 1.
        source: "train" or "test".
        seed: Fixes the split.

    Returns:
        Loaders of training, validation and test data.

    Raises:
        ConfigError: If the loader can't be split.
    """
    if source == "test":
        test, val = split_loader(test, fraction, seed)
    else:
        train, val = split_loader(train, fraction, seed)
    return train, val, test


def split_loader(loader: Loader, fraction: float, seed: int) -> tuple[Loader, Loader]:
    """Cut validation data off a loader of training data.

    The split is stratified by label where labels can be read, else random. Validation batches are
    not shuffled. They are not augmented either if the loader is ours; the augmentation of another
    loader's data set can't be told from its other transforms and stays.

    Args:
        loader: An `ArrayLoader` or a `torch.utils.data.DataLoader`.
        fraction: Share of the images to cut off, 0 to 1.
        seed: Fixes the split.

    Returns:
        Loaders of training and of validation data.

    Raises:
        ConfigError: If the loader is of another kind.
    """
    loader = _without_subset_sampler(loader)
    if isinstance(loader, ArrayLoader):
        rest, chosen = stratified_split(loader.labels.cpu().numpy(), fraction, seed)
        train = loader.subset(torch.from_numpy(rest))
        return train, loader.subset(torch.from_numpy(chosen), shuffle=False, augment="none")
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"Validation data can't be cut off a {type(loader).__name__}; give val yourself, or "
            "give train as a torch.utils.data.DataLoader."
        )
    shuffled = _is_shuffled(loader)
    plain = type(loader) is DataLoader and (
        shuffled or isinstance(loader.sampler, SequentialSampler)
    )
    if isinstance(loader.dataset, IterableDataset) or not plain or loader.batch_size is None:
        raise ConfigError(
            "Validation data can't be cut off a DataLoader with an iterable data set, a sampler of "
            "its own or a class of its own; give val yourself."
        )
    dataset = loader.dataset
    labels = labels_of(dataset)
    if labels is None:
        labels = np.zeros(len(cast(Any, dataset)), np.int64)
    rest, chosen = stratified_split(labels, fraction, seed)
    quiet = dataset.unaugmented() if isinstance(dataset, LazyImages) else dataset
    # Batch norm can't train on a last batch of one sample, which the cut might leave.
    alone = len(rest) > loader.batch_size and len(rest) % loader.batch_size == 1
    drop_last = loader.drop_last or alone
    train_loader = like(loader, Subset(dataset, rest.tolist()), shuffled, drop_last)
    return train_loader, like(loader, Subset(quiet, chosen.tolist()), False, False)


def in_order(loader: Loader) -> Loader:
    """A loader that gives its samples in the same order in every pass.

    Scores of two networks are compared sample by sample. A shuffled DataLoader is replaced by one
    that does not shuffle; of any other loader, subclasses among them, the order is taken for fixed,
    see `check_repeats`.
    """
    loader = _without_subset_sampler(loader)
    if _is_shuffled(loader) and type(loader) is DataLoader:
        return like(loader, loader.dataset, False, loader.drop_last)
    return loader


def loader_labels(loader: Loader) -> Labels | None:
    """All labels in a loader's order, or None where they can't be had cheaply."""
    if isinstance(loader, ArrayLoader):
        return loader.labels.cpu().numpy()
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler):
        return labels_of(loader.dataset)
    return None


def _is_shuffled(loader: Loader) -> bool:
    """Whether a DataLoader gives each sample of its data set once, in a random order."""
    sampler = loader.sampler if isinstance(loader, DataLoader) else None
    if not isinstance(sampler, RandomSampler):
        return False
    return not sampler.replacement and sampler.num_samples == len(sampler.data_source)


def _without_subset_sampler(loader: Loader) -> Loader:
    """The same samples, shuffled, with a `Subset` in place of a SubsetRandomSampler."""
    if type(loader) is DataLoader and isinstance(loader.sampler, SubsetRandomSampler):
        chosen = Subset(loader.dataset, list(loader.sampler.indices))
        return like(loader, chosen, True, loader.drop_last)
    return loader


def calibration_loader(loader: Loader) -> Loader:
    """The same batches as in training, augmented alike, from a loader that can be read apart.

    Networks that are trained on cropped images with black borders need batch-norm statistics of
    such images: with those of whole ones a ResNet-20 on CIFAR-10 lost 3.8 points.

    Any other loader than ours is returned as it is.
    """
    if isinstance(loader, ArrayLoader):
        return loader.subset(torch.arange(len(loader.labels)))
    return loader


def unaugmented(loader: Loader) -> Loader:
    """The same samples in a fixed mixed order, unchanged by chance, where the loader is ours.

    Any other loader is returned as it is.
    """
    if isinstance(loader, ArrayLoader):
        # Mixed, for the first batches must hold all classes.
        order = torch.randperm(
            len(loader.labels), generator=torch.Generator().manual_seed(loader.seed)
        )
        return loader.subset(order, shuffle=False, augment="none")
    if isinstance(loader, DataLoader):
        dataset = loader.dataset
        if isinstance(dataset, LazyImages):
            return like(loader, dataset.unaugmented(), True, True)
        if isinstance(dataset, Subset) and isinstance(dataset.dataset, LazyImages):
            quiet = Subset(dataset.dataset.unaugmented(), dataset.indices)
            return like(loader, quiet, True, True)
    return loader


def stratified_split(labels: Labels, fraction: float, seed: int) -> tuple[Labels, Labels]:
    """Split positions so that every class has its share in both parts.

    Args:
        labels: `n` labels.
        fraction: Share of the second part.
        seed: Fixes the choice.

    Returns:
        Sorted positions of the first part, mixed positions of the second.

    Raises:
        ConfigError: If one of the parts would be empty.
    """
    total = round(fraction * len(labels))
    if not 0 < total < len(labels):
        raise ConfigError(
            f"data.val_fraction = {fraction:g} of {len(labels)} images leaves no image for "
            "training or for validation; give another fraction or more data."
        )
    rng = np.random.default_rng(seed)
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    exact = fraction * counts
    taken = np.floor(exact).astype(np.int64)
    # What rounding down left over goes to the classes that lost most by it.
    for index in np.argsort(taken - exact, kind="stable")[: total - int(taken.sum())]:
        taken[index] += 1
    parts = [
        rng.permutation(np.flatnonzero(inverse == index))[:count]
        for index, count in enumerate(taken)
    ]
    chosen = rng.permutation(np.concatenate(parts)).astype(np.int64)
    rest = np.setdiff1d(np.arange(len(labels), dtype=np.int64), chosen)
    return rest, chosen


def labels_of(dataset: Any, believed: bool = False) -> Labels | None:
    """All labels of a map-style data set, or None where they can't be had cheaply.

    Args:
        dataset: The data set.
        believed: Whether those that it keeps are taken for those that it gives; else a few samples
            are read to see.
    """
    if isinstance(dataset, Subset):
        inner = labels_of(dataset.dataset, believed)
        return None if inner is None else inner[np.asarray(dataset.indices, np.int64)]
    found = None
    for name in ("targets", "labels", "_labels"):
        found = getattr(dataset, name, None)
        if found is not None:
            break
    if found is None:
        tensors: Sequence[Tensor] = getattr(dataset, "tensors", ())
        found = tensors[1] if len(tensors) > 1 else None
    if found is None:
        # Data sets of files keep pairs of a path and a label.
        samples = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
        found = None if samples is None else [sample[1] for sample in samples]
    if found is not None and not believed and not _are_given(found, dataset):
        found = None
    if found is None and len(dataset) <= _READ_THROUGH:
        try:
            found = [int(dataset[index][1]) for index in range(len(dataset))]
        except (TypeError, ValueError, KeyError, IndexError, RuntimeError):
            return None
    if found is None:
        return None
    labels = np.asarray(found)
    if labels.ndim != 1 or len(labels) != len(dataset) or labels.dtype.kind not in "iu":
        return None
    return labels.astype(np.int64)


def _are_given(labels: Any, dataset: Any) -> bool:
    """Whether a data set gives the labels that it keeps, and no others made of them (by a
    `target_transform`, say); a few are compared. Where it gives no numbers, they are believed."""
    if isinstance(dataset, LazyImages):
        return True
    try:
        last = min(len(labels), len(dataset)) - 1
        places = {i * last // (_COMPARED - 1) for i in range(_COMPARED)}
        return all(int(dataset[place][1]) == int(labels[place]) for place in sorted(places))
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError):
        return True


def like(
    loader: DataLoader[Any], dataset: Dataset[Any], shuffle: bool, drop_last: bool
) -> DataLoader[Any]:
    """A loader of `dataset` with the settings of `loader`."""
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        shuffle=shuffle,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
