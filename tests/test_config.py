from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from autocompress.config import (
    ALL_TRANSFORMS,
    StudyConfig,
    bound_settings,
    differences,
    flatten,
    load_config,
    own_code,
    parse_config,
)
from autocompress.errors import ConfigError
from autocompress.transforms import TRANSFORMS

STUDIES = Path(__file__).resolve().parent.parent / "studies"

MINIMAL: dict[str, Any] = {"name": "s", "model.source": "zoo:resnet20", "data.source": "digits"}


def fields(section: type[BaseModel] = StudyConfig, prefix: str = "") -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found |= fields(annotation, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field.description
    return found


def write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_gate_below_delta_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"finetune.gate = 1 must be >= delta = 2"):
        parse_config({**MINIMAL, "delta": 2.0, "finetune.gate": 1.0})


def test_every_field_is_described_and_there_are_few() -> None:
    assert 20 <= len(fields()) <= 60
    assert all(fields().values())


def test_the_names_of_the_transforms_are_those_that_exist() -> None:
    assert set(ALL_TRANSFORMS) == set(TRANSFORMS)


def test_a_transform_may_be_ones_own() -> None:
    config = parse_config({**MINIMAL, "search.transforms": ["svd", "mine:Halves"]})
    assert config.search.transforms == ("svd", "mine:Halves")
    assert config.model_dump(mode="json")["search"]["transforms"] == ["svd", "mine:Halves"]
    assert own_code(config) == ["search.transforms: 'mine:Halves'"]
    for wrong in ("mine:", ":Halves"):
        with pytest.raises(ConfigError, match="unknown value"):
            parse_config({**MINIMAL, "search.transforms": [wrong]})


def test_no_path_means_the_quickstart() -> None:
    assert load_config(None).name == "quickstart"
    assert load_config("quickstart") == load_config(None)


def test_ready_studies_are_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("cifar10-resnet20").name == "cifar10-resnet20"
    with pytest.raises(ConfigError, match=r"nor a ready study .* Did you mean 'cifar10-resnet20'?"):
        load_config("cifar10-resnet2")


def test_a_normalization_has_both_parts() -> None:
    both = {**MINIMAL, "data.mean": [0.5, 0.4], "data.std": [0.2, 0.3]}
    assert parse_config(both).data.mean == (0.5, 0.4)
    with pytest.raises(ConfigError, match="belong together"):
        parse_config({**MINIMAL, "data.mean": [0.5]})
    with pytest.raises(ConfigError, match="belong together"):
        parse_config({**both, "data.std": [0.2]})
    with pytest.raises(ConfigError, match=r"data.std.* must be > 0"):
        parse_config({**both, "data.std": [0.2, 0.0]})


def test_a_folder_of_data_may_move(tmp_path: Path) -> None:
    one, other = (
        bound_settings(parse_config({**MINIMAL, "data.source": f"folder:{place}"}))
        for place in ("/here/images", "/there/images")
    )
    assert one == other != bound_settings(parse_config(MINIMAL))


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_ready_studies_are_valid_and_named_like_their_files(path: Path) -> None:
    import tomllib

    config = parse_config(tomllib.loads(path.read_text(encoding="utf-8")))
    assert config.name == path.stem


def test_these_are_the_ready_studies() -> None:
    names = {path.stem for path in STUDIES.glob("*.toml")}
    assert names == {
        "quickstart",
        "fashion-mnist-resnet",
        "fashion-mnist-small",
        "cifar10-resnet20",
        "cifar10-resnet20-gpu",
        "cifar100-resnet18",
        "imagenet-resnet50",
        "segmentation",
        "detection",
        "multilabel",
        "regression",
        "own-loop",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run.formats": ["onxx"]}, "run.formats: unknown value 'onxx'. Did you mean 'onnx'?"),
        ({"search.trails": 3}, "search.trails: unknown key. Did you mean 'trials'? Known: anneal"),
        ({"serch.trials": 3}, "serch: unknown key. Did you mean 'search'? Known: baseline"),
        ({"delta": "abc"}, "delta: expected a number, got 'abc'"),
        ({"delta": True}, "delta: expected a number, got True"),
        ({"delta": -1}, "delta = -1 must be >= 0 (points of accuracy, or the metric's unit)"),
        ({"delta": math.nan}, "delta: expected a finite number, got nan"),
        ({"data.batch_size": 1.5}, "data.batch_size: expected a whole number, got 1.5"),
        ({"data.val_fraction": 1.0}, "data.val_fraction = 1.0 must be < 1 (share of the imag"),
        ({"latency.runtime": "ort"}, "latency.runtime: unknown value 'ort'. Known: cuda, onnxrun"),
        ({"latency.batch_size": 0}, "latency.batch_size = 0 must be >= 1 (images)"),
        ({"latency.threads": 0}, "latency.threads = 0 must be >= 1"),
        ({"search.trials": 0}, "search.trials = 0 must be >= 1"),
        ({"search.transforms": ["tuker2"]}, "search.transforms: unknown value 'tuker2'. Did you"),
        ({"search.transforms": "svd"}, "search.transforms: expected a list, got 'svd'"),
        (
            {"search.transforms": [], "search.channels": False},
            "search.transforms = [] and search.channels = false leave no",
        ),
        ({"search.importance": "l1"}, "search.importance: unknown value 'l1'. Known: bn, norm"),
        ({"search.include": [3]}, "search.include: expected a text, got 3"),
        (
            {"search.bounds": [{"layers": "a", "error": 0}]},
            "search.bounds[0].error = 0 must be > 0",
        ),
        (
            {"search.bounds": [{"layers": "a", "compression": 1}]},
            "search.bounds[0].compression = 1 m",
        ),
        ({"search.bounds": [{"error": 0.1}]}, "search.bounds[0].layers: missing. Which layers"),
        (
            {"search.bounds": [{"layers": "a", "eror": 0.1}]},
            "search.bounds[0].eror: unknown key. Did you mean 'error'?",
        ),
        (
            {"search.bounds": [{"layers": "a", "error": 0.1}, {"layers": "fc"}]},
            "search.bounds[1] bounds nothing for 'fc': give compression",
        ),
        ({"search.bounds": {"fc": 4.0}}, "search.bounds: expected a list, got a table"),
        ({"search.sampler": "tpee"}, "search.sampler: unknown value 'tpee'. Did you mean 'tpe'?"),
        ({"objective": "flops"}, "objective: unknown value 'flops'. Known: latency, macs, params"),
        ({"model.source": "resnet20"}, "model.source = 'resnet20' is not of the right form: zoo:"),
        ({"model.source": None}, "model.source: missing. zoo:NAME"),
        ({"model.arguments": 4}, "model.arguments: expected a table, got 4"),
        ({"search": 4}, "search: expected a table, got 4"),
        ({"name": "a/b"}, "name = 'a/b' is not of the right form"),
    ],
)
def test_one_line_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    given = {**MINIMAL, **change}
    if change.get("model.source", "") is None:
        given["model"] = {"weights": "x"}
    with pytest.raises(ConfigError) as caught:
        parse_config(given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_several_errors_are_several_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, "delta": -1, "seed": "x", "run.devise": "cpu"})
    assert len(str(caught.value).splitlines()) == 3


def test_overrides_replace_values_and_none_is_ignored() -> None:
    config = load_config(None, {"delta": 2, "search.trials": 5, "run.device": None})
    assert (config.delta, config.search.trials, config.run.device) == (2.0, 5, "auto")


def test_overrides_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'trials'"):
        load_config(None, {"search.trails": 5})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(None).delta = 2.0  # type: ignore[misc]


def test_missing_and_broken_study_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no study file 'nothing.toml'"):
        load_config("nothing.toml")
    with pytest.raises(ConfigError, match=r"not valid TOML: .*line 2"):
        load_config(write(tmp_path, 'name = "x"\ndelta = = 1\n'))
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path)


def test_paths_are_relative_to_the_study_file(tmp_path: Path) -> None:
    (tmp_path / "w.pt").touch()
    (tmp_path / "pictures" / "small").mkdir(parents=True)
    text = 'name = "s"\n[model]\nsource = "zoo:resnet20"\nweights = "w.pt"\n[data]\n'
    config = load_config(write(tmp_path, text + 'source = "folder:small"\nroot = "pictures"\n'))
    assert config.model.weights == str((tmp_path / "w.pt").resolve())
    assert config.data.root == str((tmp_path / "pictures").resolve())
    assert config.data.source == f"folder:{(tmp_path / 'pictures' / 'small').resolve()}"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pt").touch()
    text = 'name = "s"\n[model]\nsource = "zoo:resnet20"\nweights = "~/w.pt"\n[data]\n'
    config = load_config(write(tmp_path, text + 'source = "digits"\n'))
    assert config.model.weights == str((tmp_path / "w.pt").resolve())


def test_every_missing_file_is_named(tmp_path: Path) -> None:
    text = 'name = "s"\n[model]\nsource = "zoo:resnet20"\nweights = "w.pt"\n[data]\n'
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text + 'source = "array:x.npz"\nroot = "pictures"\n'))
    lines = str(caught.value).splitlines()
    assert [line.split(" = ")[0] for line in lines] == ["model.weights", "data.root", "data.source"]
    assert all("no such" in line for line in lines)


def test_settings_survive_json() -> None:
    config = load_config(None, {"search.exclude": ["conv1"]})
    stored = json.loads(config.model_dump_json())
    assert parse_config(flatten(stored)) == config
    assert parse_config(stored) == config


def test_bounds_survive_json_and_bind_the_study() -> None:
    bounds = [{"layers": "layer1.*", "compression": 4}, {"layers": "fc", "error": 0.1}]
    config = parse_config({**MINIMAL, "search.bounds": bounds})
    assert parse_config(flatten(json.loads(config.model_dump_json()))) == config
    lines = differences(bound_settings(parse_config(MINIMAL)), bound_settings(config))
    assert len(lines) == 1 and lines[0].startswith("search.bounds: not set -> [{'layers': 'layer1")


def test_two_faults_in_one_list_are_two_lines() -> None:
    bounds = [{"layers": "a", "error": -1}, {"layers": "b", "error": -2}]
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, "search.bounds": bounds})
    assert len(str(caught.value).splitlines()) == 2


def test_a_study_is_bound_to_all_but_budgets_and_places() -> None:
    config = load_config(None)
    bound = bound_settings(config)
    assert json.loads(json.dumps(bound)) == bound
    free_ones = ("search.trials", "search.annealing_trials", "search.extra_trials")
    for free in (*free_ones, "finetune.final_epochs", "run.out"):
        changed = load_config(None, {free: "elsewhere" if free == "run.out" else 7})
        assert differences(bound, bound_settings(changed)) == []
    changed = load_config(None, {"delta": 3, "model.arguments.num_classes": 12})
    assert differences(bound, bound_settings(changed)) == [
        "delta: 2.0 -> 3.0",
        "model.arguments.num_classes: 10 -> 12",
    ]


def test_auto_is_what_the_study_finds_out() -> None:
    names = ("epochs", "final_epochs", "learning_rate", "final_learning_rate")
    auto = parse_config({**MINIMAL, **{f"finetune.{name}": "auto" for name in names}})
    assert auto == parse_config(MINIMAL)
    assert parse_config(json.loads(auto.model_dump_json())) == auto
    with pytest.raises(ConfigError, match=r"finetune.epochs: expected a number, got 'often'"):
        parse_config({**MINIMAL, "finetune.epochs": "often"})
    given = bound_settings(parse_config({**MINIMAL, "finetune.epochs": 2.0}))
    assert differences(bound_settings(auto), given) == ["finetune.epochs: not set -> 2.0"]


def test_int8_may_be_asked_for_later() -> None:
    asked = parse_config({**MINIMAL, "int8": True})
    assert asked.int8 and not differences(
        bound_settings(parse_config(MINIMAL)), bound_settings(asked)
    )
    with pytest.raises(ConfigError, match="int8: expected true or false, got 'yes'"):
        parse_config({**MINIMAL, "int8": "yes"})


def test_trials_are_judged_in_int8_only_where_int8_is_handed_out() -> None:
    fields = {**MINIMAL, "search.int8": True}
    with pytest.raises(ConfigError, match="set int8 = true, or leave search.int8 out"):
        parse_config(fields)
    assert parse_config({**fields, "int8": True}).search.int8


def test_classes_may_be_named_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("n01440764\n\n  Egyptian cat \n", encoding="utf-8")
    file = tmp_path / "mine.toml"
    text = 'name = "mine"\n[model]\nsource = "zoo:lenet5"\n[data]\nsource = "digits"\n'
    file.write_text(f'{text}classes = "classes.txt"\n', encoding="utf-8")
    assert load_config(file).data.classes == ("n01440764", "Egyptian cat")
    file.write_text(f'{text}classes = ["1", "7"]\n', encoding="utf-8")
    assert load_config(file).data.classes == ("1", "7")
    file.write_text(f'{text}classes = ["1"]\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data.classes: give at least"):
        load_config(file)
    file.write_text(f'{text}classes = "nothing.txt"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data.classes = '.*nothing.txt' can't be read"):
        load_config(file)


@pytest.mark.parametrize("source", ["tiny-imagenet", "imagenet", "vww"])
def test_some_data_is_known_by_name_alone(source: str) -> None:
    fields = {"name": "x", "model.source": "zoo:lenet5", "data.source": source}
    assert own_code(parse_config(fields)) == []
    with pytest.raises(ConfigError, match="data.source = .* is not of the right form"):
        parse_config({**fields, "data.source": source[:-1]})
