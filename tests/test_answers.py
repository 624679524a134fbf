"""The teacher is asked about each view of an image once."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyNet, make_images, make_loader, tiny_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autocompress import longtrial, objective
from autocompress.answers import FEWEST, VIEWS, Answers
from autocompress.batch import Batch, KnownBatch
from autocompress.conductor import run_study
from autocompress.loaders import FIRST_VIEWS, ArrayLoader
from autocompress.progress import NullDisplay
from autocompress.task import Loader, Task
from autocompress.training import FitResult, fit

COUNT = 256


def loader(augment: str = "crop-flip") -> ArrayLoader:
    images, labels = make_images(COUNT, 1)
    pixels = (60 * images + 128).clamp(0, 255).to(torch.uint8)
    return ArrayLoader(pixels, labels, 32, [0.5], [0.25], augment=augment, shuffle=True)


def read(source: ArrayLoader, seed: int, passes: int = 1) -> list[Batch]:
    source.reseed(seed)
    source.limit_views(VIEWS)
    return [batch for _ in range(passes) for batch in source]


class Asked:
    """A network's answers, and how many samples it was asked about at a time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = TinyNet().eval()
        self.sizes: list[int] = []

    def __call__(self, batch: Batch) -> Tensor:
        self.sizes.append(len(batch[0]))
        with torch.no_grad():
            output: Tensor = self.model(batch[0])
        return output


def test_each_view_of_a_sample_is_asked_about_once() -> None:
    source, answers, ask = loader(), Answers(), Asked()
    for seed in (0, FIRST_VIEWS, 2 * FIRST_VIEWS):
        for batch in read(source, seed, 2):
            expected = ask.model(batch[0])
            torch.testing.assert_close(answers.recall(batch, ask), expected, rtol=1e-5, atol=1e-5)
    assert sum(ask.sizes) == 2 * COUNT


def test_what_is_new_in_a_batch_is_asked_about_alone() -> None:
    source, answers, ask = loader(), Answers(), Asked()
    first, second = read(source, 0)[0], read(source, FIRST_VIEWS)[0]
    for batch in (first, second):
        answers.recall(batch, ask)
    new = len(set(second.places.tolist()) - set(first.places.tolist()))
    assert FEWEST < new < 32 and ask.sizes == [32, new]
    one = first.pick(torch.arange(31))
    answers, ask = Answers(), Asked()
    answers.recall(one, ask)
    torch.testing.assert_close(answers.recall(first, ask), ask.model(first[0]))
    assert ask.sizes == [31, FEWEST], "few samples are rounded in other ways"


def test_views_and_ways_and_sources_are_kept_apart() -> None:
    source, answers, ask = loader(), Answers(), Asked()
    batch, other = read(source, 0)[0], read(source, 1)[0]
    assert batch.view != other.view
    for given, way in ((batch, None), (other, None), (batch, "bfloat16"), (batch, None)):
        torch.testing.assert_close(answers.recall(given, ask, way), ask.model(given[0]))
    assert ask.sizes == [32, 32, 32]
    elsewhere = read(loader(), 0)[0]
    answers.recall(elsewhere, ask)
    assert len(ask.sizes) == 4, "other images, though they look the same"


@pytest.mark.parametrize(
    "output", [{"out": torch.zeros(32, 4)}, torch.zeros(()), torch.zeros(31, 4)]
)
def test_an_output_without_a_row_for_each_sample_is_asked_for_each_time(output: Any) -> None:
    answers, asked = Answers(), []

    def ask(batch: Batch) -> Any:
        asked.append(batch)
        return output

    batch = read(loader(), 0)[0]
    for _ in range(3):
        assert answers.recall(batch, ask) is output
    assert len(asked) == 3


def test_no_more_is_kept_than_the_limit() -> None:
    row = 4 * 4
    source, answers, ask = loader(), Answers(limit=2 * COUNT * row), Asked()
    for _ in range(2):
        for seed in range(3):
            answers.recall(read(source, seed)[0], ask)
    assert ask.sizes == [32] * 4, "two views are kept; the third is asked about again"


def test_images_that_do_not_change_have_one_view() -> None:
    assert {batch.view for batch in read(loader("none"), 3, passes=2)} == {0}


class Counting(nn.Module):
    """A teacher that counts the images that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net, self.images = TinyNet(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.net(x)


def tuned(train: Loader, teacher: nn.Module, answers: Answers | None, seed: int = 0) -> nn.Module:
    torch.manual_seed(1)
    task = Task(TinyNet(), train, make_loader(64, 2), make_loader(64, 3))
    fit(
        task.model,
        task,
        epochs=2,
        learning_rate=0.05,
        seed=seed,
        teacher=teacher,
        answers=answers,
        distillation=0.5,
    )
    return task.model


def test_fine_tunings_share_answers() -> None:
    source, teacher, answers = loader(), Counting(), Answers()
    first = tuned(source, teacher, answers)
    assert teacher.images == 2 * COUNT
    again = tuned(source, teacher, answers)
    assert teacher.images == 2 * COUNT
    for mine, theirs in zip(first.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    tuned(source, teacher, answers, seed=1)
    assert teacher.images == 3 * COUNT, "it begins with the second view and goes on to the third"


def test_without_answers_each_pass_shows_new_views() -> None:
    source, teacher = loader(), Counting()
    with_them = tuned(source, teacher, Answers())
    without = tuned(source, deepcopy(teacher), None)
    assert not torch.equal(with_them.get_parameter("fc.weight"), without.get_parameter("fc.weight"))
    assert not isinstance(next(iter(source)), KnownBatch), "new views, and nobody to know them"


def test_the_loaders_of_users_are_asked_about_each_time() -> None:
    teacher = Counting()
    train = DataLoader(TensorDataset(*make_images(COUNT, 1)), batch_size=32)
    kept, plain = (tuned(train, teacher, answers) for answers in (Answers(), None))
    assert teacher.images == 4 * COUNT
    assert torch.equal(kept.get_parameter("fc.weight"), plain.get_parameter("fc.weight"))


def test_all_fine_tunings_of_a_study_share_answers(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task.train = loader("none")
    given, asked, plain = [], [], Answers.recall

    def recall(self: Answers, batch: Batch, ask: Callable[[Batch], Any], way: Any = None) -> Any:
        def note(part: Batch) -> Any:
            asked.append(len(part[0]))
            return ask(part)

        given.append(len(batch[0]))
        return plain(self, batch, note, way)

    def noted(*args: Any, answers: Answers, **more: Any) -> FitResult:
        handed.append(answers)
        return fit(*args, answers=answers, **more)

    handed: list[Answers] = []
    for module in (objective, longtrial):
        monkeypatch.setattr(module, "fit", noted)
    monkeypatch.setattr(Answers, "recall", recall)
    outcome = run_study(
        tiny_config(tmp_path, **{"finetune.final_epochs": 2.0}), task, NullDisplay()
    )
    assert len(handed) >= 9 + len(outcome.summary["long_fits"]) > 9
    assert all(answers is handed[0] for answers in handed)
    assert sum(given) > 10 * COUNT
    assert COUNT <= sum(asked) < 1.5 * COUNT, "but for a few known ones that are asked about again"
