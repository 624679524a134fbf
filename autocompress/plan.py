"""A plan: which transform replaces which layer. With the weights it is all that is needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

from autocompress.errors import ConfigError, did_you_mean
from autocompress.transforms import TRANSFORMS
from autocompress.transforms.base import Transform

VERSION = 1
_EXAMPLE = '{"transform": "svd", "rank": 12}'


@dataclass(frozen=True)
class Plan:
    """The chosen transform of each layer that is changed.

    Attributes:
        layers: Layer name to transform; a layer that is left alone is absent.
    """

    layers: Mapping[str, Transform] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A copy: the digest would be wrong if the caller changed the mapping.
        object.__setattr__(self, "layers", dict(self.layers))

    def to_json(self) -> str:
        """The plan as JSON: `{"version": 1, "layers": {name: {"transform": ..., ranks}}}`."""
        layers = {name: transform_to_dict(choice) for name, choice in self.layers.items()}
        return json.dumps({"version": VERSION, "layers": layers})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`.

        Raises:
            ConfigError: If the text is no plan or names an unknown transform or field.
        """
        try:
            data = json.loads(text)
            version, rows = data["version"], dict(data["layers"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"This is no plan: {error!r}.") from error
        if version != VERSION:
            raise ConfigError(f"The plan has version {version}, this package reads {VERSION}.")
        layers: dict[str, Transform] = {}
        for name, row in rows.items():
            try:
                layers[name] = transform_from_dict(row)
            except ConfigError as error:
                raise ConfigError(f"Layer {name!r} of the plan: {error}") from error
        return cls(layers)

    @cached_property
    def digest(self) -> str:
        """12 hex digits, equal for equal plans whatever the order of their layers."""
        layers = {name: transform_to_dict(self.layers[name]) for name in sorted(self.layers)}
        return hashlib.sha256(json.dumps(layers, sort_keys=True).encode()).hexdigest()[:12]

    def __hash__(self) -> int:
        return hash(self.digest)


def transform_to_dict(transform: Transform) -> dict[str, Any]:
    """`{"transform": name, **fields}`."""
    assert is_dataclass(transform) and not isinstance(transform, type)
    return {"transform": transform.name, **asdict(transform)}


def transform_from_dict(row: Mapping[str, Any]) -> Transform:
    """The inverse of `transform_to_dict`.

    Raises:
        ConfigError: If the transform or one of its fields is unknown or missing.
    """
    if not isinstance(row, Mapping):
        raise ConfigError(f"A transform is a table such as {_EXAMPLE}, got {row!r}.")
    values = dict(row)
    name = values.pop("transform", None)
    kind = TRANSFORMS.get(str(name))
    if kind is None:
        raise ConfigError(f"Unknown transform {name!r}.{did_you_mean(str(name), TRANSFORMS)}")
    assert is_dataclass(kind)
    known = [f.name for f in fields(kind)]
    if sorted(known) != sorted(values):
        raise ConfigError(f"Transform {name!r} has the fields {known}, got {sorted(values)}.")
    for key, value in values.items():
        if isinstance(value, list | tuple):
            values[key] = value = tuple(value)
        wanted = key == "ranks"
        ranks = value if isinstance(value, tuple) else (value,)
        if isinstance(value, tuple) != wanted or not all(_is_rank(rank) for rank in ranks):
            rule = "a list of whole numbers" if wanted else "a whole number"
            raise ConfigError(f"{key} of transform {name!r} is {rule} from 1 up, got {value!r}.")
    return kind(**values)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
