"""The command line: `python -m autocompress.study`."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from autocompress.errors import DISK_FULL, AutocompressError, ConfigError
from autocompress.voice import (
    EXIT_BUG,
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_NOT_MET,
    JsonOption,
    QuietOption,
    VerboseOption,
    Voice,
    complain,
    documents_alone,
    end_in_error,
    wants_json,
)

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

    from autocompress.config import SearchConfig, StudyConfig
    from autocompress.profiler import Profile
    from autocompress.store import StudyFolder

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""The errors of a command line that can't be understood."""


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
    # Plain text: Rich and its Markdown would take longer to import than all the rest.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=False,
    help="""
Make a trained convolutional network small and fast, within an accuracy tolerance.

\b
Examples:
  python -m autocompress.study                      # the quickstart, minutes
  python -m autocompress.study my.toml --delta 0.5  # again: go on with it
  python -m autocompress.study run --help           # what else can be set
  python -m autocompress.study status my.toml       # how far it is
  python -m autocompress.study dashboard my.toml    # in optuna-dashboard
  python -m autocompress.study export my.toml --trial annealing/7 --to small/
  python -m autocompress.study models train resnet20 --data torchvision:CIFAR10
  python -m autocompress.study fields finetune      # what a study file holds

Exit codes: 0 within delta; 2 wrong input; 3 finished, but nothing met delta; 130 interrupted.
""",
)

models = typer.Typer(
    cls=ListByDefault,
    no_args_is_help=False,
    rich_markup_mode=None,
    help="""
List the networks that a study file can name, or train one.

\b
Examples:
  python -m autocompress.study models resnet
  python -m autocompress.study models train resnet18 --data torchvision:CIFAR10
""",
)
app.add_typer(models, name="models")

StudyArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="STUDY",
        help="A study file (.toml), a study's folder, or the name of a ready study; "
        "without one: the quickstart.",
        show_default=False,
    ),
]
OutOption = Annotated[
    str | None, typer.Option(help="Folder in which studies' folders are.", show_default=False)
]


def _hide_password(storage: str | None) -> str | None:
    """Start this program anew without the password in a URL among its arguments.

    The list of processes, which everyone on the machine can read, shows arguments and no
    environment, which has the whole URL then.

    Returns:
        The whole URL.
    """
    import os

    from autocompress.database import hide_password
    from autocompress.process import STORAGE_VARIABLE

    if storage is None:
        return None
    shown, whole = hide_password(storage), os.environ.get(STORAGE_VARIABLE)
    if shown == storage:
        return whole if whole is not None and hide_password(whole) == shown else storage
    arguments = [argument.replace(storage, shown) for argument in sys.argv[1:]]
    command = [sys.executable, "-m", "autocompress.study", *arguments]
    os.execve(sys.executable, command, {**os.environ, STORAGE_VARIABLE: storage})


StorageOption = Annotated[
    str | None,
    typer.Option(
        help="Database URL (SQLAlchemy); SQLite by default.",
        show_default=False,
        callback=_hide_password,
    ),
]
LauncherOption = Annotated[
    Literal["local", "ray", "slurm"] | None,
    typer.Option(help="What starts the workers.", show_default=False),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from autocompress import __version__

        typer.echo(f"autocompress {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            is_eager=True,
            callback=_show_version,
        ),
    ] = False,
) -> None:
    """Options of the whole command line; its help is that of `app`."""


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
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    json: JsonOption = False,
) -> None:
    """Run a study, or go on with it where it was interrupted. (The default command.)

    On a terminal a few lines at the bottom show what is done; in a pipe and in CI there is a line
    for each event. The study's folder has all of it in study.log. Ctrl-C once: finish the running
    trials; twice: stop now. The same command goes on from there.

    \b
    Examples:
      python -m autocompress.study run
      python -m autocompress.study run my.toml --delta 0.5 --trials 60
      python -m autocompress.study my.toml --stage exploration --device cuda:0
      python -m autocompress.study my.toml --json > outcome.json
    """
    from autocompress.conductor import check_places, log_of, run_study
    from autocompress.config import own_code
    from autocompress.endings import outcome_document, say_outcome
    from autocompress.naming import config_of, modules_of
    from autocompress.sources import task_from_config
    from autocompress.store import folder_of
    from autocompress.watch import Watch

    voice = Voice(quiet, verbose, json)
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
    config = config_of(study, overrides)
    folder = folder_of(config)
    command = "python -m autocompress.study " + shlex.join(sys.argv[1:])
    check_places(config)
    watch = Watch()
    with voice.hearing(), watch.orders.listening(_tell):
        try:
            with log_of(config, folder, command), voice.display() as display:
                modules = modules_of(study)
                for line in own_code(config):
                    display.say(f"The study runs code of its own: {line}.")
                task = task_from_config(config, modules)
                outcome = run_study(config, task, display, command, watch, modules)
        except KeyboardInterrupt:
            _say_kept(config, folder, voice)
            raise typer.Exit(EXIT_INTERRUPTED) from None
    code = 0 if outcome.met else EXIT_NOT_MET
    voice.document(outcome_document(outcome, code))
    say_outcome(config, outcome, voice)
    if code:
        raise typer.Exit(code)


@app.command(short_help="Join a study that runs, and do trials.")
def worker(
    study: Annotated[str, typer.Option(help="The study's name.", show_default=False)],
    storage: Annotated[
        str | None,
        typer.Option(
            help="Database URL (SQLAlchemy), or the environment variable AUTOCOMPRESS_STORAGE.",
            show_default=False,
            callback=_hide_password,
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
        typer.Option(
            help="For Ray's task or submitit's job, e.g. num_gpus=1.",
            metavar="KEY=VALUE",
            show_default=False,
        ),
    ] = None,
    child: Annotated[bool, typer.Option("--child", hidden=True)] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Join a study that runs, from this machine or another one, and carry out its trials.

    The study file, the weights and the layer table come from the study; only the data must be here.
    Ctrl-C once: end after the running trials; twice, or SIGTERM: end now, and others go on with
    them. The database's URL is best given as AUTOCOMPRESS_STORAGE, which no list of processes
    shows.

    \b
    Example:
      export AUTOCOMPRESS_STORAGE=postgresql://me@host/db
      python -m autocompress.study worker --study mine
    """
    import os

    from autocompress.config import parse_pairs
    from autocompress.joining import Place
    from autocompress.process import STORAGE_VARIABLE
    from autocompress.serving import serve

    url = storage or os.environ.get(STORAGE_VARIABLE)
    if url is None:
        raise ConfigError(
            f"Give the database of the study: --storage URL, or the variable {STORAGE_VARIABLE}."
        )
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
        options=parse_pairs(launcher_option or (), "--launcher-option", "num_gpus=1"),
    )
    voice = Voice(quiet, verbose)
    if child:
        done = serve(place, child)
    else:
        with voice.hearing(), voice.display() as display:
            done = serve(place, child, display)
    if not child:
        voice.say(f"{done} trials ended here.")


@app.command(short_help="Bring an older database up to date.")
def upgrade(study: StudyArgument = None, storage: StorageOption = None) -> None:
    """Bring a database that an older Optuna made to the schema of the one installed here.

    \b
    Example:
      python -m autocompress.study upgrade my.toml
    """
    from autocompress.database import upgrade as upgrade_database
    from autocompress.naming import config_of
    from autocompress.store import folder_of

    config = config_of(study, {"run.storage": storage})
    Voice().say(upgrade_database(folder_of(config).storage_url(config.run.storage)))


@app.command(short_help="Say how far a study is, and who does what.")
def status(
    study: StudyArgument = None,
    storage: StorageOption = None,
    out: OutOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on showing it until it is over.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Add the tracebacks of failed trials.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Say how far a study is, what each worker does, and what it has found.

    It reads the database alone, from any terminal or machine, while the study runs. With only a
    database at hand give --storage and the study's name.

    \b
    Examples:
      python -m autocompress.study status my.toml --watch
      python -m autocompress.study status mine --storage postgresql://me@host/db
      python -m autocompress.study status runs/mine --json
    """
    from rich.console import Console

    from autocompress.naming import begun_config, studies_of
    from autocompress.situation import Situation, place_of, read_situation, watch_study
    from autocompress.store import folder_of

    voice = Voice(verbose=verbose, json=json)
    config = begun_config(study, storage, out)
    folder = folder_of(config)
    place = place_of(folder.path, config.run.storage)
    studies = studies_of(config)

    def read() -> Situation:
        known = studies if len(studies) > 1 else studies_of(config)
        return read_situation(config, known, place, folder.result.exists())

    try:
        now = watch_study(read, Console(stderr=json)) if watch else read()
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    voice.document(now.to_dict())
    voice.say(now.render())
    if verbose:
        for label, trace in now.tracebacks():
            voice.complain(f"{label} failed:\n{trace}")


@app.command(short_help="Print what a network costs, by layer.")
def profile(
    study: StudyArgument = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 or auto.", show_default=False)
    ] = None,
    compatible: Annotated[
        bool,
        typer.Option("--compatible", help="Also by deeplite-profiler's formulas."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Print what a study's network costs, and what may become of each layer; nothing is trained.

    \b
    Examples:
      python -m autocompress.study profile my.toml
      python -m autocompress.study profile my.toml --json > profile.json
    """
    from dataclasses import asdict, replace

    from rich.table import Table

    from autocompress.compatible import compatible_profile
    from autocompress.latency import Deployment, LatencyMeter, describe
    from autocompress.naming import config_of, modules_of
    from autocompress.profiler import profile_model
    from autocompress.scope import bound_text, check_names, prospects
    from autocompress.sources import task_from_config
    from autocompress.task import check_outputs

    voice = Voice(json=json)
    config = config_of(study, {"run.device": device})
    deployment = Deployment.from_config(config.latency)
    task = task_from_config(config, modules_of(study))
    check_names(task.model, config.search)
    check_outputs(task)
    example = task.example()
    found = profile_model(task.model, example, latency=False)
    possible, left_alone = prospects(task.model, example, config.search)
    theirs = compatible_profile(task.model, example) if compatible else None
    try:
        found = replace(found, latency=LatencyMeter(task.model, example, deployment).reference)
    except ConfigError as error:
        voice.complain(str(error))
    if json:
        document = found.to_dict()
        for layer in document["layers"]:
            layer["may_become"] = list(possible.get(layer["name"], ()))
            layer["left_alone"] = left_alone.get(layer["name"])
        document["compatible"] = None if theirs is None else asdict(theirs)
        voice.document(document)
        return
    voice.say(_layers_table(found))
    voice.say(
        f"params {found.params / 1e6:.4f} M · size {found.size_bytes / 1e6:.3f} MB · "
        f"MACs {found.macs / 1e6:.2f} M · memory {found.memory_bytes / 1e6:.2f} MB"
    )
    if theirs is not None:
        voice.say(
            f"by deeplite-profiler's formulas: params {theirs.params_m:.4f} M · size "
            f"{theirs.size_mb:.4f} MB · MACs {theirs.macs_g:.4f} G · memory "
            f"{theirs.memory_mb:.4f} MB"
        )
    if (own := found.latency) is not None:
        voice.say(
            f"latency {own.median_ms:.3f} ms (interquartile range {own.iqr_ms:.3f} ms; "
            f"{describe(own)}, {own.runs} runs on {own.device})"
        )
    if found.uncounted:
        ops = ", ".join(f"{name} x{count}" for name, count in found.uncounted.items())
        voice.say(f"Not counted in the MACs: {ops}")
    table = Table("layer", "may become, or why it is left alone")
    for layer in found.layers:
        words = [*possible.get(layer.name, ()), left_alone.get(layer.name)]
        if layer.name in possible:
            words.append(bound_text(layer.name, config.search.bounds or ()))
        if any(words):
            table.add_row(layer.name, ", ".join(filter(None, words)))
    voice.say(table)
    if config.search.channels:
        voice.say(_channels_table(task.model, example, config.search))


def _layers_table(found: Profile) -> Table:
    """What each layer costs."""
    from rich.table import Table

    table = Table("layer", "kind", "params", "MACs", "activations (kB)")
    for layer in found.layers:
        table.add_row(
            layer.name,
            layer.kind,
            f"{layer.params:,}",
            f"{layer.macs:,}",
            f"{layer.activation_bytes / 1e3:,.1f}",
        )
    return table


def _channels_table(model: nn.Module, example: tuple[Tensor, ...], search: SearchConfig) -> Table:
    """The channel groups: through which layers they run, what may remain, or why they stay."""
    from rich.table import Table

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
    study: StudyArgument = None,
    storage: StorageOption = None,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Write a finished study's report again.

    \b
    Example:
      python -m autocompress.study report runs/quickstart
    """
    from json import loads

    from autocompress.naming import config_of, studies_of
    from autocompress.report import write_report
    from autocompress.store import folder_of

    config = config_of(study, {"run.storage": storage, "run.out": out})
    folder = folder_of(config)
    if not folder.result.exists():
        raise ConfigError(f"There is no result in {folder.path} yet; run the study to its end.")
    studies = studies_of(config)
    summary = loads(folder.result.read_text(encoding="utf-8"))
    write_report(summary, studies.get("exploration"), studies.get("annealing"), folder.report)
    voice = Voice(json=json)
    voice.document({"report": str(folder.report.resolve())})
    voice.say(f"{folder.report}")


@app.command(short_help="Write any trial's network.")
def export(
    study: StudyArgument = None,
    trial: Annotated[
        str, typer.Option(help="Which trial, e.g. annealing/7; best: the study's winner.")
    ] = "best",
    to: Annotated[str | None, typer.Option(help="The folder to write.", show_default=False)] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="onnx, onnx-fp16, pt2, torchscript, openvino, openvino-fp16, executorch, or all "
            "that can be written here; again, or with commas, for several. By default onnx, pt2.",
            show_default=False,
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Add an int8 ONNX file; reads the study's data.")
    ] = False,
    storage: StorageOption = None,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Write any trial's network as files that run elsewhere, each with a program that runs it.

    Every file is compared with the network on validation images.

    \b
    Examples:
      python -m autocompress.study export my.toml --trial annealing/7 --to small/
      python -m autocompress.study export runs/my --format onnx-fp16,openvino --int8
    """
    from dataclasses import asdict

    from autocompress.config import DEFAULT_FORMATS
    from autocompress.formats import choose_formats
    from autocompress.handout import quantizer_of, read_task, write_trial
    from autocompress.naming import config_of, modules_of, studies_of
    from autocompress.sources import load_transforms, task_from_config
    from autocompress.store import folder_of

    names = choose_formats(formats or DEFAULT_FORMATS)
    config = config_of(study, {"run.storage": storage, "run.out": out})
    modules = modules_of(study)
    load_transforms(config, modules)
    folder = folder_of(config)
    target = Path(to) if to is not None else folder.path / "exports" / trial.replace("/", "-")
    studies = studies_of(config)
    quantizer = None
    if int8:
        quantizer = quantizer_of(config, folder, task_from_config(config, modules))
    reading = read_task(config, studies, modules, say=complain)
    written = write_trial(
        folder, studies, trial, target, modules, quantizer, complain, names, reading
    )
    voice = Voice(json=json)
    voice.document({"folder": str(target.resolve()), **asdict(written)})
    for name, size in written.files.items():
        voice.say(f"{target / name}  {size / 1e6:.3f} MB")
    for name in (*written.scripts, "README.md"):
        voice.say(f"{target / name}")
    if written.checks:
        voice.say(f"Compared with PyTorch on {written.checked_with}.")
    for name, reason in written.skipped.items():
        complain(f"{name} was not written: {reason}")


@app.command(short_help="Show a study in optuna-dashboard.")
def dashboard(
    study: StudyArgument = None,
    port: Annotated[
        int | None, typer.Option(help="Port; a free one by default.", show_default=False)
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine reaches it.")
    ] = "127.0.0.1",
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open it in the browser.")
    ] = False,
    artifacts: Annotated[
        str | None,
        typer.Option(help="Where the study's artifacts are seen from here.", show_default=False),
    ] = None,
    storage: StorageOption = None,
    out: OutOption = None,
) -> None:
    """Show a study in optuna-dashboard; also while it runs, and from any machine. Ctrl-C ends it.

    With the database's URL alone, STUDY is the study's name; nothing else need be here. The URL is
    best given as AUTOCOMPRESS_STORAGE then, which no list of processes shows.

    \b
    Examples:
      python -m autocompress.study dashboard my.toml --open
      python -m autocompress.study dashboard mine --storage postgresql://me@host/studies
    """
    import warnings

    from autocompress.dashboard import LOOPBACK, artifact_place, find_artifacts, serve
    from autocompress.naming import begun_config, studies_of
    from autocompress.store import folder_of

    warnings.filterwarnings("ignore", module="optuna")
    voice = Voice()
    config = begun_config(study, storage, out)
    studies_of(config)
    folder = folder_of(config)
    url = folder.storage_url(config.run.storage)
    place = artifact_place(url, config.name)
    store = find_artifacts(place, folder.artifacts, artifacts)
    if store is None:
        voice.complain(
            f"The artifacts are in {place}, which is not on this machine; pages are without them. "
            "--artifacts says where they are seen from here."
        )
    if host not in LOOPBACK:
        voice.complain(
            f"Whoever reaches {host} can read and change the studies in this database, and delete "
            "them: there is no password."
        )
    serve(
        url,
        store,
        host,
        port,
        open_browser,
        lambda at: voice.say(f"{at}  (Ctrl-C ends it)"),
        config.name,
    )


@app.command(short_help="Explain the fields of a study file.")
def fields(
    pattern: Annotated[
        str, typer.Argument(help="Only fields with this in their name or description.")
    ] = "",
    json: JsonOption = False,
) -> None:
    """Explain the fields of a study file: type, default, what is allowed, and what it means.

    \b
    Examples:
      python -m autocompress.study fields finetune
      python -m autocompress.study fields "learning rate"
    """
    from dataclasses import asdict
    from textwrap import fill, indent

    from autocompress.fields import find_fields

    voice = Voice(json=json)
    found = find_fields(pattern)
    if not found:
        raise ConfigError(f"No field of a study file has '{pattern}' in its name or description.")
    voice.document({"fields": [asdict(field) for field in found]})
    for field in found:
        words = [field.type, field.allowed, field.default and f"default {field.default}"]
        voice.say(f"{field.name}  ({'; '.join(filter(None, words))})")
        voice.say(indent(fill(field.description, 76), "    "))


@models.command("list")
def list_networks(
    pattern: Annotated[str, typer.Argument(help="Only names with this in them.")] = "",
    json: JsonOption = False,
) -> None:
    """List the networks that a study file can name, and how far training takes some. (The default.)

    \b
    Examples:
      python -m autocompress.study models resnet
      python -m autocompress.study models list resnet --json
    """
    from rich.table import Table

    from autocompress.models import list_models
    from autocompress.recipes import recipe_table

    voice = Voice(json=json)
    known = {
        source: [name for name in names if pattern in name]
        for source, names in list_models().items()
    }
    recipes = list(recipe_table(known["zoo"]))
    voice.document(
        {
            "networks": known,
            "recipes": [
                {
                    "network": network,
                    "data": data,
                    "accuracy": recipe.accuracy,
                    "source": recipe.source,
                    "epochs": recipe.epochs,
                    "short_epochs": recipe.short_epochs,
                }
                for network, data, recipe in recipes
            ],
        }
    )
    for source, names in known.items():
        if names:
            voice.say(f"{source}:  " + ", ".join(names))
    table = Table("network", "data", "accuracy", "of", "epochs, short", box=None)
    for network, data, recipe in recipes:
        length = f"{recipe.epochs:g}, {recipe.short_epochs:g}"
        table.add_row(network, data, f"{recipe.accuracy:.2f} %", recipe.source, length)
    if table.row_count:
        voice.say("\nRecipes, and the accuracies in the literature that they are after:")
        voice.say(table)


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
        typer.Option(
            help="Another argument of the network, e.g. width=16.",
            metavar="KEY=VALUE",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes weights, split and order.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 or auto.", show_default=False)
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="A .safetensors file to write, too.", show_default=False)
    ] = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a network by its recipe, and keep it where studies look for their baseline.

    Ctrl-C ends it; the same command goes on from the last checkpoint. A study with the lines that
    are printed at the end doesn't train again; elsewhere give it the file: model.weights = FILE.

    \b
    Example:
      python -m autocompress.study models train resnet18 --data torchvision:CIFAR10 \\
          --to resnet18.safetensors
    """
    from autocompress.config import parse_pairs
    from autocompress.pretrain import pretrain, settings_of

    voice = Voice(quiet, verbose)
    if to is not None and not to.endswith(".safetensors"):
        raise ConfigError(f"--to {to}: give a file that ends in .safetensors.")
    own = parse_pairs(argument or (), "--argument", "width=16")
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
        with voice.hearing(), voice.display() as display:
            made = pretrain(config, display, Path.cwd())
    except KeyboardInterrupt:
        voice.complain("Interrupted. The same command goes on from the last checkpoint.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    expected = made.recipe.accuracy
    compare = "" if expected is None else f"; in the literature {expected:.2f} %, at full length"
    voice.say(
        f"{made.test_accuracy:.2f} % on test data, {made.val_accuracy:.2f} % on validation data"
        f"{compare}."
    )
    if to is not None:
        made.write(Path(to))
        voice.say(f"Written: {to}")
    voice.say(f"A study that begins so finds these weights:\n\n{made.study_lines()}")


def _number(workers: str | None) -> int | str | None:
    """What the study file would have: a number, or "auto"."""
    return int(workers) if workers is not None and workers.isdecimal() else workers


def _say_kept(config: StudyConfig, folder: StudyFolder, voice: Voice) -> None:
    from autocompress.naming import studies_of
    from autocompress.store import trials_spent

    try:
        ended = {name: len(trials_spent(study)) for name, study in studies_of(config).items()}
    except ConfigError:
        ended = {}
    counts = ", ".join(f"{count} of {name}" for name, count in ended.items()) or "no trial yet"
    text = f"Interrupted. Kept in {folder.path}: {counts}. The same command goes on from there."
    voice.complain(text)
    voice.document(
        {
            "error": text,
            "exit_code": EXIT_INTERRUPTED,
            "study": config.name,
            "folder": str(folder.path.resolve()),
            "trials": ended,
        }
    )


def _tell(text: str) -> None:
    """Say that an order was understood; the log has it too."""
    import logging

    from autocompress.logs import SHOWN

    logging.getLogger("autocompress").info(text, extra=SHOWN)
    complain(text)


def main() -> None:
    """Run the command line; errors of ours become one line and exit code 2."""
    as_json = wants_json(sys.argv[1:])
    try:
        # By itself it would print wrong usage as text alone, and exit.
        with documents_alone() if as_json else nullcontext():
            code = app(standalone_mode=not as_json)
    except AutocompressError as error:
        raise end_in_error(str(error), EXIT_ERROR, as_json) from None
    except USAGE_ERROR as error:
        raise end_in_error(error.format_message(), EXIT_ERROR, as_json) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            text = f"The disk is full: {error}. Make room; what was found is kept."
            raise end_in_error(text, EXIT_ERROR, as_json) from None
        if as_json:
            end_in_error(f"{type(error).__name__}: {error}", EXIT_BUG, as_json)
        raise
    raise SystemExit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
