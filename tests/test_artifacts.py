"""Where files are kept: a folder, or a bucket of a real S3 server on this machine."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import torch
from conftest import TinyNet
from optuna.artifacts._protocol import ArtifactStore

from autocompress.artifacts import (
    FolderStore,
    fetch_file,
    fetch_text,
    open_artifacts,
    put_file,
    remove_artifact,
    save_text,
)
from autocompress.errors import ConfigError, DamagedArtifact
from autocompress.weights import fetch_weights, save_weights

BUCKET = "s3://weights"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A server, with a bucket; boto3 finds it by its own variables."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "tester")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="weights")
        yield BUCKET
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    place = str(tmp_path / "artifacts") if request.param == "folder" else BUCKET
    if request.param == "s3":
        request.getfixturevalue("s3")
    return open_artifacts(place)


def rewrite(artifact_id: str, store: ArtifactStore, content: bytes) -> None:
    store.write(artifact_id, io.BytesIO(content))


def read(artifact_id: str, store: ArtifactStore) -> bytes:
    with store.open_reader(artifact_id) as file:
        return file.read()


def test_weights_and_texts_come_back(store: ArtifactStore) -> None:
    study, model = optuna.create_study(), TinyNet()
    found = fetch_weights(save_weights(model, study, store), store)
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    assert fetch_text(save_text("ä plan", "plan.json", study.ask(), store), store) == "ä plan"


def test_files_that_no_trial_lists(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    kept = put_file(tmp_path / "a", store)
    fetch_file(kept, tmp_path / "b", store)
    assert (tmp_path / "b").read_bytes() == b"abc"
    remove_artifact(kept, store)
    remove_artifact(kept, store)
    remove_artifact(None, store)
    with pytest.raises(DamagedArtifact, match="not there any more"):
        fetch_file(kept, tmp_path / "b", store)


@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.99])
def test_truncated_weights_are_seen(store: ArtifactStore, part: float) -> None:
    study = optuna.create_study()
    kept = save_weights(TinyNet(), study, store)
    whole = read(kept, store)
    rewrite(kept, store, whole[: int(part * len(whole))])
    with pytest.raises(DamagedArtifact, match=f"{kept} can't be read"):
        fetch_weights(kept, store)


@pytest.mark.parametrize("name", ["../study.db", "/etc/passwd", "a/b", ""])
def test_a_name_that_a_database_makes_up_is_no_path(store: ArtifactStore, name: str) -> None:
    with pytest.raises(DamagedArtifact, match="is no artifact's id"):
        fetch_text(name, store)
    remove_artifact(name, store)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    class Interrupted(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FolderStore(tmp_path).write("an-artifact", Interrupted())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """The limit on the size of files stands for the disk."""
    code = """
import io, resource, signal, sys
from pathlib import Path
from autocompress.artifacts import FolderStore
store = FolderStore(Path(sys.argv[1]))
store.write("small", io.BytesIO(b"small"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    store.write("small", io.BytesIO(bytes(100_000)))
except OSError as error:
    print(type(error).__name__, error.errno)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("OSError")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert (tmp_path / "small").read_bytes() == b"small"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 10_000


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("s3://nowhere", "can't be written: "),
        ("s3://weights/and/more", "give a bucket and nothing else"),
        ("s3://", "give a bucket and nothing else"),
        ("/proc/nowhere", "can't be written: "),
    ],
)
def test_a_place_that_can_not_be_written_is_refused_at_once(
    place: str, words: str, s3: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        open_artifacts(place)


def test_a_missing_boto3_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"pip install 'autocompress\[s3\]'"):
        open_artifacts(BUCKET)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY") != "unset"
