"""A model card: README.md beside a network, in the form that model hubs read.

Most of it comes from the folder's own files; a study adds what it measured. It has no license, for
whoever hands the network out must name it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocompress.formats import FORMATS, INT8_FILE
from autocompress.manifest import Manifest, read_manifest, read_text
from autocompress.predict import script_of, text_templates
from autocompress.profiler import Profile, comparison
from autocompress.scale import Scale
from autocompress.wording import plan_summary, transform_text

CARD = "README.md"
MARK = "<!-- Written by autocompress."
"""Begins the line by which a card is known as ours; without it, nobody overwrites it."""
SHOWN_LAYERS = 25


@dataclass(frozen=True)
class Facts:
    """What a card tells besides what the network's folder says.

    Attributes:
        result: The study's result, as in `result.json`, or the part of it that is known.
        found: The network's own entry there, such as `result["best"]`.
        tuned: Whether the network was trained further since.
    """

    result: Mapping[str, Any] | None = None
    found: Mapping[str, Any] | None = None
    tuned: bool = False


def write_card(folder: Path, facts: Facts | None = None) -> str | None:
    """Write a network's model card, in one step; one that a person has made their own stays.

    Args:
        folder: A saved network, complete but for its card.
        facts: What else is known.

    Returns:
        Why it could not be written; None if all is well. A card never costs the network.
    """
    target = folder / CARD
    if target.exists() and not is_generated(target):
        return None
    beside = folder / f".{CARD}.partial"
    try:
        beside.write_text(card_text(folder, facts or Facts()), encoding="utf-8")
        os.replace(beside, target)
    except Exception as error:
        beside.unlink(missing_ok=True)
        return f"{type(error).__name__}: {error}"
    return None


def is_generated(path: Path) -> bool:
    """Whether a README.md is a card that we wrote, and nobody has taken over."""
    try:
        return MARK in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def card_text(folder: Path, facts: Facts) -> str:
    """The model card of a saved network."""
    manifest = read_manifest(folder)
    result, found = facts.result or {}, facts.found or {}
    known = (manifest.task or {}).get("metric") or result.get("metric")
    scale = Scale.from_dict(known)
    baseline = result.get("baseline") or {}
    report = json.loads(read_text(folder / "export.json"))
    environment = text_templates()
    # What JSON can say, YAML can: no name from a study can break the front matter.
    environment.filters["quoted"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment.get_template("card.md.j2").render(
        mark=MARK,
        manifest=manifest,
        network=_network(manifest),
        study=result.get("study"),
        data=_data(result),
        scale=scale,
        result=result,
        baseline=baseline,
        found=found,
        tuned=facts.tuned,
        int8=_int8(result, found),
        costs=_costs(folder, baseline, scale),
        compression=_compression(folder, baseline),
        plan=plan_summary(read_text(folder / "plan.json")),
        layers=_layers(found),
        shown=SHOWN_LAYERS,
        files=_files(report),
        report=report,
        versions=result.get("versions") or manifest.versions,
    )


def _network(manifest: Manifest) -> str:
    """The network before compression, in words."""
    if manifest.origin is None:
        return "a network that was given in Python"
    arguments = manifest.origin.get("arguments") or {}
    given = ", ".join(f"{name} = {value!r}" for name, value in arguments.items())
    return f"`{manifest.origin['source']}`" + (f" ({given})" if given else "")


def _int8(result: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the study measured of the network's int8 file; None where it is another's, or none."""
    int8 = result.get("int8") or {}
    own = all(int8.get(key) == found.get(key) for key in ("stage", "trial"))
    return int8 if own and "val_score" in int8 else None


def _data(result: Mapping[str, Any]) -> str | None:
    """The data of the study; None where that is not known."""
    source = ((result.get("config") or {}).get("data") or {}).get("source")
    if source is None:
        return None
    return "loaders given in Python" if source.startswith("python:") else str(source)


def _costs(
    folder: Path, baseline: Mapping[str, Any], scale: Scale
) -> list[tuple[str, str, str, str]]:
    """Name, before, after and ratio of each cost that is known."""
    after = Profile.from_dict(json.loads(read_text(folder / "profile.json")))
    before = Profile.from_dict(baseline["profile"]) if baseline.get("profile") else None
    rows = []
    for row in comparison(before or after, after, scale)[1:]:
        if row.after is None:
            continue
        name = row.metric
        if name == "latency" and after.latency is not None:
            how = after.latency
            name = f"latency ({how.runtime}, batch {how.batch_size}, threads: {how.threads})"
        was = None if before is None else row.before
        ratio = "" if was is None or row.ratio is None else f"{row.ratio:.2f}x"
        shown = "" if was is None else f"{was:.4g} {row.unit}"
        rows.append((name, shown, f"{row.after:.4g} {row.unit}", ratio))
    return rows


def _compression(folder: Path, baseline: Mapping[str, Any]) -> str:
    """ "24.8x fewer parameters and 8.7x fewer MACs"; "" where the baseline is not known."""
    if not baseline.get("profile"):
        return ""
    after = json.loads(read_text(folder / "profile.json"))
    before = baseline["profile"]
    return (
        f"{before['params'] / max(1, after['params']):.1f}x fewer parameters and "
        f"{before['macs'] / max(1, after['macs']):.1f}x fewer MACs"
    )


def _layers(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, what was done, parameters before and after, of the layers that were changed."""
    rows = []
    for row in found.get("layers") or ():
        if row["transform"] is None and not row["channels"]:
            continue
        done = [transform_text(row["transform"])] if row["transform"] is not None else []
        done += [row["channels"]] if row["channels"] else []
        was, now = ("" if count is None else f"{count:,}" for count in row["params"])
        rows.append((row["name"], "; ".join(done), was, now))
    return rows


def _files(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, size, largest difference to the network and the program that runs it, of each file."""
    rows = []
    sizes = report["files"]
    names = [kind.file for kind in FORMATS.values()] + [INT8_FILE, "model.safetensors"]
    for name in names:
        if name not in sizes:
            continue
        script = script_of(name)
        # OpenVINO's weights lie beside the file that is opened.
        weights = Path(name).with_suffix(".bin").name if name.endswith(".xml") else ""
        size = sizes[name] + sizes.get(weights, 0)
        difference = report["checks"].get(name)
        rows.append(
            (
                name,
                f"{size / 1e6:.3f} MB",
                "" if difference is None else f"{difference:.2g}",
                script if script in report["scripts"] else "",
            )
        )
    return rows
