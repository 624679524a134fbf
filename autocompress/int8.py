"""The int8 step of a study: an int8 file that is within delta too, or the reason why there is none.

It never costs the study anything that was found before: whatever fails here is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file
from torch import nn

from autocompress.checkpoint import Checkpoint
from autocompress.evaluation import Evaluation, evaluate, paired_drop
from autocompress.finals import Finalist
from autocompress.formats import INT8_FILE, export_onnx
from autocompress.models import load_state, portable_state
from autocompress.objective import Bench
from autocompress.progress import Display
from autocompress.quantization import (
    CALIBRATION_IMAGES,
    Attempt,
    Quantizer,
    fit_rounded,
    time_files,
)
from autocompress.store import StudyFolder
from autocompress.training import Recipe
from autocompress.weights import state_digest, write_weights


@dataclass(frozen=True)
class Int8:
    """What the int8 step came to.

    Attributes:
        record: What `result.json` says of it.
        label: The finalist whose network is in the file; None if there is no file.
        path: The file; None likewise.
    """

    record: dict[str, Any] = field(default_factory=dict)
    label: str | None = None
    path: Path | None = None


def make_int8(
    bench: Bench, folder: StudyFolder, finalists: Sequence[Finalist], display: Display
) -> Int8:
    """The int8 file of the first finalist that has one within delta.

    Each is rounded as it is; where that loses too much, it is fine-tuned with the rounding in place
    and rounded again.

    Args:
        bench: The baseline, data and settings.
        folder: Keeps the file, and the weights of such a fine-tuning.
        finalists: The winner, then the second.
        display: Told about the progress.
    """
    quantizer = bench.quantizer
    path = folder.int8 / f"{bench.identity}-int8.onnx"
    attempts: list[dict[str, Any]] = []
    reasons: list[str] = []
    for finalist in finalists:
        try:
            folder.int8.mkdir(parents=True, exist_ok=True)
            found = _quantize(quantizer, bench, folder, finalist, path, attempts, display)
        except Exception as error:
            reasons.append(f"{finalist.label} failed with {type(error).__name__}: {error}")
            display.say(f"int8 of {finalist.label} failed: {type(error).__name__}: {error}")
            continue
        if found.bound <= bench.delta:
            record = _describe(finalist, found) | {
                "met": True,
                "reason": None,
                "attempts": attempts,
                "calibration_images": CALIBRATION_IMAGES,
            }
            return Int8(record, finalist.label, path)
        reasons.append(
            f"{finalist.label} lost at most {bench.task.scale.difference(found.bound)}, where "
            f"{bench.delta:g} are allowed"
        )
    reason = "; ".join(reasons) + "."
    display.say(f"There is no int8 file within delta: {reason}")
    return Int8({"met": False, "reason": reason, "attempts": attempts})


def score_int8(bench: Bench, int8: Int8, before: Evaluation, display: Display) -> dict[str, Any]:
    """The int8 file's score on test data and its drop; empty where there is no file.

    Args:
        bench: The baseline and the data.
        int8: The file.
        before: The baseline's scores on the test data.
        display: Told about the result.
    """
    if int8.path is None:
        return {}
    try:
        after = evaluate(bench.quantizer.network(int8.path), bench.task, bench.task.test)
    except Exception as error:
        display.say(f"The int8 file was not tested: {type(error).__name__}: {error}")
        return {}
    drop, low, high = paired_drop(before, after)
    scale = bench.task.scale
    display.say(
        f"Test data, int8: {scale.value(after.score)}, drop {scale.difference(drop)} (95 % "
        f"interval {scale.number(low)} to {scale.number(high)})."
    )
    return {
        "test_score": after.score,
        "test_drop": drop,
        "test_drop_interval": [low, high],
    }


def measure_int8(bench: Bench, int8: Int8, home: Path, display: Display) -> dict[str, Any]:
    """Sizes and latencies of the int8 file, of the float32 file beside it and of the baseline's.

    Args:
        bench: The baseline.
        int8: The file, which was copied to `home`.
        home: The folder of the finalist that it came from.
        display: Told about the result.
    """
    if int8.path is None:
        return {}
    try:
        with TemporaryDirectory() as place:
            baseline = Path(place) / "baseline.onnx"
            export_onnx(bench.baseline.model, bench.example, baseline)
            files = {"baseline": baseline, "float32": home / "model.onnx", "int8": home / INT8_FILE}
            files = {name: path for name, path in files.items() if path.exists()}
            sizes = {name: path.stat().st_size for name, path in files.items()}
            latencies = time_files(files, bench.example)
    except Exception as error:
        display.say(f"The int8 file was not timed: {type(error).__name__}: {error}")
        return {"file": f"{home.name}/{INT8_FILE}"}
    medians = ", ".join(f"{name} {found.median_ms:.3f} ms" for name, found in latencies.items())
    shares = ", ".join(
        f"{sizes[name] / sizes['int8']:.2f}x smaller than the {words}"
        for name, words in (("float32", "same in float32"), ("baseline", "baseline"))
        if name in sizes
    )
    display.say(
        f"int8: {sizes['int8'] / 1e3:.1f} kB, {shares}; ONNX Runtime, one image: {medians}."
    )
    return {
        "file": f"{home.name}/{INT8_FILE}",
        "size_bytes": sizes,
        "onnx_latency": {name: asdict(found) for name, found in latencies.items()},
    }


def _quantize(
    quantizer: Quantizer,
    bench: Bench,
    folder: StudyFolder,
    finalist: Finalist,
    path: Path,
    attempts: list[dict[str, Any]],
    display: Display,
) -> Attempt:
    """The finalist's best int8 file, at `path`; what is tried is added to `attempts`."""
    display.stage("int8", 1)
    found, made = quantizer.best(finalist.model, path, display.say)
    attempts += [_describe(finalist, attempt) for attempt in made]
    epochs = rounded_epochs(bench.finetune)
    if found.bound <= bench.delta or epochs <= 0:
        return found
    tuned = _fit_rounded(bench, folder, finalist, epochs, display)
    found, made = quantizer.best(tuned, path, display.say, epochs)
    attempts += [_describe(finalist, attempt) for attempt in made]
    return found


def rounded_epochs(recipe: Recipe) -> float:
    """Passes of quantization-aware fine-tuning: a quarter of the winner's, a trial's at least."""
    return max(recipe.epochs, recipe.final_epochs / 4)


def _fit_rounded(
    bench: Bench, folder: StudyFolder, finalist: Finalist, epochs: float, display: Display
) -> nn.Module:
    """The finalist's network after quantization-aware fine-tuning, or what is kept of an earlier
    one."""
    recipe = bench.finetune
    start = state_digest(finalist.model.state_dict())
    path = folder.int8 / f"{start}-{epochs:g}-{recipe.learning_rate:g}-{bench.seed}.safetensors"
    if path.exists():
        kept = deepcopy(finalist.model)
        load_state(kept, load_file(path))
        return kept
    state = path.with_suffix(".checkpoint")
    tuned = fit_rounded(
        finalist.model,
        bench.task,
        epochs=epochs,
        learning_rate=recipe.learning_rate,
        seed=bench.seed,
        teacher=bench.baseline.model,
        answers=bench.answers,
        distillation=recipe.distillation,
        on_step=lambda done, total, loss: display.step(
            "fine-tune with rounding", done, total, f"loss {loss:.3f}"
        ),
        checkpoint=Checkpoint.in_file(state, bench.checkpoint_every),
    )
    write_weights(path, portable_state(tuned))
    state.unlink(missing_ok=True)
    return tuned


def _describe(finalist: Finalist, attempt: Attempt) -> dict[str, Any]:
    stage, number = finalist.label.split("/")
    return {
        "stage": stage,
        "trial": int(number),
        "calibration": attempt.calibration,
        "rounded_epochs": attempt.epochs,
        "val_score": attempt.val.score,
        "val_drop": attempt.drop,
        "val_drop_bound": attempt.bound,
    }
