"""The end of a run: the table before and after for people, one document for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autocompress.conductor import Outcome
from autocompress.config import StudyConfig
from autocompress.profiler import Profile, Row, comparison
from autocompress.scale import Scale
from autocompress.screen import comparison_table
from autocompress.store import StudyFolder
from autocompress.voice import Voice


def say_outcome(config: StudyConfig, outcome: Outcome, voice: Voice) -> None:
    """The end of a run, for people."""
    scale = Scale.from_dict(outcome.summary["metric"])
    if outcome.met:
        voice.say(comparison_table(rows_of(outcome.summary)))
        best = outcome.summary["best"]
        # An older version didn't tell it.
        expected = best.get("val_drop_expected", best["val_drop"])
        voice.say(
            f"Drop on validation data {scale.difference(best['val_drop'])}; on new images "
            f"{scale.number(expected)} is to be expected, and at most "
            f"{scale.number(best['val_drop_bound'])} at confidence {config.confidence:g}; "
            f"{scale.number(best['tolerance_unused'])} of {config.delta:g} unused."
        )
        if config.int8 and not (outcome.summary.get("int8") or {}).get("met"):
            reason = (outcome.summary.get("int8") or {}).get("reason")
            voice.complain(f"There is no int8 file: {reason} The winner stays float32.")
    voice.say(f"Everything is in {outcome.folder}")
    if not outcome.met:
        nearest = outcome.summary["nearest"]
        near = ""
        if nearest:
            near = (
                f" The nearest lost {scale.difference(nearest['val_drop'])}, at most "
                f"{scale.number(nearest['val_drop_bound'])} at confidence {config.confidence:g}."
            )
        voice.complain(f"No network within {scale.difference(config.delta)} was found.{near}")


def outcome_document(outcome: Outcome, code: int) -> dict[str, Any]:
    """The end of a run, for programs: the heart of result.json, and where the rest is."""
    summary, folder = outcome.summary, StudyFolder(outcome.folder)
    best = summary.get("best") or {}
    wanted = (
        "stage",
        "trial",
        "val_score",
        "val_drop",
        "val_drop_expected",
        "val_drop_bound",
        "tolerance_unused",
        "test_score",
        "test_drop",
        "test_drop_interval",
    )
    return {
        "study": summary["study"],
        "folder": str(outcome.folder.resolve()),
        "exit_code": code,
        "met": outcome.met,
        "objective": summary["objective"],
        "delta": summary["delta"],
        "confidence": summary["confidence"],
        "metric": summary["metric"],
        "trials": summary["trials"],
        "seconds": summary["seconds"],
        "best": {key: best[key] for key in wanted if key in best} or None,
        "comparison": [
            {key: getattr(row, key) for key in ("metric", "unit", "before", "after", "ratio")}
            for row in (rows_of(summary) if outcome.met else ())
        ],
        "nearest": summary["nearest"]
        and {
            key: summary["nearest"][key]
            for key in ("stage", "trial", "val_drop", "val_drop_bound")
            if key in summary["nearest"]
        },
        "int8": summary.get("int8"),
        "result": str(folder.result.resolve()),
        "report": str(folder.report.resolve()),
        "network": str(folder.best.resolve()) if outcome.met else None,
    }


def rows_of(summary: Mapping[str, Any]) -> list[Row]:
    """Before and after, from the result of a study that met delta."""
    best = summary["best"]
    before = Profile.from_dict(summary["baseline"]["profile"])
    scale = Scale.from_dict(summary["metric"])
    return comparison(before, Profile.from_dict(best["profile"]), scale)
