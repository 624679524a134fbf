"""The command line: `python -m autocompress.study`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from autocompress.errors import AutocompressError, ConfigError
from autocompress.scale import Scale

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial
    from torch import Tensor, nn

    from autocompress.config import SearchConfig, StudyConfig
    from autocompress.store import StudyFolder

EXIT_ERROR = 2
EXIT_NOT_MET = 3
EXIT_INTERRUPTED = 130


class RunByDefault(TyperGroup):
    """A group that takes `run` for granted: `study.toml --delta 2` means `run study.toml ...`."""

    default = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default in front where no command is named."""
        own = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
        if not args or (args[0] not in self.commands and args[0] not in own):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


class ListByDefault(RunByDefault):
    """Likewise with `list`: `models resnet` means `models list resnet`."""

    default = "list"


app = typer.Typer(
    cls=RunByDefault,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    no_args_is_help=False,
    help="""
Make a trained convolutional network small and fast, within an accuracy tolerance.

**Examples**

- `python -m autocompress.study` runs the quickstart: digits, a small residual network, minutes.
- `python -m autocompress.study my.toml --delta 0.5` runs a study file; again: goes on with it.
- `python -m autocompress.study run --help` shows what else can be set.
- `python -m autocompress.study status my.toml` says how far a study is.
- `python -m autocompress.study dashboard my.toml` opens its Pareto fronts in optuna-dashboard.
- `python -m autocompress.study export my.toml --trial annealing/7 --to small/` hands out a trial.
- `python -m autocompress.study models train resnet20 --data torchvision:CIFAR10` trains a baseline.

Exit codes: 0 within delta; 2 wrong input; 3 finished, but nothing met delta; 130 interrupted.
""",
)

models = typer.Typer(
    cls=ListByDefault,
    no_args_is_help=False,
    rich_markup_mode="markdown",
    help="""
List the networks that a study file can name, or train one.

- `python -m autocompress.study models resnet` lists those with resnet in their names.
- `python -m autocompress.study models train resnet18 --data torchvision:CIFAR10` trains one.
""",
)
app.add_typer(models, name="models")

StudyArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[STUDY]",
        help="A study file (.toml), a study's folder, or the name of a ready study; "
        "without one: the quickstart.",
        show_default=False,
    ),
]
OutOption = Annotated[
    str | None, typer.Option(help="Folder in which studies' folders are.", show_default=False)
]
StorageOption = Annotated[
    str | None,
    typer.Option(help="Database URL (SQLAlchemy); SQLite by default.", show_default=False),
]
LauncherOption = Annotated[
    Literal["local", "ray", "slurm"] | None,
    typer.Option(help="What starts the workers.", show_default=False),
]


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Options of the whole command line; its help is that of `app`."""
    if version:
        from autocompress import __version__

        _print(f"autocompress {__version__}")
        raise typer.Exit()


@app.command()
def run(
    study: StudyArgument = None,
    delta: Annotated[
        float | None, typer.Option(help="Largest accepted drop, points.", show_default=False)
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Trials of the exploration.", show_default=False)
    ] = None,
    stage: Annotated[
        Literal["exploration", "annealing", "both"] | None,
        typer.Option(help="Which stage to run.", show_default=False),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 or auto.", show_default=False)
    ] = None,
    int8: Annotated[
        bool | None,
        typer.Option("--int8/--no-int8", help="Write the winner in int8 too.", show_default=False),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            help="Processes that run trials: a number, or auto: one for each GPU; 0: this one.",
            show_default=False,
        ),
    ] = None,
    launcher: LauncherOption = None,
    storage: StorageOption = None,
    out: OutOption = None,
) -> None:
    """Run a study, or go on with it where it was interrupted. (The default command.)

    **Examples**

    - `python -m autocompress.study run` runs the quickstart.

    - `python -m autocompress.study run my.toml --delta 0.5 --trials 60`

    - `python -m autocompress.study my.toml --stage exploration --device cuda:0`
    """
    import warnings

    from autocompress.conductor import check_places, run_study
    from autocompress.config import own_code
    from autocompress.progress import comparison_table, make_display
    from autocompress.sources import task_from_config
    from autocompress.watch import Watch

    # The storages' and samplers' notes to programmers mean nothing to the person who watches.
    warnings.filterwarnings("ignore", module="optuna")
    overrides = {
        "delta": delta,
        "search.trials": trials,
        "search.stage": stage,
        "int8": int8,
        "run.device": device,
        "run.workers": _number(workers),
        "run.launcher": launcher,
        "run.storage": storage,
        "run.out": out,
    }
    config = _config(study, overrides)
    folder = _folder(config)
    command = "python -m autocompress.study " + shlex.join(sys.argv[1:])
    check_places(config)
    watch = Watch()
    with watch.orders.listening(_complain):
        try:
            with make_display() as display:
                modules = _modules(study)
                for line in own_code(config):
                    display.say(f"The study runs code of its own: {line}.")
                task = task_from_config(config, modules)
                outcome = run_study(config, task, display, command, watch, modules)
        except KeyboardInterrupt:
            _say_kept(config, folder)
            raise typer.Exit(EXIT_INTERRUPTED) from None
    scale = Scale.from_dict(outcome.summary["metric"])
    if outcome.met:
        _print(comparison_table(_rows(outcome.summary)))
        best = outcome.summary["best"]
        _print(
            f"Drop on validation data {scale.difference(best['val_drop'])}, at most "
            f"{scale.number(best['val_drop_bound'])} at confidence {config.confidence:g}; "
            f"{scale.number(best['tolerance_unused'])} of {config.delta:g} unused."
        )
        if config.int8 and not (outcome.summary.get("int8") or {}).get("met"):
            reason = (outcome.summary.get("int8") or {}).get("reason")
            _complain(f"There is no int8 file: {reason} The winner stays float32.")
    _print(f"Everything is in {outcome.folder}")
    if not outcome.met:
        nearest = outcome.summary["nearest"]
        near = ""
        if nearest:
            near = (
                f" The nearest lost {scale.difference(nearest['val_drop'])}, at most "
                f"{scale.number(nearest['val_drop_bound'])} at confidence {config.confidence:g}."
            )
        _complain(f"No network within {scale.difference(config.delta)} was found.{near}")
        raise typer.Exit(EXIT_NOT_MET)


@app.command()
def worker(
    study: Annotated[str, typer.Option(help="The study's name.", show_default=False)],
    storage: Annotated[
        str | None,
        typer.Option(
            help="Database URL (SQLAlchemy), or the environment variable AUTOCOMPRESS_STORAGE.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        str, typer.Option(help="Processes: a number, or auto: one for each GPU; 0: this one.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "auto",
    data_root: Annotated[
        str | None, typer.Option(help="The data's folder here.", show_default=False)
    ] = None,
    data_source: Annotated[
        str | None,
        typer.Option(help="The data here, where it is not as in the study.", show_default=False),
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(help="Where the study's artifacts are seen from here.", show_default=False),
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(
            help="Folder of the study's own modules; lets them run here.", show_default=False
        ),
    ] = None,
    patience: Annotated[
        float, typer.Option(help="Minutes without a trial after which it ends.")
    ] = 60.0,
    launcher: LauncherOption = None,
    launcher_option: Annotated[
        list[str] | None,
        typer.Option(help="For Ray's task or submitit's job, e.g. num_gpus=1.", show_default=False),
    ] = None,
    child: Annotated[bool, typer.Option("--child", hidden=True)] = False,
) -> None:
    """Join a study that runs, from this machine or another one, and carry out its trials.

    The study file, the weights and the layer table come from the study; only the data must be here.
    Ctrl-C once: end after the running trials; twice, or SIGTERM: end now, and others go on with
    them. The database's URL is best given as AUTOCOMPRESS_STORAGE, which no list of processes
    shows.

    **Example:** `AUTOCOMPRESS_STORAGE=postgresql://me@host/db python -m autocompress.study worker
    --study mine`
    """
    import os

    from autocompress.joining import Place, serve
    from autocompress.process import STORAGE_VARIABLE

    url = storage or os.environ.get(STORAGE_VARIABLE)
    if url is None:
        raise ConfigError(
            f"Give the database of the study: --storage URL, or the variable {STORAGE_VARIABLE}."
        )
    _hide_url(storage)
    place = Place(
        url=url,
        study=study,
        workers=_number(workers),
        device=device,
        data_root=data_root,
        data_source=data_source,
        artifacts=artifacts,
        code=None if code is None else Path(code).resolve(),
        patience=60 * patience,
        launcher=launcher,
        options=_options(launcher_option),
    )
    done = serve(place, child)
    if not child:
        _print(f"{done} trials ended here.")


@app.command()
def upgrade(study: StudyArgument = None, storage: StorageOption = None) -> None:
    """Bring a database that an older Optuna made to the schema of the one installed here.

    **Example:** `python -m autocompress.study upgrade my.toml`
    """
    from autocompress.database import upgrade as upgrade_database

    config = _config(study, {"run.storage": storage})
    _print(upgrade_database(_folder(config).storage_url(config.run.storage)))


@app.command()
def status(
    study: StudyArgument = None, storage: StorageOption = None, out: OutOption = None
) -> None:
    """Say how far a study is and what it has found.

    **Example:** `python -m autocompress.study status my.toml`
    """
    from optuna.trial import TrialState

    from autocompress.store import STAGES, trials_spent

    config = _config(study, {"run.storage": storage, "run.out": out})
    folder = _folder(config)
    studies = _studies(config)
    if folder.config.exists():
        # The command line may have overridden the file when the study was run.
        config = _stored(folder.config, {})
    totals = {
        "exploration": config.search.trials,
        "annealing": config.search.annealing_trials,
    }
    wanted = STAGES if config.search.stage == "both" else (config.search.stage,)
    table = Table("stage", "trials", "stopped", "failed", "running", "within delta", box=None)
    finished = folder.result.exists()
    for stage in STAGES:
        if stage not in studies:
            if stage in wanted:
                finished = finished and not totals[stage]
                table.add_row(stage, f"0/{totals[stage]}", *"0000")
            continue
        one = studies[stage]
        spent = trials_spent(one)
        running = one.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if stage in wanted:
            finished = finished and len(spent) >= totals[stage]
        table.add_row(
            stage,
            f"{len(spent)}/{totals[stage]}",
            str(sum(t.state == TrialState.PRUNED for t in spent)),
            str(sum(t.state == TrialState.FAIL for t in spent)),
            str(len(running)),
            str(len(_within(one))),
        )
    _print(table)
    for stage, one in studies.items():
        best = min(_within(one), key=lambda t: t.values[1], default=None)
        if best is not None:
            ratio = _baseline_cost(one, config.objective) / best.values[1]
            drop = Scale.from_dict(one.user_attrs.get("metric")).difference(best.values[0])
            _print(
                f"best of {stage}: {ratio:.2f}x {config.objective}, drop {drop} "
                f"(trial {best.number}){_speed(one, best)}"
            )
    _print(f"{'Finished' if finished else 'Not finished'}: {folder.path}")


@app.command()
def profile(
    study: StudyArgument = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 or auto.", show_default=False)
    ] = None,
    compatible: Annotated[
        bool,
        typer.Option("--compatible", help="Also by deeplite-profiler's formulas."),
    ] = False,
) -> None:
    """Print what a study's network costs, and what may become of each layer; nothing is trained.

    **Example:** `python -m autocompress.study profile my.toml`
    """
    from autocompress.compatible import compatible_profile
    from autocompress.latency import Deployment, LatencyMeter, describe
    from autocompress.profiler import profile_model
    from autocompress.scope import bound_text, check_names, prospects
    from autocompress.sources import task_from_config
    from autocompress.task import check_outputs

    config = _config(study, {"run.device": device})
    deployment = Deployment.from_config(config.latency)
    task = task_from_config(config, _modules(study))
    check_names(task.model, config.search)
    check_outputs(task)
    example = task.example()
    found = profile_model(task.model, example, latency=False)
    table = Table("layer", "kind", "params", "MACs", "activations (kB)")
    for layer in found.layers:
        table.add_row(
            layer.name,
            layer.kind,
            f"{layer.params:,}",
            f"{layer.macs:,}",
            f"{layer.activation_bytes / 1e3:,.1f}",
        )
    _print(table)
    _print(
        f"params {found.params / 1e6:.4f} M · size {found.size_bytes / 1e6:.3f} MB · "
        f"MACs {found.macs / 1e6:.2f} M · memory {found.memory_bytes / 1e6:.2f} MB"
    )
    if compatible:
        theirs = compatible_profile(task.model, example)
        _print(
            f"by deeplite-profiler's formulas: params {theirs.params_m:.4f} M · size "
            f"{theirs.size_mb:.4f} MB · MACs {theirs.macs_g:.4f} G · memory "
            f"{theirs.memory_mb:.4f} MB"
        )
    try:
        own = LatencyMeter(task.model, example, deployment).reference
        _print(
            f"latency {own.median_ms:.3f} ms (interquartile range {own.iqr_ms:.3f} ms; "
            f"{describe(own)}, {own.runs} runs on {own.device})"
        )
    except ConfigError as error:
        _complain(str(error))
    if found.uncounted:
        ops = ", ".join(f"{name} x{count}" for name, count in found.uncounted.items())
        _print(f"Not counted in the MACs: {ops}")
    possible, left_alone = prospects(task.model, task.example(), config.search)
    table = Table("layer", "may become, or why it is left alone")
    for layer in found.layers:
        words = [*possible.get(layer.name, ()), left_alone.get(layer.name)]
        if layer.name in possible:
            words.append(bound_text(layer.name, config.search.bounds or ()))
        if any(words):
            table.add_row(layer.name, ", ".join(filter(None, words)))
    _print(table)
    if config.search.channels:
        _print(_channels_table(task.model, example, config.search))


def _channels_table(model: nn.Module, example: tuple[Tensor, ...], search: SearchConfig) -> Table:
    """The channel groups: through which layers they run, what may remain, or why they stay."""
    from autocompress.importance import keep_counts
    from autocompress.layers import inspect_layers
    from autocompress.scope import channel_groups

    layers, left_alone = inspect_layers(
        model, example, include=search.include, exclude=search.exclude
    )
    groups, _, refused = channel_groups(model, example, layers, left_alone, search)
    table = Table("channels of", "may become fewer, or why they stay")
    for group in groups:
        counts = ", ".join(map(str, keep_counts(group))) or "too few to remove any"
        readers = ", ".join(dict.fromkeys(member.layer for member in group.of_side("in")))
        table.add_row(group.name, f"{counts} of {group.channels}; read by {readers}")
    for name, reason in refused.items():
        table.add_row(name, reason)
    return table


@app.command()
def report(
    study: StudyArgument = None, storage: StorageOption = None, out: OutOption = None
) -> None:
    """Write a finished study's report.html again.

    **Example:** `python -m autocompress.study report runs/quickstart`
    """
    import json

    from autocompress.report import write_report

    config = _config(study, {"run.storage": storage, "run.out": out})
    folder = _folder(config)
    if not folder.result.exists():
        raise ConfigError(f"There is no result in {folder.path} yet; run the study to its end.")
    studies = _studies(config)
    summary = json.loads(folder.result.read_text(encoding="utf-8"))
    write_report(summary, studies.get("exploration"), studies.get("annealing"), folder.report)
    _print(f"{folder.report}")


@app.command()
def export(
    study: StudyArgument = None,
    trial: Annotated[
        str, typer.Option(help="Which trial, e.g. annealing/7; best: the study's winner.")
    ] = "best",
    to: Annotated[str | None, typer.Option(help="The folder to write.", show_default=False)] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Add an int8 ONNX file; reads the study's data.")
    ] = False,
    storage: StorageOption = None,
    out: OutOption = None,
) -> None:
    """Write any trial's network as safetensors, plan, ONNX and pt2, and with --int8 as int8 ONNX.

    **Example:** `python -m autocompress.study export my.toml --trial annealing/7 --to small/`
    """
    from autocompress.handout import export_trial, quantizer_of
    from autocompress.sources import load_transforms, task_from_config

    config = _config(study, {"run.storage": storage, "run.out": out})
    load_transforms(config, _modules(study))
    folder = _folder(config)
    target = Path(to) if to is not None else folder.path / "exports" / trial.replace("/", "-")
    studies = _studies(config)
    quantizer = None
    if int8:
        quantizer = quantizer_of(config, folder, task_from_config(config, _modules(study)))
    written = export_trial(
        folder, studies, trial, target, _modules(study), quantizer, say=_complain
    )
    for name, size in written.files.items():
        _print(f"{target / name}  {size / 1e6:.3f} MB")
    for name, reason in written.skipped.items():
        _complain(f"{name} was not written: {reason}")


@app.command()
def dashboard(
    study: StudyArgument = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port on 127.0.0.1; a free one by default.", show_default=False),
    ] = None,
    storage: StorageOption = None,
    out: OutOption = None,
) -> None:
    """Show a study in optuna-dashboard, on this machine only; also while it runs.

    **Example:** `python -m autocompress.study dashboard my.toml --port 8080`
    """
    from autocompress.dashboard import annotate, serve

    config = _config(study, {"run.storage": storage, "run.out": out})
    folder = _folder(config)
    studies = _studies(config)
    for one in studies.values():
        annotate(one)
    url = folder.storage_url(config.run.storage)
    store = folder.artifact_store(studies["exploration"])
    serve(url, store, port=port, on_ready=lambda at: _print(f"{at}  (Ctrl-C ends it)"))


@models.command("list")
def list_networks(
    pattern: Annotated[str, typer.Argument(help="Only names with this in them.")] = "",
) -> None:
    """List the networks that a study file can name, and how far training takes some. (The default.)

    **Example:** `python -m autocompress.study models resnet`
    """
    from autocompress.models import list_models
    from autocompress.recipes import recipe_table

    known = list_models()
    for source, names in known.items():
        found = [name for name in names if pattern in name]
        if found:
            _print(f"{source}:  " + ", ".join(found))
    table = Table("network", "data", "accuracy", "of", "epochs, short", box=None)
    for network, data, recipe in recipe_table([n for n in known["zoo"] if pattern in n]):
        length = f"{recipe.epochs:g}, {recipe.short_epochs:g}"
        table.add_row(network, data, f"{recipe.accuracy:.2f} %", recipe.source, length)
    if table.row_count:
        _print("\nRecipes, and the accuracies in the literature that they are after:")
        _print(table)


@models.command()
def train(
    network: Annotated[
        str, typer.Argument(help="A name in the zoo, or torchvision:NAME, timm:NAME, ...")
    ],
    data: Annotated[
        str,
        typer.Option(help="The images, as data.source in a study file.", show_default=False),
    ],
    root: Annotated[
        str | None, typer.Option(help="The data's folder, as data.root.", show_default=False)
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="The recipe's short form: a first look.")
    ] = False,
    epochs: Annotated[
        float | None, typer.Option(help="In place of the recipe's.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="In place of the recipe's.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="In place of the recipe's.", show_default=False)
    ] = None,
    augment: Annotated[
        Literal["none", "flip", "crop", "crop-flip"] | None,
        typer.Option(help="In place of the recipe's.", show_default=False),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Resize images to this.", show_default=False)
    ] = None,
    classes: Annotated[
        int | None, typer.Option(help="By default as many as the data has.", show_default=False)
    ] = None,
    width: Annotated[
        float | None, typer.Option(help="Of a zoo network, as it takes it.", show_default=False)
    ] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option(help="Another argument of the network, key=value.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes weights, split and order.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 or auto.", show_default=False)
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="A .safetensors file to write, too.", show_default=False)
    ] = None,
) -> None:
    """Train a network by its recipe, and keep it where studies look for their baseline.

    Ctrl-C ends it; the same command goes on from the last checkpoint. A study with the lines that
    are printed at the end doesn't train again; elsewhere give it the file: model.weights = FILE.

    **Example:** `python -m autocompress.study models train resnet18 --data torchvision:CIFAR10
    --to resnet18.safetensors`
    """
    from autocompress.pretrain import pretrain, settings_of
    from autocompress.progress import make_display

    if to is not None and not to.endswith(".safetensors"):
        raise ConfigError(f"--to {to}: give a file that ends in .safetensors.")
    own = _options(argument, "--argument", "width=16")
    if width is not None:
        own["width"] = int(width) if width.is_integer() else width
    config = settings_of(
        network,
        data,
        arguments=own,
        classes=classes,
        short=short,
        seed=seed,
        data__root=root,
        data__image_size=image_size,
        data__batch_size=batch_size,
        data__augment=augment,
        baseline__epochs=epochs,
        baseline__learning_rate=learning_rate,
        run__device=device,
    )
    try:
        with make_display() as display:
            made = pretrain(config, display, Path.cwd())
    except KeyboardInterrupt:
        _complain("Interrupted. The same command goes on from the last checkpoint.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    expected = made.recipe.accuracy
    compare = "" if expected is None else f"; in the literature {expected:.2f} %, at full length"
    _print(
        f"{made.test_accuracy:.2f} % on test data, {made.val_accuracy:.2f} % on validation data"
        f"{compare}."
    )
    if to is not None:
        made.write(Path(to))
        _print(f"Written: {to}")
    _print(f"A study that begins so finds these weights:\n\n{made.study_lines()}")


def _number(workers: str | None) -> int | str | None:
    """What the study file would have: a number, or "auto"."""
    return int(workers) if workers is not None and workers.isdecimal() else workers


def _options(
    pairs: list[str] | None, option: str = "--launcher-option", example: str = "num_gpus=1"
) -> dict[str, Any]:
    """What "key=value" pairs say; numbers become numbers."""
    import json

    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{option} {pair}: give key=value, e.g. {example}.")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _hide_url(storage: str | None) -> None:
    """Start this program anew without the URL among its arguments, if there is a password in it.

    The list of processes, which everyone on the machine can read, shows arguments and no
    environment.
    """
    import os

    from autocompress.database import hide_password
    from autocompress.process import STORAGE_VARIABLE

    if storage is None or hide_password(storage) == storage:
        return
    arguments = [a for a in sys.argv[1:] if a not in ("--storage", storage)]
    arguments = [a for a in arguments if a != f"--storage={storage}"]
    environment = {**os.environ, STORAGE_VARIABLE: storage}
    command = [sys.executable, "-m", "autocompress.study", *arguments]
    os.execve(sys.executable, command, environment)


def _modules(study: str | None) -> Path | None:
    """Where modules of the user are looked for: beside the study file, a ready one's too."""
    from autocompress.config import ready_folder

    if study is None:
        return None
    return Path(study).absolute().parent if Path(study).is_file() else ready_folder()


def _config(study: str | None, overrides: dict[str, Any]) -> StudyConfig:
    """The checked settings of a study file, or of a study's folder."""
    from autocompress.config import load_config

    if study is not None and Path(study).is_dir():
        stored = Path(study) / "study.json"
        if not stored.exists():
            raise ConfigError(f"{study} is no study's folder: there is no study.json in it.")
        place = str(Path(study).resolve().parent)
        config = _stored(
            stored, {"run.out": place} | {k: v for k, v in overrides.items() if v is not None}
        )
        if ":***@" in str(config.run.storage):
            raise ConfigError(
                f"The study in {study} is in the database {config.run.storage}, whose password "
                "is not kept in files; give --storage with the whole URL."
            )
        return config
    return load_config(study, overrides)


def _stored(path: Path, changes: dict[str, Any]) -> StudyConfig:
    """The settings that a study was last run with."""
    import json

    from autocompress.config import flatten, parse_config

    return parse_config(flatten(json.loads(path.read_text(encoding="utf-8"))) | changes)


def _folder(config: StudyConfig) -> StudyFolder:
    from autocompress.store import StudyFolder

    return StudyFolder(Path(config.run.out) / config.name)


def _studies(config: StudyConfig) -> dict[str, Study]:
    """The stages of a study that has begun, for reading."""
    from autocompress.database import open_storage
    from autocompress.store import load_stages

    folder = _folder(config)
    if config.run.storage is None and not folder.database.exists():
        raise ConfigError(
            f"Study '{config.name}' has not begun: there is no {folder.database}. Run it first, or "
            "give --out or --storage."
        )
    storage = open_storage(folder.storage_url(config.run.storage))
    present = load_stages(storage, config.name)
    if not present:
        raise ConfigError(f"Study '{config.name}' has not begun; run it first.")
    return present


def _within(study: Study) -> list[FrozenTrial]:
    from autocompress.trials import within_delta

    return [trial for trial in study.get_trials(deepcopy=False) if within_delta(trial)]


def _speed(study: Study, trial: FrozenTrial) -> str:
    """How many MACs a trial saves and what comes of it; empty where no latency was measured."""
    from autocompress.latency import describe
    from autocompress.objective import LATENCY
    from autocompress.profiler import Latency, Profile

    baseline = Profile.from_dict(study.user_attrs["baseline"])
    measured = trial.user_attrs.get(LATENCY)
    if measured is None or baseline.latency is None:
        return ""
    latency = Latency(**measured)
    macs = baseline.macs / trial.user_attrs["metrics"]["macs"]
    speedup = baseline.latency.median_ms / latency.median_ms
    return f"; {macs:.2f}x fewer MACs, {speedup:.2f}x as fast ({describe(latency)})"


def _baseline_cost(study: Study, objective: str) -> float:
    from autocompress.objective import cost_of
    from autocompress.profiler import Profile

    baseline = Profile.from_dict(study.user_attrs["baseline"])
    return cost_of(objective, baseline, baseline.latency_ms, baseline)


def _rows(summary: Any) -> Any:
    """Before and after, from the result of a study that met delta."""
    from autocompress.profiler import Profile, comparison

    best = summary["best"]
    before = Profile.from_dict(summary["baseline"]["profile"])
    scale = Scale.from_dict(summary["metric"])
    return comparison(before, Profile.from_dict(best["profile"]), scale)


def _say_kept(config: StudyConfig, folder: StudyFolder) -> None:
    from autocompress.store import trials_spent

    try:
        counts = ", ".join(f"{len(trials_spent(s))} of {n}" for n, s in _studies(config).items())
    except ConfigError:
        counts = "no trial yet"
    _complain(f"Interrupted. Kept in {folder.path}: {counts}. The same command goes on from there.")


def _print(what: Any) -> None:
    # Brackets in names and paths are no markup.
    Console().print(what, markup=False, soft_wrap=True)


def _complain(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line; errors of ours become one line and exit code 2."""
    try:
        app()
    except AutocompressError as error:
        _complain(f"Error: {error}")
        raise SystemExit(EXIT_ERROR) from None


if __name__ == "__main__":
    main()
