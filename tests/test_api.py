"""The same study from Python, for a network and loaders in hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyNet, make_images, make_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autocompress
from autocompress import selection
from autocompress.config import parse_config
from autocompress.errors import ConfigError, StudyMismatch
from autocompress.export import save_model
from autocompress.naming import config_of, studies_of
from autocompress.sources import _like_pretrained, pick_device, task_from_config
from autocompress.store import StudyFolder
from autocompress.trials import WEIGHTS
from autocompress.weights import fetch_weights

QUICK: dict[str, Any] = {
    "trials": 2,
    "annealing_trials": 1,
    "delta": 30.0,
    "display": False,
    "settings": {"finetune.epochs": 0.5, "finetune.final_epochs": 0.0, "finetune.gate": 100.0},
}


@pytest.fixture(autouse=True)
def _weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*args: Any, **kwargs: Any) -> Any:
        return save_model(*args, **{**kwargs, "formats": ()})

    monkeypatch.setattr(selection, "save_model", save)


@pytest.fixture
def model(trained_state: dict[str, Tensor]) -> nn.Module:
    network = TinyNet()
    network.load_state_dict(trained_state)
    return network


def test_a_network_becomes_smaller_and_stays_itself(model: nn.Module, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train, test = make_loader(512, 1, shuffle=True), make_loader(256, 3)
    outcome = autocompress.compress(model, train, test, out=tmp_path, **QUICK)
    assert outcome.met and outcome.model is not None
    count = sum(p.numel() for p in outcome.model.parameters())
    assert count == outcome.summary["best"]["profile"]["params"]
    assert count < sum(p.numel() for p in model.parameters())
    assert model.training  # as it came
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    # A tenth of the training images was cut off to choose on.
    assert outcome.summary["best"]["test_images"] == 256
    loaded = autocompress.load(outcome.folder / "best", model=TinyNet())
    images = make_images(4, 9)[0]
    torch.testing.assert_close(loaded(images), outcome.model(images))


def test_any_trial_of_a_network_from_python_is_handed_out(
    model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = make_loader(256, 1), make_loader(64, 3)
    folder = autocompress.compress(model, train, test, out=tmp_path, **QUICK).folder
    fresh, images = TinyNet(), make_images(6, 9)[0]
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    report = autocompress.export_trial(
        folder, "annealing/0", tmp_path / "it", fresh, ["onnx"], images
    )
    assert report.checks["model.onnx"] < 1e-3 and report.checked_with == "6 real inputs"
    torch.testing.assert_close(fresh.state_dict(), before)
    # It is that trial's network, with its weights.
    studies = studies_of(config_of(str(folder), {}))
    attrs = studies["annealing"].trials[0].user_attrs
    loaded = autocompress.load(tmp_path / "it", model=TinyNet())
    assert (tmp_path / "it" / "plan.json").read_text().strip() == attrs["plan"]
    stored = fetch_weights(
        attrs[WEIGHTS], StudyFolder(folder).artifact_store(studies["exploration"])
    )
    torch.testing.assert_close(loaded.state_dict(), stored)
    told = json.loads((tmp_path / "it" / "profile.json").read_text())
    assert told["score"] == attrs["metrics"]["score"]
    autocompress.export_trial(folder, "best", tmp_path / "winner", TinyNet(), [])
    winner = autocompress.load(tmp_path / "winner", model=TinyNet())
    best = autocompress.load(folder / "best", model=TinyNet())
    torch.testing.assert_close(winner.state_dict(), best.state_dict())

    with pytest.raises(
        ConfigError, match=r"export_trial\(.*'annealing/0', .*model=YourNetwork\(\)"
    ):
        autocompress.export_trial(folder, "annealing/0", tmp_path / "other")
    with pytest.raises(ConfigError, match="no trial 'annealing/9'"):
        autocompress.export_trial(folder, "annealing/9", tmp_path / "other", TinyNet())
    for other, why in ((nn.Linear(3, 2), "network"), (TinyNet(width=32), "TinyNet that was")):
        with pytest.raises(ConfigError, match=why):
            autocompress.export_trial(folder, "annealing/0", tmp_path / "other", other)
    with pytest.raises(ConfigError, match="no folder .*none"):
        autocompress.export_trial(tmp_path / "none", "annealing/0", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_trial_keeps_the_type_of_its_weights(model: nn.Module, tmp_path: Path) -> None:
    def batches(count: int, seed: int) -> DataLoader[Any]:
        images, labels = make_images(count, seed)
        return DataLoader(TensorDataset(images.double(), labels), batch_size=64)

    precise = model.double()
    outcome = autocompress.compress(precise, batches(256, 1), batches(64, 3), out=tmp_path, **QUICK)
    autocompress.export_trial(outcome.folder, "annealing/0", tmp_path / "it", TinyNet(), [])
    loaded = autocompress.load(tmp_path / "it", model=TinyNet())
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}


def test_calling_it_again_goes_on(model: nn.Module, tmp_path: Path) -> None:
    def run(**changes: Any) -> autocompress.Outcome:
        train, test = make_loader(256, 1), make_loader(64, 3)
        return autocompress.compress(model, train, test, out=tmp_path, **(QUICK | changes))

    assert run().summary["trials"] == {"exploration": 2, "annealing": 1}
    assert run(trials=3).summary["trials"] == {"exploration": 3, "annealing": 1}
    with pytest.raises(StudyMismatch, match="delta: 30.0 -> 20.0"):
        run(delta=20.0)
    with torch.no_grad():
        model.get_parameter("fc.bias").add_(0.1)
    with pytest.raises(StudyMismatch, match="fingerprint"):
        run()


def test_settings_of_what_is_given_as_objects_are_refused(model: nn.Module, tmp_path: Path) -> None:
    """Not read, they would be told in the report as if they had been."""
    for settings in ({"task.source": "mine:functions"}, {"data": {"augment": "flip"}}):
        with pytest.raises(ConfigError, match=r"settings: (task.source|data.augment) would not"):
            autocompress.compress(
                model,
                make_loader(64, 1),
                make_loader(64, 3),
                out=tmp_path,
                **QUICK | {"settings": settings},
            )
    assert not [*tmp_path.iterdir()]


def test_a_network_that_is_trained_after_all_is_the_one_that_is_compressed(
    model: nn.Module, tmp_path: Path
) -> None:
    def run(network: nn.Module) -> autocompress.Outcome:
        train, test = make_loader(512, 1, shuffle=True), make_loader(256, 3)
        return autocompress.compress(network, train, test, out=tmp_path, **QUICK)

    torch.manual_seed(0)
    untrained = TinyNet()
    with pytest.raises(ConfigError, match="no better than"):
        run(untrained)
    untrained.load_state_dict(model.state_dict())
    assert run(untrained).met


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_the_network_itself_is_compressed_not_what_was_made_of_it(
    model: nn.Module, tmp_path: Path, wrap: Any
) -> None:
    train, test = make_loader(256, 1), make_loader(64, 3)
    outcome = autocompress.compress(wrap(model), train, test, out=tmp_path, **QUICK)
    assert isinstance(outcome.model, TinyNet)
    loaded = autocompress.load(outcome.folder / "best", model=TinyNet())
    torch.testing.assert_close(loaded.state_dict(), outcome.model.state_dict())


def test_what_cannot_be_copied_is_named(tmp_path: Path) -> None:
    class Keeps(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            self.kept: Tensor = super().forward(x)
            return self.kept

    network, train = Keeps(), make_loader(64, 1)
    network(next(iter(train))[0])
    with pytest.raises(ConfigError, match=r"A Keeps can't be copied: .*no activations"):
        autocompress.compress(network, train, make_loader(64, 3), out=tmp_path, **QUICK)


def test_everything_the_user_owns_can_be_replaced(model: nn.Module, tmp_path: Path) -> None:
    """Batches that are no pairs, a metric of one's own, another optimizer and no schedule."""
    called: set[str] = set()

    def collate(rows: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        pixels, labels = zip(*rows, strict=True)
        return {"label": torch.stack(labels), "pixels": torch.stack(pixels)}

    def loader(count: int, seed: int) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*make_images(count, seed)), 32, collate_fn=collate)

    def forward(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        called.add("forward")
        return network(batch["pixels"])  # type: ignore[no-any-return]

    def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        called.add("loss")
        return nn.functional.cross_entropy(output, batch["label"])

    def metric(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        called.add("metric")
        return output.softmax(1).gather(1, batch["label"][:, None])[:, 0]

    def distillation(student: Tensor, teacher: Tensor) -> Tensor:
        called.add("distillation")
        return (student - teacher).square().mean()

    def optimizer(network: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        called.add("optimizer")
        return torch.optim.AdamW(network.parameters(), lr=learning_rate)

    def scheduler(
        one: torch.optim.Optimizer, learning_rate: float, steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        called.add("scheduler")
        return torch.optim.lr_scheduler.ConstantLR(one, factor=1.0)

    outcome = autocompress.compress(
        model,
        loader(256, 1),
        loader(64, 3),
        val=loader(64, 2),
        out=tmp_path,
        forward=forward,
        loss=loss,
        metric=metric,
        distillation=distillation,
        optimizer=optimizer,
        scheduler=scheduler,
        **QUICK,
    )
    assert called == {"forward", "loss", "metric", "distillation", "optimizer", "scheduler"}
    accuracy = outcome.summary["baseline"]["val_score"]
    with torch.no_grad():
        batch = next(iter(loader(64, 2)))
        expected = 100 * metric(model.eval()(batch["pixels"]), batch).mean()
    assert accuracy == pytest.approx(float(expected), abs=5.0)


def test_images_that_the_network_knows_are_pointed_out(model: nn.Module, tmp_path: Path) -> None:
    train, test = make_loader(256, 1), make_loader(128, 3)

    def run(name: str, **settings: Any) -> Any:
        options = QUICK | {"settings": QUICK["settings"] | settings}
        return autocompress.compress(model, train, test, out=tmp_path, name=name, **options)

    known = run("known")
    assert known.summary["val_seen"] and known.summary["best"]["test_images"] == 128
    report = (known.folder / "report.html").read_text(encoding="utf-8")
    assert "been trained on the validation images" in report
    assert "data.val_from = 'test'" in (known.folder / "study.log").read_text()
    new = run("new", **{"data.val_from": "test", "data.val_fraction": 0.5})
    assert not new.summary["val_seen"] and new.summary["best"]["test_images"] == 64


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"delta": -1.0}, "delta = -1.0 must be >= 0"),
        ({"settings": {"finetune.epoch": 2}}, "Did you mean 'epochs'"),
        ({"augment": "flip"}, "takes no 'augment'. Known: distillation, forward"),
        ({"name": "a b"}, "letters, digits"),
        ({"settings": {"run.device": "tpu:7"}}, "can't be used here"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(
    model: nn.Module, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        autocompress.compress(
            model, make_loader(64, 1), make_loader(64, 3), out=tmp_path, **(QUICK | changes)
        )
    assert list(tmp_path.iterdir()) == []


def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device("auto").type == wanted


def test_functions_are_found_beside_the_study_file(tmp_path: Path) -> None:
    (tmp_path / "my_things.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def net(width):\n"
        "    return nn.Sequential(nn.Conv2d(1, width, 3), nn.Flatten(), nn.Linear(4 * width, 2))\n"
        "def loaders(batch_size, seed):\n"
        "    def one(count):\n"
        "        data = torch.utils.data.TensorDataset(\n"
        "            torch.randn(count, 1, 4, 4), torch.arange(count) % 2)\n"
        "        return torch.utils.data.DataLoader(data, batch_size)\n"
        "    return one(40), one(20)\n"
    )
    config = parse_config(
        {
            "name": "own",
            "model.source": "my_things:net",
            "model.arguments": {"width": 6},
            "data.source": "my_things:loaders",
            "data.batch_size": 10,
            "run.device": "cpu",
        }
    )
    task = task_from_config(config, tmp_path)
    assert task.model.get_submodule("0").out_channels == 6
    assert len(next(iter(task.train))[0]) == 10
    assert task.example()[0].shape == (1, 1, 4, 4)


def test_augmented_validation_data_is_refused_with_the_cure(
    model: nn.Module, tmp_path: Path
) -> None:
    class Augmented(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            image, label = super().__getitem__(index)
            return image + 0.1 * torch.randn(image.shape), label

    train = DataLoader(Augmented(*make_images(256, 1)), batch_size=32, shuffle=True)
    with pytest.raises(ConfigError, match=r"give val, or set data.val_from = 'test'"):
        autocompress.compress(model, train, make_loader(64, 3), out=tmp_path, **QUICK)


def test_what_is_no_network_or_loader_is_named(model: nn.Module, tmp_path: Path) -> None:
    loader = make_loader(64, 3)
    with pytest.raises(ConfigError, match="model must be a torch.nn.Module, got a str"):
        autocompress.compress("resnet18", loader, loader, out=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="test must be batches"):
        autocompress.compress(model, loader, iter(loader), out=tmp_path)  # type: ignore[arg-type]


def test_pretrained_networks_get_their_own_normalization() -> None:
    from autocompress.models import pretrained_normalization

    network = nn.Conv2d(3, 4, 3)
    assert pretrained_normalization(network)[0] == (0.485, 0.456, 0.406)
    network.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # type: ignore[assignment]
    assert pretrained_normalization(network) == ((0.5,) * 3, (0.5,) * 3)
    fields = {"name": "s", "model.source": "timm:x", "data.source": "digits"}
    config = parse_config(fields | {"model.weights": "pretrained"})
    assert _like_pretrained(config, network).mean == (0.5,) * 3
    assert _like_pretrained(parse_config(fields), network).mean is None
    own = parse_config(
        fields | {"model.weights": "pretrained", "data.mean": [0.1], "data.std": [0.2]}
    )
    assert _like_pretrained(own, network).mean == (0.1,)


def test_labels_that_no_output_stands_for_are_refused_before_any_work(tmp_path: Path) -> None:
    images, labels = make_images(96, 0)
    wrong = DataLoader(TensorDataset(images, labels + 1), batch_size=32)
    with pytest.raises(ConfigError, match="image 3 of val is 4, but the network has 4 outputs"):
        autocompress.compress(TinyNet(), wrong, wrong, val=wrong, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "nowhere_at_all:Halves",
            "search.transforms = 'nowhere_at_all:Halves': there is no module",
        ),
        (
            "conftest:TinyNet",
            "'conftest:TinyNet' must be a frozen dataclass .*it lacks name, refusal",
        ),
    ],
)
def test_what_is_no_transform_is_refused(name: str, complaint: str, tmp_path: Path) -> None:
    settings = {"search.transforms": [name]}
    with pytest.raises(ConfigError, match=complaint):
        autocompress.compress(
            TinyNet(), make_loader(64, 0), make_loader(64, 1), out=tmp_path, settings=settings
        )
