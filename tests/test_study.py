"""The command line, from its help to the networks that it hands out."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from sqlite3 import connect
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import autocompress
from autocompress.fields import Field
from autocompress.naming import config_of
from autocompress.study import app, main

STUDY = """
name = "small"
delta = 40.0
[model]
source = "zoo:resnet_small"
arguments = { num_classes = 10, in_channels = 1, width = 8 }
[data]
source = "digits"
[baseline]
epochs = 3
[search]
transforms = ["svd", "tucker2"]
trials = 3
annealing_trials = 1
[finetune]
epochs = 1
final_epochs = 0
gate = 100.0
[run]
workers = 0
formats = []
"""


def call(*arguments: str) -> Result:
    """The command line in this process; its errors are raised."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The command line as a shell calls it: the line that it ends with, and exit code 2."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["autocompress", *arguments])
        main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return said.err


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study file of a study that has been run."""
    file = tmp_path_factory.mktemp("small") / "small.toml"
    file.write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOCOMPRESS_HOME", str(file.parent / "home"))
        ended = call("run", str(file), "--out", str(file.parent))
    assert ended.exit_code == 0, ended.output
    return file


def at(file: Path) -> list[str]:
    return [str(file), "--out", str(file.parent)]


def test_a_run_shows_before_and_after(small: Path) -> None:
    again = call("run", *at(small))
    assert again.exit_code == 0
    assert "Nothing to do" in again.output
    rows = {line.split()[0] for line in again.output.splitlines() if line.strip()}
    assert {"accuracy", "params", "size", "MACs", "memory", "latency"} <= rows


def test_run_is_the_default_command(small: Path) -> None:
    assert "Nothing to do" in call(*at(small)).output


def test_a_folder_runs_its_own_study(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small.parent)
    ended = call(str(small.parent / "small"))
    assert "Nothing to do" in ended.output
    assert not (small.parent / "runs").exists()


def test_status_says_how_far_it_is(small: Path) -> None:
    said = call("status", *at(small)).output
    assert re.search(r"exploration.*3/3", said) and re.search(r"annealing.*1/1", said)
    assert "Finished" in said and "x params, drop" in said


def test_status_is_that_of_the_last_run(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small.parent / "small", tmp_path / "small")
    stored = tmp_path / "small" / "study.json"
    settings = json.loads(stored.read_text())
    settings["search"] |= {"trials": 5, "annealing_trials": 2}
    stored.write_text(json.dumps(settings))
    said = call("status", str(small), "--out", str(tmp_path)).output
    assert re.search(r"exploration.*3/5", said) and "Not finished" in said
    settings["search"] |= {"trials": 3, "stage": "exploration"}
    stored.write_text(json.dumps(settings))
    assert "\nFinished" in call("status", str(small), "--out", str(tmp_path)).output


def test_a_studys_folder_stands_for_its_file(small: Path) -> None:
    assert "3/3" in call("status", str(small.parent / "small")).output


def test_a_folder_of_another_name_is_no_studys(
    capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path
) -> None:
    """There may be another study of the name beside it, whose trials are not in it."""
    renamed, link = tmp_path / "small-v1", tmp_path / "latest"
    shutil.copytree(small.parent / "small", renamed)
    for command in ("status", "report", "export"):
        said = fail(capsys, command, str(renamed))
        assert "small-v1 holds the study 'small'" in said and "Call it small again" in said
    link.symlink_to(small.parent / "small")
    assert "3/3" in call("status", str(link)).output


def test_profile_needs_no_training(small: Path) -> None:
    said = call("profile", str(small)).output
    assert "conv1" in said and "MACs" in said and "interquartile" in said
    assert re.search(r"params 0\.\d+ M", said) and "deeplite" not in said
    both = " ".join(call("profile", str(small), "--compatible").output.split())
    assert re.search(r"by deeplite-profiler's formulas: params 0\.\d{4} M · size 0\.\d{4} MB", both)
    assert "svd" in said and "excluded by default" in said
    assert "channels of" in said and "no layer reads its channels" in " ".join(said.split())


def test_report_is_written_again(small: Path) -> None:
    path = small.parent / "small" / "report.html"
    path.unlink()
    assert call("report", *at(small)).exit_code == 0
    assert "<html" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("trial", ["best", "exploration/0"])
def test_any_trial_is_handed_out(small: Path, tmp_path: Path, trial: str) -> None:
    done = call("export", *at(small), "--trial", trial, "--to", str(tmp_path / "it"))
    assert done.exit_code == 0
    names = {path.name for path in (tmp_path / "it").iterdir()}
    assert {"model.safetensors", "plan.json", "model.onnx", "model.pt2"} <= names
    assert json.loads((tmp_path / "it" / "profile.json").read_text())["score"] > 10
    model = autocompress.load(tmp_path / "it")
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_formats_are_asked_for_by_name(small: Path, tmp_path: Path) -> None:
    there = tmp_path / "it"
    done = call("export", *at(small), "--format", "onnx,onnx-fp16", "--to", str(there))
    assert done.exit_code == 0 and "Compared with PyTorch on 64 real inputs." in done.output
    names = {path.name for path in there.iterdir()}
    assert {"model.onnx", "model.fp16.onnx", "predict_onnx.py", "README.md"} <= names
    assert "model.pt2" not in names
    about = json.loads((there / "model.json").read_text())
    assert about["image"] == {"mode": "L", "resize": 8, "crop": [8, 8]}
    assert about["task"]["kind"] == "classification"
    # The study's own winner says the same of itself.
    own = json.loads((small.parent / "small" / "best" / "model.json").read_text())
    assert own == about


def test_formats_that_cannot_be_written_cost_nothing(
    capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path
) -> None:
    there = tmp_path / "it"
    said = fail(capsys, "export", *at(small), "--format", "onx", "--to", str(there))
    assert "Did you mean 'onnx'?" in said and not there.exists()


def test_files_are_compared_without_the_data_too(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("autocompress.handout.task_from_config", gone)
    done = call("export", *at(small), "--format", "onnx", "--to", str(tmp_path / "it"))
    assert done.exit_code == 0
    assert "the study's data can't be read" in done.stderr and "the disk is gone" in done.stderr
    assert "Compared with PyTorch on made-up inputs." in done.stdout
    # What the study knew is in its database.
    about = json.loads((tmp_path / "it" / "model.json").read_text())
    assert about["image"] == {"mode": "L", "resize": 8, "crop": [8, 8]}


def test_the_winner_has_a_model_card(small: Path) -> None:
    folder = small.parent / "small"
    result = json.loads((folder / "result.json").read_text())
    text = (folder / "best" / "README.md").read_text()
    assert f"{result['best']['test_score']:.2f} %" in text
    assert "Test data was read once by the study" in text
    assert "pipeline_tag: image-classification" in text


def test_a_trial_is_handed_out_in_int8(small: Path, tmp_path: Path) -> None:
    there = str(tmp_path / "it")
    done = call("export", *at(small), "--trial", "exploration/0", "--to", there, "--int8")
    assert done.exit_code == 0
    assert re.search(r"model\.int8\.onnx {2}0\.\d+ MB", done.stdout)
    assert re.search(r"int8 \(minmax\): [\d.]+ % on validation data", done.stderr)
    sizes = json.loads((tmp_path / "it" / "export.json").read_text())["files"]
    assert sizes["model.int8.onnx"] < sizes["model.onnx"]
    text = (tmp_path / "it" / "README.md").read_text()
    assert "`model.int8.onnx`" in text and "Test data was not read for this network" in text
    (output,) = autocompress.open_onnx(tmp_path / "it" / "model.int8.onnx")(torch.zeros(2, 1, 8, 8))
    assert output.shape == (2, 10)


def test_models_are_listed() -> None:
    said = call("models", "resnet20").output
    assert "resnet20" in said and "mobilenet" not in said


def test_help_teaches_by_examples() -> None:
    said = call("--help").output
    for word in (
        "run",
        "status",
        "profile",
        "report",
        "export",
        "dashboard",
        "models",
        "Exit codes",
    ):
        assert word in said
    for command in ("run", "status", "profile", "report", "export", "dashboard", "models"):
        assert "python -m autocompress.study" in call(command, "--help").output


def test_exit_code_3_where_nothing_met_delta(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(small.parent / "home"))
    file = tmp_path / "strict.toml"
    text = STUDY.replace("epochs = 1\n", "epochs = 0\n").replace(
        "delta = 40.0", "delta = 0.0\nconfidence = 0.5"
    )
    file.write_text(text.replace("[search]", '[search]\nexclude = ["fc", "*conv2"]'))
    ended = call(str(file), "--out", str(tmp_path), "--trials", "1")
    summary = json.loads((tmp_path / "small" / "result.json").read_text())
    assert ended.exit_code == 3, summary
    assert "The nearest lost" in ended.output and summary["nearest"]["val_drop"] > 0


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (("[search]", "[search]\ntrails = 3"), "Did you mean 'trials'?"),
        (("delta = 40.0", "delta = -1.0"), "delta = -1.0 must be >= 0 (points of"),
        (("trials = 3", 'trials = "many"'), "search.trials: expected a whole number"),
        (('"tucker2"', '"tuker2"'), "Did you mean 'tucker2'?"),
        (("zoo:resnet_small", "zoo:resnet_smal"), "Did you mean 'resnet_small'?"),
        (("zoo:resnet_small", "torchvision:resnet5"), "no such network"),
        (("num_classes = 10", "num_classes = 7"), "10 classes, the network has 7 outputs"),
        (("num_classes = 10", "classes = 10"), "unexpected keyword argument 'classes'"),
        (("in_channels = 1", "in_channels = 3"), "The network can't take this data"),
        (("in_channels = 1", "in_channels = 0"), "in_channels = 0 must be a whole number >= 1"),
        (
            ("[search]", '[search]\nexclude = ["con1"]'),
            "no layer matches 'con1'. Did you mean 'conv1'",
        ),
        (("[search]", '[search]\ninclude = ["layer1"]'), "give 'layer1.*'"),
        (('"digits"', '"folder:nowhere"'), "no such folder"),
        (('"digits"', '"array:nowhere.npz"'), "no such file"),
        (('"digits"', '"torchvision:CIFAR11"'), "Did you mean 'CIFAR1"),
        (("[data]", 'weights = "nowhere.pt"\n[data]'), "no such file"),
        (('name = "small"', 'name = "a/b"'), "letters, digits"),
        (("[search]", "[search"), "is not valid TOML"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: tuple[str, str], wanted: str
) -> None:
    assert change[0] in STUDY
    file = tmp_path / "wrong.toml"
    file.write_text(STUDY.replace(*change, 1))
    said = fail(capsys, str(file), "--out", str(tmp_path))
    assert wanted in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "small" / "study.db").exists()


def test_every_error_has_its_own_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(STUDY.replace("delta = 40.0", "delta = -1").replace("trials = 3", "trials = 0"))
    assert len(fail(capsys, str(file)).strip().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nowhere.toml"], "There is no study file 'nowhere.toml'"),
        (["quickstart", "--delta", "-1"], "delta = -1.0 must be >= 0"),
        (["quickstart", "--device", "cuda:99"], "can't be used here"),
        (["quickstart", "--storage", "nonsense"], "is no database URL"),
        (["status", "quickstart"], "has not begun"),
        (["report", "quickstart"], "no result"),
        (["export", "quickstart"], "has not begun"),
        (["dashboard", "quickstart"], "has not begun"),
        (
            ["quickstart", "--stage", "annealing"],
            "run search.stage = 'exploration' or 'both' first",
        ),
    ],
)
def test_wrong_arguments_are_named(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert wanted in fail(capsys, *arguments)


def test_a_trial_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], small: Path
) -> None:
    said = fail(capsys, "export", *at(small), "--trial", "exploration/99")
    assert "There is no trial 'exploration/99'. Known: best, exploration/0 to 2" in said


def test_no_password_reaches_a_file(
    capsys: pytest.CaptureFixture[str], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autocompress import conductor

    real = conductor.open_storage
    database = small.parent / "elsewhere.db"
    url = "postgresql://me:s3cret'\\@host/studies"
    opened: list[str] = []

    def open_storage(given: str) -> Any:
        opened.append(given)
        return real(f"sqlite:///{database}")

    monkeypatch.setattr(conductor, "open_storage", open_storage)
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(small.parent / "home"))
    # As the program is when it has been started anew.
    monkeypatch.setenv("AUTOCOMPRESS_STORAGE", url)
    shown, out = url.replace("s3cret'\\", "***"), small.parent / "hidden"
    command = ["run", str(small), "--storage", shown, "--out", str(out), "--trials", "1"]
    monkeypatch.setattr(sys, "argv", ["study", *command])
    ended = call(*command)
    assert ended.exit_code == 0 and set(opened) == {url}
    written = [path for path in out.rglob("*") if path.suffix in (".json", ".html", ".log")]
    assert len(written) > 5
    for path in written:
        assert "s3cret" not in path.read_text(encoding="utf-8"), path
    assert "me:***@host" in (out / "small" / "report.html").read_text(encoding="utf-8")
    assert config_of(str(out / "small"), {}).run.storage == url
    monkeypatch.delenv("AUTOCOMPRESS_STORAGE")
    assert "give --storage" in fail(capsys, "status", str(out / "small"))


def test_an_interrupted_run_says_what_it_kept(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autocompress.conductor.run_study", interrupted)
    ended = call(*at(small))
    assert ended.exit_code == 130
    assert "3 of exploration, 1 of annealing" in ended.output


HEAVY = ("torch", "optuna", "sqlalchemy", "numpy", "pydantic", "rich")
"""What takes longer to import than help may take to appear."""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_waits_for_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('LOADED', [m for m in {HEAVY} if m in sys.modules]))\n"
        f"sys.argv = ['autocompress', *{arguments}]\n"
        "from autocompress.study import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"
    assert len(done.stdout.splitlines()) > 1


def test_status_does_not_wait_for_torch(small: Path) -> None:
    code = (
        "import sys\n"
        "from autocompress.study import app\n"
        f"app(['status', *{at(small)}], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def document(result: Result) -> dict[str, Any]:
    """What is on standard output: one JSON document and nothing else."""
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def documented(command: str) -> str:
    """What the page on commands says of a command's JSON."""
    page = Path(__file__).resolve().parent.parent / "docs" / "reference-commands.md"
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"\*\*{command}\*\*: (.*?)\n\n", text, flags=re.DOTALL)
    assert found is not None
    return found.group(1)


def test_a_run_ends_in_one_document(small: Path) -> None:
    ended = call("run", *at(small), "--json")
    found = document(ended)
    assert ended.exit_code == found["exit_code"] == 0 and found["met"]
    assert "Nothing to do" in ended.stderr
    assert found["best"]["val_drop"] <= 40 and found["trials"]["exploration"] == 3
    rows = {row["metric"]: row for row in found["comparison"]}
    assert rows["params"]["ratio"] == pytest.approx(
        rows["params"]["before"] / rows["params"]["after"]
    )
    for key in ("result", "report", "network"):
        assert Path(found[key]).exists()
    for key in (*found, *found["best"]):
        assert f"`{key}`" in documented("run"), key


def test_a_status_ends_in_one_document(small: Path) -> None:
    found = document(call("status", *at(small), "--json"))
    assert found["state"] == "finished" and found["stages"]["annealing"]["ended"] == 1
    assert found["best"]["ratios"]["params"] > 1
    inner = (*found["stages"]["exploration"], *found["best"])
    for key in (*found, *inner):
        assert f"`{key}`" in documented("status"), key


def test_other_commands_end_in_one_document_too(small: Path) -> None:
    profile = document(call("profile", str(small), "--json", "--compatible"))
    assert profile["macs"] == sum(layer["macs"] for layer in profile["layers"])
    layers = {layer["name"]: layer for layer in profile["layers"]}
    assert layers["conv1"]["left_alone"] and layers["layer1.0.conv1"]["may_become"]
    assert profile["compatible"]["params_m"] > 0 and profile["latency"]["median_ms"] > 0
    assert Path(document(call("report", *at(small), "--json"))["report"]).exists()
    listed = document(call("models", "list", "resnet20", "--json"))
    assert listed["networks"]["zoo"] == ["resnet20"] and listed["recipes"]
    fields = document(call("fields", "search.trials", "--json"))["fields"]
    assert fields[0]["default"] == "30"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere.toml", "--json"], 2),
        (["run", "--json", "--no-such-option"], 2),
        (["run", "--trials", "many", "--json"], 2),
        (["status", "quickstart", "--json"], 2),
    ],
)
def test_an_error_is_a_document_and_a_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["autocompress", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert ended.value.code == found["exit_code"] == code
    assert found["error"] and found["error"] in " ".join(said.err.split())


def test_a_fault_of_ours_is_a_document_and_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise LookupError("a fault")

    monkeypatch.setattr("autocompress.fields.find_fields", broken)
    monkeypatch.setattr(sys, "argv", ["autocompress", "fields", "--json"])
    with pytest.raises(LookupError):
        main()
    assert json.loads(capsys.readouterr().out) == {"error": "LookupError: a fault", "exit_code": 1}


def test_what_else_is_printed_is_no_part_of_the_document(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def talkative(_: str) -> list[Any]:
        print("a function of the user's own")
        return [Field("delta", "number", "1.0", "", "the largest drop", False)]

    monkeypatch.setattr("autocompress.fields.find_fields", talkative)
    monkeypatch.setattr(sys, "argv", ["autocompress", "fields", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 0 and json.loads(said.out)["fields"][0]["name"] == "delta"
    assert said.err == "a function of the user's own\n"


def test_a_full_disk_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "table.json")

    monkeypatch.setattr("autocompress.fields.find_fields", full)
    said = fail(capsys, "fields")
    assert "The disk is full" in said and "table.json" in said and "Make room" in said


def test_quiet_leaves_the_result(small: Path) -> None:
    ended = call("run", *at(small), "--quiet")
    assert "Nothing to do" not in ended.output
    assert "accuracy" in ended.stdout and "Everything is in" in ended.stdout
    assert "Nothing to do" in (small.parent / "small" / "study.log").read_text()


def test_verbose_shows_what_only_the_log_has(small: Path) -> None:
    import logging
    import warnings

    from autocompress.voice import Voice

    with pytest.MonkeyPatch.context() as patch:
        heard: list[str] = []
        patch.setattr("autocompress.voice.complain", heard.append)
        for verbose in (False, True):
            with warnings.catch_warnings(record=True) as shown, Voice(verbose=verbose).hearing():
                warnings.simplefilter("always")
                warnings.warn("of a library", UserWarning, stacklevel=1)
                logging.getLogger("autocompress").debug("a worker's line")
                logging.getLogger("autocompress").info("on the screen", extra={"shown": True})
            assert len(shown) == verbose
    assert heard == ["a worker's line"]


def test_the_log_begins_with_command_versions_and_settings(small: Path) -> None:
    text = (small.parent / "small" / "study.log").read_text()
    for word in ("Command: python -m autocompress.study", "torch 2.", "finetune.gate = 100.0"):
        assert word in text


def test_fields_are_explained() -> None:
    said = call("fields", "finetune.epochs").output
    assert 'number, or "auto"' in said and "probe" in said
    with pytest.raises(autocompress.AutocompressError, match="No field"):
        call("fields", "nonsense")


def test_the_version_is_printed() -> None:
    assert call("--version").output.strip() == f"autocompress {autocompress.__version__}"


def test_a_database_alone_tells_how_far_a_study_is(small: Path, tmp_path: Path) -> None:
    database = tmp_path / "only.db"
    with closing(connect(small.parent / "small" / "study.db")) as old:
        with closing(connect(database)) as new:  # what is in its write-ahead log, too
            old.backup(new)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        arguments = ["--storage", f"sqlite:///{database}", "--out", str(tmp_path)]
        said = call("status", "small", *arguments).output
    assert re.search(r"exploration.*3/3", said) and "Finished: sqlite:///" in said


def test_a_folder_finds_the_modules_beside_its_study_file(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(small.parent / "home"))
    place = tmp_path / "mine"
    place.mkdir()
    (place / "mynets_for_a_folder.py").write_text(
        "from autocompress.zoo import ZOO\n"
        "def net(**arguments):\n"
        "    return ZOO['resnet_small'](**arguments)\n"
    )
    file = place / "own.toml"
    text = STUDY.replace("zoo:resnet_small", "mynets_for_a_folder:net").replace("small", "own", 1)
    file.write_text(text.replace("annealing_trials = 1", "annealing_trials = 0"))
    assert call("run", str(file), "--out", str(tmp_path), "--trials", "1").exit_code == 0
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(place)])
    monkeypatch.delitem(sys.modules, "mynets_for_a_folder", raising=False)
    monkeypatch.chdir(tmp_path)
    assert "Nothing to do" in call("run", str(tmp_path / "own")).output
