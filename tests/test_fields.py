"""The fields of a study file, as they are documented."""

from __future__ import annotations

from autocompress.config import StudyConfig, flatten, load_config
from autocompress.fields import find_fields, sections, toml

FIELDS = {field.name: field for section in sections() for field in section.fields}


def test_every_field_is_there_and_described() -> None:
    known = flatten(load_config().model_dump())
    missing = {key for key in known if not any(key.startswith(name) for name in FIELDS)}
    assert not missing
    for field in FIELDS.values():
        assert len(field.description) > 15, field.name
    assert all(section.description for section in sections(StudyConfig))


def test_types_defaults_and_ranges_are_those_that_are_checked() -> None:
    rows = {
        "delta": ("number", "1.0", ">= 0 (points of accuracy, or the metric's unit)", False),
        "seed": ("whole number", "0", ">= 0, < 2147483648", False),
        "model.source": ("text", "required", "", False),
        "data.classes": ("list of texts", "", "at least 2", False),
        "data.std": ("list of numbers", "", "", False),
        "search.bounds": ("list of tables", "", "", False),
        "search.bounds[].compression": ("number", "", "> 1", False),
        "search.trials": ("whole number", "30", ">= 1", True),
        "finetune.learning_rate": ('number, or "auto"', '"auto"', "> 0", False),
        "run.workers": ('whole number, or "auto"', '"auto"', ">= 0", True),
        "run.launcher": ("text", '"local"', '"local", "ray", "slurm"', True),
        "run.launcher_options": ("table", "{}", "", True),
    }
    for name, wanted in rows.items():
        field = FIELDS[name]
        assert (field.type, field.default, field.allowed, field.free) == wanted


def test_fields_are_found_by_name_or_meaning() -> None:
    assert {f.name for f in find_fields("learning rate")} >= {
        "finetune.learning_rate",
        "baseline.learning_rate",
    }
    assert [f.name for f in find_fields("VISUAL WAKE")] == ["data.source"]
    assert not find_fields("no such thing")


def test_values_are_shown_as_a_study_file_has_them() -> None:
    assert toml({"a": [True, "x", 1.5]}) == '{ a = [true, "x", 1.5] }'
