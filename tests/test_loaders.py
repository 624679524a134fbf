"""Batches from memory, and how validation data is cut off loaders."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyNet, all_images, all_labels, make_images, make_loader
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from autocompress.batch import KnownBatch
from autocompress.errors import ConfigError
from autocompress.loaders import (
    FIRST_VIEWS,
    ArrayLoader,
    _windows,
    calibration_loader,
    check_batches,
    check_loader,
    check_repeats,
    describe_input,
    in_order,
    labels_of,
    loader_labels,
    measure_input,
    split_loader,
    stratified_split,
    unaugmented,
)
from autocompress.task import Task


def array_loader(count: int = 64, size: int = 8, **options: Any) -> ArrayLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    settings: dict[str, Any] = {"batch_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3, **options}
    return ArrayLoader(images, torch.arange(count) % 4, **settings)


# The loader of images in memory


def test_batches_are_normalized_and_channels_last() -> None:
    loader = array_loader()
    images, labels = next(iter(loader))
    assert images.shape == (16, 3, 8, 8) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = (loader.images[:16].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(images.contiguous(), expected)
    assert labels.dtype == torch.int64 and torch.equal(labels, loader.labels[:16])


def test_the_order_changes_from_pass_to_pass_and_follows_from_the_seed() -> None:
    first, second = array_loader(shuffle=True), array_loader(shuffle=True)
    passes = [all_images(first), all_images(first)]
    assert not torch.equal(*passes)
    assert torch.equal(passes[0], all_images(second)) and torch.equal(passes[1], all_images(second))
    assert not torch.equal(passes[0], all_images(array_loader(shuffle=True, seed=1)))


def test_limited_views_come_again_whatever_the_order() -> None:
    loader = array_loader(shuffle=True, augment="crop-flip")

    def views(seed: int) -> list[tuple[int, Tensor]]:
        """The view of each of three passes, with its images in the order of the whole set."""
        loader.reseed(seed)
        loader.limit_views(3)
        found = []
        for _ in range(3):
            served = list(loader)
            assert all(isinstance(batch, KnownBatch) for batch in served)
            places = torch.cat([batch.places for batch in served])
            found.append((served[0].view, all_images(served)[places.argsort()]))
        return found

    for seed in (FIRST_VIEWS, FIRST_VIEWS + 1, FIRST_VIEWS + 2):
        begin = seed % FIRST_VIEWS
        assert [view for view, _ in views(seed)] == [(begin + index) % 3 for index in range(3)]
    one, two = dict(views(0)), dict(views(1))
    assert all(torch.equal(one[view], two[view]) for view in range(3))
    assert not torch.equal(one[0], one[1])
    for batch in loader:
        assert torch.equal(batch[1], loader.labels[batch.places])


def test_reseeding_starts_anew() -> None:
    loader = array_loader(shuffle=True, augment="crop-flip")
    assert type(next(iter(loader))) is tuple
    loader.limit_views(2)
    assert isinstance(next(iter(loader)), KnownBatch)
    loader.reseed(0)
    before = all_images(loader)
    all_images(loader)
    loader.reseed(0)
    assert torch.equal(before, all_images(loader))


def test_an_incomplete_batch_is_left_out_only_where_others_come_next_time() -> None:
    assert len(array_loader(40)) == 3 and len(all_labels(array_loader(40))) == 40
    assert len(array_loader(40, shuffle=True)) == 2
    assert len(all_labels(array_loader(40, shuffle=True))) == 32
    assert len(array_loader(8, shuffle=True)) == 1 and len(all_labels(array_loader(8))) == 8


def test_images_may_be_kept_elsewhere_than_batches_are_made() -> None:
    """The device "meta" stands for one that isn't here: it has shapes, but no contents."""
    loader = array_loader(augment="crop-flip", shuffle=True, device="meta", keep_on="cpu")
    for part in (loader, loader.subset(torch.arange(16, 48))):
        assert part.images.device.type == "cpu" and part.images.float().std() > 0
        images, labels = next(iter(part))
        assert images.device.type == labels.device.type == "meta"
        assert images.shape == (16, 3, 8, 8) and images.dtype == torch.float32
    whole = array_loader(device="meta")
    assert whole.images.device.type == "meta" and next(iter(whole))[0].device.type == "meta"


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    loader = array_loader(256, augment="flip", mean=[0.0] * 3, std=[1 / 255] * 3)
    images, plain = all_images(loader), loader.images.float()
    same = (images == plain).flatten(1).all(1)
    mirrored = (images == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(same, ~mirrored)
    assert 90 < int(mirrored.sum()) < 166


def test_a_crop_shifts_by_at_most_an_eighth() -> None:
    loader = array_loader(256, size=16, augment="crop", mean=[0.0] * 3, std=[1 / 255] * 3)
    padded = torch.nn.functional.pad(loader.images.float(), (2, 2, 2, 2))
    images = all_images(loader)
    found = torch.zeros(256, 25, dtype=torch.bool)
    for shift in range(25):
        y, x = divmod(shift, 5)
        window = padded[:, :, y : y + 16, x : x + 16]
        found[:, shift] = (images == window).flatten(1).all(1)
    assert bool(found.any(1).all())
    assert bool(found.any(0).all())


def test_a_subset_is_of_its_loader() -> None:
    loader = array_loader(64, shuffle=True, augment="flip")
    inner = loader.subset(torch.tensor([5, 6, 7])).subset(torch.tensor([2, 0]), shuffle=False)
    assert torch.equal(inner.images, loader.images[[7, 5]])
    assert inner.augment == "flip" and not inner.shuffle


def test_calibration_shows_what_training_shows_and_leaves_training_alone() -> None:
    loader = array_loader(64, shuffle=True, augment="crop-flip")
    first = all_images(loader)
    loader.reseed(loader.seed)
    apart = calibration_loader(loader)
    assert isinstance(apart, ArrayLoader) and apart.augment == "crop-flip"
    assert torch.equal(all_images(apart), first)
    assert torch.equal(all_images(loader), first)
    theirs = make_loader(32, 0)
    assert calibration_loader(theirs) is theirs


def test_unaugmented_gives_the_same_images_mixed_and_unchanged() -> None:
    loader = array_loader(64, shuffle=True, augment="crop-flip")
    quiet = unaugmented(loader)
    assert isinstance(quiet, ArrayLoader)
    assert torch.equal(all_images(quiet), all_images(quiet))
    assert not torch.equal(quiet.images, loader.images)
    key = loader.images.flatten(1).double().sum(1)
    assert torch.equal(quiet.images.flatten(1).double().sum(1).sort()[0], key.sort()[0])
    theirs = make_loader(32, 0)
    assert unaugmented(theirs) is theirs


# Splits


def test_a_stratified_split_keeps_the_shares() -> None:
    labels = np.repeat(np.arange(3), [100, 50, 7]).astype(np.int64)
    rest, chosen = stratified_split(labels, 0.1, 0)
    assert np.array_equal(np.sort(np.concatenate([rest, chosen])), np.arange(157))
    assert np.bincount(labels[chosen]).tolist() == [10, 5, 1]
    again = stratified_split(labels, 0.1, 0)[1]
    assert np.array_equal(chosen, again)
    assert not np.array_equal(chosen, stratified_split(labels, 0.1, 1)[1])


def test_a_split_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.val_fraction = 0.01 of 10 images"):
        stratified_split(np.zeros(10, np.int64), 0.01, 0)


def test_validation_data_of_an_array_loader_is_not_augmented() -> None:
    train, val = split_loader(array_loader(64, shuffle=True, augment="crop"), 0.25, 0)
    assert isinstance(train, ArrayLoader) and isinstance(val, ArrayLoader)
    assert (len(train.labels), len(val.labels)) == (48, 16)
    assert train.augment == "crop" and train.shuffle
    assert val.augment == "none" and not val.shuffle
    assert torch.bincount(val.labels).tolist() == [4] * 4


def test_a_dataloader_keeps_its_settings() -> None:
    def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {
            "x": torch.stack([s[0] for s in samples]),
            "y": torch.stack([s[1] for s in samples]),
        }

    dataset = TensorDataset(*make_images(80, 0))
    loader = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=collate, drop_last=True)
    train, val = split_loader(loader, 0.25, 0)  # type: ignore[arg-type]
    assert isinstance(train, DataLoader) and isinstance(val, DataLoader)
    assert len(train.dataset) == 60 and len(val.dataset) == 20  # type: ignore[arg-type]
    assert train.batch_size == 8 and train.drop_last and not val.drop_last
    first, second = ([batch["y"].tolist() for batch in loader] for loader in (val, val))
    assert first == second
    assert np.bincount(sum(first, [])).tolist() == [5] * 4
    firsts = {tuple(next(iter(train))["y"].tolist()) for _ in range(4)}
    assert len(firsts) > 1


def test_labels_are_read_through_where_there_is_no_list_of_them() -> None:
    images, labels = make_images(40, 0)
    pairs = list(zip(images, labels.tolist(), strict=True))
    _, val = split_loader(DataLoader(pairs, batch_size=8), 0.2, 0)  # type: ignore[arg-type]
    assert torch.bincount(all_labels(val)).tolist() == [2] * 4


def test_labels_are_those_that_a_data_set_gives() -> None:
    """Not those that it keeps, where it makes others of them."""

    class Parity(Dataset[tuple[Tensor, int]]):
        def __init__(self, count: int) -> None:
            self.targets = list(range(10)) * (count // 10)

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.zeros(1), self.targets[index] % 2

    found = labels_of(Parity(50))
    assert found is not None and found.tolist() == [0, 1] * 25
    assert labels_of(Parity(6_000)) is None, "more than are read through"
    own = labels_of(TensorDataset(*make_images(40, 0)))
    assert own is not None and own.tolist() == make_images(40, 0)[1].tolist()


def test_no_last_batch_of_one_is_left_by_the_cut() -> None:
    loader = DataLoader(TensorDataset(*make_images(100, 0)), batch_size=8)
    train, val = split_loader(loader, 0.11, 0)
    assert [len(images) for images, _ in train] == [8] * 11, "89 = 11 x 8 + 1"
    assert [len(images) for images, _ in val] == [8, 3]
    train, _ = split_loader(loader, 0.1, 0)
    assert sum(len(images) for images, _ in train) == 90


def test_a_split_without_labels_is_random() -> None:
    loader = DataLoader([{"x": torch.zeros(1)} for _ in range(20)], batch_size=4)  # type: ignore[arg-type,var-annotated]
    train, val = split_loader(loader, 0.2, 0)
    assert (len(train), len(val)) == (4, 1)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.zeros(1)])


@pytest.mark.parametrize(
    "loader",
    [
        [(torch.zeros(1, 1, 8, 8), torch.zeros(1))],
        DataLoader(Stream()),
        DataLoader(
            TensorDataset(torch.zeros(4, 1)),
            sampler=WeightedRandomSampler([1.0] * 4, 4),
        ),
    ],
    ids=["list", "iterable", "sampler"],
)
def test_loaders_that_can_not_be_split_ask_for_val(loader: Any) -> None:
    with pytest.raises(ConfigError, match="give val yourself"):
        split_loader(loader, 0.1, 0)


def test_a_shuffled_loader_is_put_in_order() -> None:
    shuffled = make_loader(40, 0, shuffle=True)
    ordered = in_order(shuffled)
    first, second = all_labels(ordered), all_labels(ordered)
    assert torch.equal(first, second) and torch.equal(first, make_images(40, 0)[1])
    assert in_order(make_loader(8, 0)) is not None
    mine = [(torch.zeros(1), torch.zeros(1))]
    assert in_order(mine) is mine  # type: ignore[comparison-overlap]


class Doubling(DataLoader[Any]):
    """A loader of somebody's own, whose batches are its own business."""

    def __iter__(self) -> Any:
        return ((2 * images, labels) for images, labels in super().__iter__())


@pytest.mark.parametrize(
    "loader",
    [
        Doubling(TensorDataset(*make_images(64, 1)), batch_size=8, shuffle=True),
        DataLoader(
            range(64),  # type: ignore[arg-type]
            batch_size=8,
            sampler=RandomSampler(range(64), num_samples=16),
        ),
    ],
    ids=["subclass", "draws"],
)
def test_what_would_be_another_loader_in_order_is_left_as_it_is(loader: Any) -> None:
    assert in_order(loader) is loader
    with pytest.raises(ConfigError, match="shuffle=False"):
        check_repeats("test", loader)
    with pytest.raises(ConfigError, match="give val yourself"):
        split_loader(loader, 0.5, 0)


class Unending(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(int, 1)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (iter([1]), "read again"),
        ((batch for batch in [1]), "without a length"),
        (DataLoader(Unending()), "without a length"),
        ([], "is empty"),
        (3, "got a int"),
    ],
)
def test_what_can_not_be_read_again_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_loader("train", loader)


def test_data_that_changes_from_pass_to_pass_is_refused() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            image, label = super().__getitem__(index)
            return image + torch.rand(()), label

    check_repeats("val", make_loader(64, 1))
    check_repeats("val", array_loader())
    with pytest.raises(ConfigError, match="val begins with another batch"):
        check_repeats("val", DataLoader(Noisy(*make_images(64, 1)), batch_size=8))
    with pytest.raises(ConfigError, match="shuffled, drawn or augmented"):
        check_repeats("val", array_loader(shuffle=True))


def test_a_subset_sampler_becomes_a_subset() -> None:
    dataset = TensorDataset(*make_images(64, 1))
    chosen = DataLoader(dataset, batch_size=8, sampler=SubsetRandomSampler(range(0, 64, 4)))
    ordered = in_order(chosen)
    check_repeats("test", ordered)
    assert torch.equal(all_labels(ordered), torch.zeros(16, dtype=torch.int64))
    train, val = split_loader(chosen, 0.25, 0)
    assert len(all_labels(train)) == 12 and len(all_labels(val)) == 4
    assert not torch.equal(all_images(train), all_images(train))


def test_labels_come_in_the_loaders_order() -> None:
    ordered = make_loader(64, 1)
    assert np.array_equal(loader_labels(ordered), all_labels(ordered).numpy())
    assert np.array_equal(loader_labels(array_loader()), all_labels(array_loader()).numpy())
    assert loader_labels(make_loader(64, 1, shuffle=True)) is None


# What a loader is like


def test_measuring_the_input_changes_nothing_that_is_served() -> None:
    loader, same = (array_loader(512, shuffle=True, augment="crop-flip") for _ in range(2))
    assert measure_input(loader, 0.01) > 0
    assert torch.equal(all_images(loader), all_images(same))
    assert measure_input(make_loader(64, 0), 10.0) > 0, "a whole pass ends it as well"
    assert measure_input(make_loader(32, 0), 10.0) == 0, "there is but the first batch"


def test_a_loader_is_described() -> None:
    text = describe_input(array_loader(2000, shuffle=True))
    assert re.fullmatch(
        r"2,000 training images, 3 x 8 x 8, in memory; the input alone makes [\d,]+ images/s\.",
        text,
    )
    assert describe_input(make_loader(64, 0)) == "2 training batches."
    lazy = DataLoader(TensorDataset(*make_images(64, 0)), batch_size=8, num_workers=2)
    assert describe_input(lazy) == "8 training batches, made by 2 processes."


def test_windows_are_cut_alike_on_every_device() -> None:
    images = torch.randint(0, 256, (5, 3, 8, 10), dtype=torch.uint8)
    y, x = torch.tensor([0, 1, 2, 3, 2]), torch.tensor([4, 0, 1, 2, 3])
    found = _windows(images, y, x, 5, 6)
    for index in range(5):
        top, left = int(y[index]), int(x[index])
        assert torch.equal(found[index], images[index, :, top : top + 5, left : left + 6])
    assert _windows(images.to("meta"), y, x, 5, 6).shape == found.shape


# Batches of the user's


def user_task(images: Tensor, labels: Any, **settings: Any) -> Task:
    """A task whose three loaders give these images and labels."""
    loader = [(images, labels)]
    return Task(TinyNet(), loader, loader, loader, **settings)


IMAGES = torch.zeros(4, 1, 8, 8)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.0, 1.0, 2.0, 3.0]), "labels of val are of type float32; .*labels.long"),
        (torch.tensor([0, 1, 2, 4]), "image 3 of val is 4, .* has 4 outputs, .* 0 to 3 .1 of 4"),
        (torch.tensor([0, -1, 2, -1]), "image 1 of val is -1, .* .2 of 4"),
        (torch.tensor([0, 1, 2]), "has 4 images and 3 labels"),
        ([0, 1, 2, 3], r"must be \(images, labels\) of tensors, got \(Tensor, list\)"),
    ],
)
def test_labels_that_no_class_has_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_batches(user_task(IMAGES, labels))


@pytest.mark.parametrize("batch", [IMAGES, {"image": IMAGES}, (IMAGES,)])
def test_batches_that_are_no_images_and_labels_are_refused(batch: Any) -> None:
    task = user_task(IMAGES, torch.tensor([0, 1, 2, 3]))
    check_batches(task)
    task.test = [batch]
    with pytest.raises(ConfigError, match=r"batch of test must be \(images, labels\), got a"):
        check_batches(task)
    task.forward = lambda model, batch: model(IMAGES)
    check_batches(task)


def test_labels_of_later_batches_are_looked_at_too() -> None:
    images, labels = make_images(96, 0)
    labels[70] = 9
    wrong = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
    good = make_loader(32, 0)
    with pytest.raises(ConfigError, match="image 70 of train is 9"):
        check_batches(Task(TinyNet(), wrong, good, good))
