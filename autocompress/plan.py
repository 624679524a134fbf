"""A plan: which channels remain and which transform replaces which layer.

With the weights it is all that is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

from autocompress.channels import ChannelGroup, KeptChannels, Member
from autocompress.errors import ConfigError, did_you_mean
from autocompress.spans import from_spans, to_spans
from autocompress.transforms import TRANSFORMS
from autocompress.transforms.base import Transform

VERSION = 2
"""Version 1 knew no channels."""
_EXAMPLE = '{"transform": "svd", "rank": 12}'


@dataclass(frozen=True)
class Plan:
    """What is changed: channels are removed first, then layers are replaced by transforms.

    Attributes:
        layers: Layer name to transform, of the layer without the removed channels; a layer that is
            left alone is absent.
        channels: Name of a channel group to the channels that remain; a group that keeps all is
            absent.
    """

    layers: Mapping[str, Transform] = field(default_factory=dict)
    channels: Mapping[str, KeptChannels] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Copies: the digest would be wrong if the caller changed the mappings.
        object.__setattr__(self, "layers", dict(self.layers))
        object.__setattr__(self, "channels", dict(self.channels))

    def to_json(self) -> str:
        """The plan as JSON.

        `{"version": 2, "layers": {name: {"transform": ..., ranks}}, "channels": {group: {"kept":
        "0-3,7", "of": 16, "chunks": 1, "members": [[layer, side, offset, repeat], ...]}}}`.
        """
        layers = {name: transform_to_dict(choice) for name, choice in self.layers.items()}
        channels = {name: _kept_to_dict(part) for name, part in self.channels.items()}
        return json.dumps({"version": VERSION, "layers": layers, "channels": channels})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`.

        Raises:
            ConfigError: If the text is no plan or names an unknown transform or field.
        """
        try:
            data = json.loads(text)
            version, rows = data["version"], dict(data["layers"])
            groups = dict(data.get("channels", {}))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"This is no plan: {error!r}.") from error
        if version not in (1, VERSION):
            raise ConfigError(
                f"The plan has version {version}, this package reads 1 and {VERSION}."
            )
        layers: dict[str, Transform] = {}
        for name, row in rows.items():
            try:
                layers[name] = transform_from_dict(row)
            except ConfigError as error:
                raise ConfigError(f"Layer {name!r} of the plan: {error}") from error
        channels = {name: _kept_from_dict(name, row) for name, row in groups.items()}
        return cls(layers, channels)

    @cached_property
    def digest(self) -> str:
        """12 hex digits, equal for equal plans whatever the order of their layers."""
        rows: dict[str, Any] = {n: transform_to_dict(self.layers[n]) for n in sorted(self.layers)}
        if self.channels:
            rows = {"layers": rows, "kept": {n: to_spans(c.kept) for n, c in self.channels.items()}}
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]

    def __hash__(self) -> int:
        return hash(self.digest)


def group_to_dict(group: ChannelGroup) -> dict[str, Any]:
    """`{"of": channels, "chunks": ..., "members": [[layer, side, offset, repeat], ...]}`."""
    return {
        "of": group.channels,
        "chunks": group.chunks,
        "members": [astuple(member) for member in group.members],
    }


def group_from_dict(name: str, row: Mapping[str, Any]) -> ChannelGroup:
    """The inverse of `group_to_dict`."""
    members = tuple(Member(*member) for member in row["members"])
    return ChannelGroup(name, int(row["of"]), members, int(row["chunks"]))


def _kept_to_dict(part: KeptChannels) -> dict[str, Any]:
    return {"kept": to_spans(part.kept), **group_to_dict(part.group)}


def _kept_from_dict(name: str, row: Mapping[str, Any]) -> KeptChannels:
    """The inverse of `_kept_to_dict`.

    Raises:
        ConfigError: If the row is none.
    """
    try:
        return KeptChannels(group_from_dict(name, row), tuple(from_spans(row["kept"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"Channel group {name!r} of the plan can't be read: {error!r}."
        ) from error


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
        raise ConfigError(
            f"Unknown transform {name!r}.{did_you_mean(str(name), TRANSFORMS)} One of your own is "
            "made known by autocompress.transforms.register(YourClass)."
        )
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
