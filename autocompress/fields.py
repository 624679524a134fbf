"""The fields of a study file as they are documented: name, type, default, allowed values, meaning.

All of it is read from the models in `config.py`, the only place where fields are described.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from autocompress.config import AUTO, UNBOUND, UNITS, StudyConfig

_TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Field:
    """A field of a study file.

    Attributes:
        name: Dotted, as messages and `settings` have it: "search.trials".
        type: What it holds: "whole number", "list of texts".
        default: As in a study file; "required", or "" where leaving it out is a choice of its own.
        allowed: The values or the range; "" for any of the type.
        description: What it means.
        free: Whether a study may be continued with another value.
    """

    name: str
    type: str
    default: str
    allowed: str
    description: str
    free: bool

    @property
    def section(self) -> str:
        """The table that it is in; "" for the top of the file."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Section:
    """A table of a study file.

    Attributes:
        name: As in its heading; "" for the top of the file.
        description: What it is about.
        fields: Its fields, without those of tables in it.
    """

    name: str
    description: str
    fields: tuple[Field, ...]


def sections(model: type[BaseModel] = StudyConfig, name: str = "") -> Iterator[Section]:
    """The tables of a study file, in order; lists of tables come after the one they are in."""
    fields, inner = [], []
    for key, info in model.model_fields.items():
        dotted = f"{name}.{key}" if name else key
        table, is_list = _table_in(info.annotation)
        if table is not None:
            inner.append((table, f"{dotted}[]" if is_list else dotted))
        if table is None or is_list:
            fields.append(_field(dotted, info))
    yield Section(name, " ".join((model.__doc__ or "").split()), tuple(fields))
    for table, dotted in inner:
        yield from sections(table, dotted)


def find_fields(pattern: str = "") -> list[Field]:
    """The fields whose name or description has `pattern` in it."""
    wanted = pattern.lower()
    return [
        field
        for section in sections()
        for field in section.fields
        if wanted in f"{field.name} {field.name.replace('_', ' ')} {field.description}".lower()
    ]


def _field(name: str, info: FieldInfo) -> Field:
    marks = [*info.metadata, *_marks(info.annotation)]
    auto = AUTO in marks
    allowed = _choices(info.annotation) or _range(marks)
    unit = UNITS.get(name, "")
    if unit:
        allowed = f"{allowed} ({unit})".strip()
    kind = _type_text(info.annotation)
    return Field(
        name,
        f'{kind}, or "auto"' if auto else kind,
        "required" if info.is_required() else _default(info, auto),
        allowed,
        " ".join((info.description or "").split()),
        name in UNBOUND or name.startswith("run."),
    )


def _default(info: FieldInfo, auto: bool) -> str:
    value = info.get_default(call_default_factory=True)
    if value is None:
        return '"auto"' if auto else ""
    return toml(value)


def toml(value: Any) -> str:
    """A value as a study file has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return (
            "{}"
            if not value
            else f"{{ {', '.join(f'{k} = {toml(v)}' for k, v in value.items())} }}"
        )
    return str(value)


def _table_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The table that a field is, or that it lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for part in get_args(annotation):
        found, _ = _table_in(part)
        if found is not None:
            return found, get_origin(annotation) is tuple or _lists(annotation)
    return None, False


def _lists(annotation: Any) -> bool:
    return any(get_origin(part) is tuple or _lists(part) for part in get_args(annotation))


def _marks(annotation: Any) -> list[Any]:
    """What `Annotated` says at any depth, but not of the items of a list."""
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        return [*_marks(inner), *(m for mark in marks for m in _unpacked(mark))]
    if get_origin(annotation) in (Union, UnionType):
        return [mark for part in get_args(annotation) for mark in _marks(part)]
    return []


def _unpacked(mark: Any) -> list[Any]:
    return list(mark.metadata) if isinstance(mark, FieldInfo) else [mark]


def _choices(annotation: Any) -> str:
    words = _literals(annotation)
    return ", ".join(f'"{word}"' for word in words)


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [word for part in get_args(annotation) for word in _literals(part)]


def _range(marks: list[Any]) -> str:
    found = [
        f"{sign} {getattr(mark, key)}"
        for key, sign in _SIGNS.items()
        for mark in marks
        if isinstance(getattr(mark, key, None), (int, float))
    ]
    least = [mark.min_length for mark in marks if getattr(mark, "min_length", 0) > 1]
    return ", ".join(found + [f"at least {count}" for count in least])


def _type_text(annotation: Any, many: bool = False) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(parts[0], many)
    if origin in (Union, UnionType):
        kinds = [_type_text(part, many) for part in parts if part is not NoneType]
        return " or ".join(dict.fromkeys(kinds))
    if origin is tuple:
        return f"list of {_type_text(parts[0], many=True)}"
    if origin is Literal:
        return "texts" if many else "text"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "tables" if many else "table"
    word = _TYPES.get(annotation, "value")
    return f"{word}s" if many else word
