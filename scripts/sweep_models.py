"""Compress many published networks to half of their MACs, and say for each whether all of it works.

    python scripts/sweep_models.py                        # torchvision's classifiers, then timm's
    python scripts/sweep_models.py --models 'torchvision:resnet*' 'timm:ghostnet_100'
    OMP_NUM_THREADS=1 python scripts/sweep_models.py --jobs 16
    python scripts/sweep_models.py --page                 # docs/networks.md from what is finished

Each network has random weights and goes through all steps of a user's network: its layers and
channel groups are analysed; the layer table is made from random images; the allocator plans half of
the MACs, by ranks and channels (--no-channels: by ranks alone); the plan is applied, runs forward
and backward in training mode, is saved, is built again from plan and weights with identical
outputs, and is exported to ONNX with outputs that match. A network that can't be halved is refused
with a reason. Each one runs in a process of its own, within a time and the memory that is there.
What is finished is kept in --out, scripts/sweep.json by default, and not done again; with --again,
networks that failed are tried once more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.allocator import Knobs, decode
from autocompress.artifacts import write_text
from autocompress.batch import tensors_in
from autocompress.config import SearchConfig
from autocompress.errors import AutocompressError
from autocompress.export import load, save_model
from autocompress.formats import check_onnx, export_onnx
from autocompress.importance import build_ladders
from autocompress.layers import Cost, LayerSpec, inspect_layers
from autocompress.models import build_model, list_models
from autocompress.observation import observe_layers
from autocompress.profiler import profile_model
from autocompress.scope import channel_groups, why_refused
from autocompress.sensitivity import build_table
from autocompress.space import SearchSpace
from autocompress.surgery import FactorCache, apply_plan
from autocompress.task import Task
from autocompress.training import fit

TIMM = (
    "bat_resnext26ts botnet26t_256 coatnet_nano_rw_224 coat_tiny convformer_s18 convit_tiny "
    "convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240 cs3darknet_m "
    "cspresnet50 darknet53 davit_tiny deit_tiny_patch16_224 densenet121 dla34 dm_nfnet_f0 dpn48b "
    "eca_nfnet_l0 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 "
    "efficientnet_lite0 efficientnetv2_rw_t efficientvit_b0 ese_vovnet19b_dw fasternet_t0 "
    "fastvit_t8 fbnetc_100 focalnet_tiny_srf gcresnet33ts gernet_s ghostnet_100 ghostnetv2_100 "
    "halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small inception_next_tiny "
    "inception_resnet_v2 inception_v4 lambda_resnet26t lcnet_050 legacy_senet154 levit_128s "
    "maxvit_tiny_tf_224 mixer_s32_224 mixnet_s mnasnet_100 mobilenet_edgetpu_v2_xs "
    "mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 nasnetalarge nextvit_small "
    "nf_resnet50 pit_ti_224 poolformer_s12 pnasnet5large pvt_v2_b0 regnetz_b16 repghostnet_050 "
    "repvgg_a0 repvit_m1 res2net50_14w_8s resmlp_12_224 resnest14d resnetv2_50 rexnet_100 "
    "rdnet_tiny selecsls42b semnasnet_075 sequencer2d_s shvit_s1 skresnet18 spnasnet_100 "
    "starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224 tf_efficientnet_b0 "
    "tf_mobilenetv3_small_100 tiny_vit_5m_224 tinynet_e tresnet_m twins_pcpvt_small vgg11 "
    "visformer_tiny vovnet39a wide_resnet50_2 xception41 xcit_nano_12_p16_224"
).split()
"""CNNs and hybrids of many families; those that this timm doesn't have are passed over."""

SIZES = (64, 128, 224, 299)
"""Heights and widths to try, smallest first: most networks take any, and small ones are quick."""
OWN_SIZE = {"vit", "swin", "maxvit"}
"""Of these torchvision's networks take one size only, or are made for one."""
BUDGET = 0.5
"""Share of the MACs to come down to."""
NEARLY = 1.1
"""A plan of at most this many times the budget is about half."""
METHODS = ("svd", "spatial_svd", "tucker2")
"""The transforms in the table; cp and tt are iterated and slow to factor."""
IMAGES = 8

FINISHED = Path(__file__).resolve().parent / "sweep.json"
"""The networks that are finished, on whatever machine."""
PAGE = FINISHED.parent.parent / "docs" / "networks.md"
KEPT = (
    "outcome reason pixels layers changed groups narrowed params macs difference seconds trace"
).split()
"""What is kept of a row."""
HEAD = """\
# Networks that were tried

`python scripts/sweep_models.py` takes each through all steps of a user's network: layers and
channel groups are analysed, half of the MACs are planned away by ranks and channels, the plan is
applied, runs forward and backward, is saved, is built again with identical outputs, and is
exported to ONNX with matching outputs. Weights and images are random: this tells that it works,
not what a trained network loses; where branches begin with weights of zero, cutting them breaks
nothing, and more than half of the MACs goes. Of layers and groups: how many the plan changed, of
how many that may change; params and MACs: how many times fewer; then the largest difference of the
ONNX file's outputs, and seconds on one thread of a shared CPU.

This page is made from `scripts/sweep.json`; a network that is missing has not been tried yet, and
`--models NAME` tries it.

"""


def main() -> None:
    """Sweep over the networks that the command line names and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["*"], help="patterns, e.g. 'timm:*net*'")
    parser.add_argument("--out", type=Path, default=FINISHED, help="file of what is finished")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.name} and end")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one network")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="transforms")
    parser.add_argument("--no-channels", action="store_true", help="plan by ranks alone")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--again", action="store_true", help="try failed networks once more")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(attempt(options.one, options.methods, not options.no_channels)))
        return
    if options.page:
        PAGE.write_text(page(finished(options.out)), encoding="utf-8")
        return
    sources = [s for s in known_sources() if any(fnmatchcase(s, p) for p in options.models)]
    known, lock = finished(options.out), Lock()
    print(heads(), flush=True)

    def work(source: str) -> dict[str, Any]:
        row = known.get(source)
        if row is not None and not (options.again and row["outcome"] == "failed"):
            return row
        found = in_a_process(source, options.limit, options.methods, not options.no_channels)
        with lock:
            # Others may have added to it meanwhile.
            known.update(finished(options.out))
            known[source] = {key: found[key] for key in KEPT if key in found}
            lines = [f"{json.dumps(k)}: {json.dumps(known[k])}" for k in sorted(known)]
            write_text(options.out, "{\n" + ",\n".join(lines) + "\n}\n")
        return known[source]

    rows: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for source, row in zip(sources, pool.map(work, sources), strict=True):
            rows[source] = row
            print(line(source, row), flush=True)
    print("\n" + totals(rows))


def known_sources() -> list[str]:
    """All of torchvision's classifiers, and the listed ones of timm's where it is installed."""
    models = list_models()
    timm = [name for name in sorted(TIMM) if name in models.get("timm", ())]
    return [f"torchvision:{n}" for n in models["torchvision"]] + [f"timm:{n}" for n in timm]


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of earlier runs, by network."""
    found: dict[str, dict[str, Any]] = {}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    return found


def in_a_process(
    source: str, limit: float, methods: Sequence[str], channels: bool = True
) -> dict[str, Any]:
    """One network's row, from a process that may run out of time or memory."""
    command = [sys.executable, __file__, "--one", source, "--methods", *methods]
    command += [] if channels else ["--no-channels"]
    start = time.perf_counter()
    fault = ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        if done.returncode == 0:
            row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return row
        fault = f"the process ended with {done.returncode}: {done.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode() if isinstance(error.stderr, bytes) else error.stderr or ""
        steps = [part for part in said.splitlines() if part.startswith("step: ")]
        fault = f"not done in {limit:g} s; {steps[-1] if steps else 'at the start'}"
    seconds = round(time.perf_counter() - start, 1)
    return {"outcome": "failed", "reason": fault, "seconds": seconds}


def attempt(source: str, methods: Sequence[str], channels: bool = True) -> dict[str, Any]:
    """Take one network through all steps; a failure is a row, too."""
    began: dict[str, float] = {}
    row: dict[str, Any] = {}
    start = time.perf_counter()

    def note(name: str) -> None:
        began[name] = time.perf_counter()
        print(f"step: {name}", file=sys.stderr, flush=True)

    try:
        outcome, reason = compress(source, methods, channels, row, note)
    except Exception as error:
        first = next((text for text in str(error).splitlines() if text.strip()), "")
        outcome, reason = "failed", f"{list(began)[-1]}: {type(error).__name__}: {first}"
        row["trace"] = traceback.format_exc()
    ends = [*list(began.values())[1:], time.perf_counter()]
    row["steps"] = {k: round(end - t, 1) for (k, t), end in zip(began.items(), ends, strict=True)}
    seconds = round(time.perf_counter() - start, 1)
    return {**row, "outcome": outcome, "reason": reason, "seconds": seconds}


def compress(
    source: str,
    methods: Sequence[str],
    channels: bool,
    row: dict[str, Any],
    note: Callable[[str], None],
) -> tuple[str, str]:
    """All steps of one network; what is learned goes into `row`.

    Returns:
        "ok" and "", or "refused" and the reason.
    """
    torch.manual_seed(0)
    note("build")
    model = build_model(source, {}, None)
    note("find its input size")
    images = fitting_images(source, model)
    row["pixels"] = images.shape[-1]
    with torch.no_grad():
        classes = next(tensors_in(model(images[:1]))).shape[1]
    loader = [(images, torch.arange(len(images)) % classes)]
    task = Task(model, loader, loader, loader)
    example = task.example()
    note("analyse")
    before = profile_model(model, example, latency=False)
    layers, left_alone = inspect_layers(model, example, include=None)
    row |= {"layers": len(layers), "left_alone": left_alone}
    macs = {layer.name: layer.macs for layer in before.layers}
    note("channel groups")
    search = SearchConfig(channels=channels)
    groups, others, unfit = channel_groups(model, example, layers, left_alone, search)
    row |= {"groups": len(groups), "refused_groups": unfit}
    if not (layers or groups):
        return "refused", "no layer may change: " + main_reasons(left_alone, macs)
    note("layer table")
    seen = observe_layers(model, task, (*layers, *others), patches=64)
    cache = FactorCache(model, seen.patches)
    table = build_table(model, layers, cache, seen, methods)
    ladders = build_ladders(model, task, groups, seen, search.importance)
    table = replace(table, others=others, ladders=ladders)
    note("plan")
    space = SearchSpace.from_table(table, "macs", before.cost)
    least = space.least_cost / space.baseline_cost
    if least > NEARLY * BUDGET:
        for name in table.refused.keys() - table.choices.keys():
            left_alone[name] = why_refused(table.refused[name].values())
        return "refused", (
            f"the smallest network of the space still has {100 * least:.0f} % of the MACs: "
            + main_reasons(left_alone, macs, layers)
        )
    here, picked = decode(space, Knobs(max(BUDGET, least)))
    plan = here.plan(picked)
    note("apply")
    small = apply_plan(model, plan, cache)
    del cache, seen  # gigabytes, of the largest networks
    after = profile_model(small, example, latency=False)
    row |= ratios(before.cost, after.cost)
    row |= {"changed": len(plan.layers), "narrowed": len(plan.channels)}
    note("forward and backward")
    fit(small, task, epochs=1, learning_rate=1e-4, seed=0, teacher=model, distillation=0.5)
    with TemporaryDirectory() as place:
        note("save and build again")
        folder = Path(place) / "small"
        origin = {"source": source, "arguments": {}}
        save_model(folder, small, plan, origin, example, after, formats=())
        compare(small, load(folder), images)
        note("export")
        path = Path(place) / "model.onnx"
        export_onnx(small, example, path)
        row["difference"] = check_onnx(path, small, images[:2])
    return "ok", ""


def fitting_images(source: str, model: nn.Module) -> Tensor:
    """Random images of the smallest size that the network takes.

    timm writes on the network its usual size, and whether it takes no other. A size at which a
    layer sees less than its kernel, or a norm a single value, fails in training.
    """
    own = getattr(model, "pretrained_cfg", None) or {}
    family = source.partition(":")[2].split("_")[0]
    if own.get("fixed_input_size"):
        sizes: Sequence[int] = (own["input_size"][-1],)
    elif own:
        sizes = [*(s for s in SIZES if s < own["input_size"][-1]), own["input_size"][-1]]
    else:
        sizes = tuple(s for s in SIZES if family not in OWN_SIZE or s >= 224)
    for size in sizes:
        images = torch.randn(IMAGES, 3, size, size)
        try:
            with torch.no_grad():
                model.train()(images[:2])
                model.eval()(images[:1])
        except (RuntimeError, ValueError, AssertionError):
            if size == sizes[-1]:
                raise
        else:
            # The batch norms have seen random images, as they will again.
            return images
        finally:
            model.eval()
    raise AssertionError("there is a last size")


def compare(model: nn.Module, rebuilt: nn.Module, images: Tensor) -> None:
    """Check that two networks give the same outputs to the last bit.

    Raises:
        AutocompressError: If they don't.
    """
    with torch.no_grad():
        pairs = zip(
            tensors_in(model.eval()(images[:2])), tensors_in(rebuilt(images[:2])), strict=True
        )
        if not all(torch.equal(one, other) for one, other in pairs):
            raise AutocompressError("the network that was built again gives other outputs")


def ratios(before: Cost, after: Cost) -> dict[str, float]:
    """Compression ratios of a network."""
    return {"params": before.params / after.params, "macs": before.macs / after.macs}


def main_reasons(
    left_alone: Mapping[str, str], macs: Mapping[str, int], layers: Sequence[LayerSpec] = ()
) -> str:
    """The two reasons that hold most of the MACs back, with their shares.

    Args:
        left_alone: Layer name to why it stays.
        macs: Module name to MACs.
        layers: The layers that may change.
    """
    held: Counter[str] = Counter()
    for name, reason in left_alone.items():
        held[reason] += macs.get(name, 0)
    known = {*left_alone, *(layer.name for layer in layers)}
    rest = sum(count for name, count in macs.items() if name not in known)
    held["products that belong to no layer, as in attention"] = rest
    total = max(1, sum(macs.values()))
    worst = [f"{why} ({100 * count / total:.0f} %)" for why, count in held.most_common(2) if count]
    return "; ".join(worst)


def page(rows: Mapping[str, dict[str, Any]]) -> str:
    """The page of all networks that are finished."""
    lines = [line(source, rows[source]) for source in sorted(rows)]
    return HEAD + totals(rows) + "\n\n" + heads() + "\n" + "\n".join(lines) + "\n"


def heads() -> str:
    """The first two lines of the Markdown table."""
    names = ("network", "pixels", "layers", "groups", "params", "MACs", "ONNX difference", "s")
    return "| " + " | ".join((*names, "outcome")) + " |\n" + "|---" * (len(names) + 1) + "|"


def line(source: str, row: Mapping[str, Any]) -> str:
    """A row of the Markdown table."""

    def shown(key: str, form: str, unit: str = "") -> str:
        return format(row[key], form) + unit if key in row else "-"

    outcome = row["outcome"] + (f": {row['reason']}" if row["reason"] else "")
    cells = [
        source,
        shown("pixels", "d"),
        f"{shown('changed', 'd')} of {shown('layers', 'd')}",
        f"{shown('narrowed', 'd')} of {shown('groups', 'd')}",
        shown("params", ".2f", "x"),
        shown("macs", ".2f", "x"),
        shown("difference", ".1e"),
        shown("seconds", ".0f"),
        outcome.replace("|", "/").replace("\n", " "),
    ]
    return "| " + " | ".join(cells) + " |"


def totals(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """How many of each library came through, of the rows by network."""
    lines = []
    for library in ("torchvision", "timm"):
        own = [row["outcome"] for source, row in rows.items() if source.startswith(library)]
        counts = Counter(own)
        if own:
            lines.append(
                f"{library}: {len(own)} networks, {counts['ok']} ok, {counts['refused']} refused "
                f"with a reason, {counts['failed']} failed."
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
