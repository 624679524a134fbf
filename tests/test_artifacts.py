"""Where files are kept: a folder, or a bucket of a real S3 server on this machine."""

from __future__ import annotations

import io
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
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
    write_text,
)
from autocompress.checkpoint import Checkpoint
from autocompress.errors import ConfigError, DamagedArtifact
from autocompress.weights import (
    fetch_weights,
    portable_state,
    save_weights,
    state_digest,
    write_weights,
)

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


@pytest.mark.parametrize("place", [0.05, 0.2, 0.5, 0.99])
def test_a_bit_of_weights_that_flips_is_seen(store: ArtifactStore, place: float) -> None:
    study = optuna.create_study()
    kept = save_weights(TinyNet(), study, store)
    flipped = bytearray(read(kept, store))
    flipped[int(place * len(flipped))] ^= 1
    rewrite(kept, store, bytes(flipped))
    with pytest.raises(DamagedArtifact, match=f"{kept} can't be read.* from a copy"):
        fetch_weights(kept, store)


def test_weights_without_a_digest_are_read(store: ArtifactStore, tmp_path: Path) -> None:
    state = portable_state(TinyNet())
    write_weights(tmp_path / "old.safetensors", state)
    found = fetch_weights(put_file(tmp_path / "old.safetensors", store), store)
    assert state_digest(found) == state_digest(state)


@pytest.mark.parametrize("name", ["../study.db", "/etc/passwd", "a/b", ""])
def test_a_name_that_a_database_makes_up_is_no_path(store: ArtifactStore, name: str) -> None:
    with pytest.raises(DamagedArtifact, match="is no artifact's id"):
        fetch_text(name, store)
    remove_artifact(name, store)


def test_a_bucket_that_is_lost_is_as_a_full_disk(s3: str, tmp_path: Path) -> None:
    boto3 = pytest.importorskip("boto3")
    boto3.client("s3").create_bucket(Bucket="short-lived")
    store = open_artifacts("s3://short-lived")
    (tmp_path / "a").write_bytes(b"abc")
    kept = put_file(tmp_path / "a", store)
    store.remove(kept)
    boto3.client("s3").delete_bucket(Bucket="short-lived")
    with pytest.raises(OSError, match="NoSuchBucket"):
        put_file(tmp_path / "a", store)
    # A checkpoint that can't be kept costs nothing.
    Checkpoint(lambda path: print(put_file(path, store)), lambda _: False).save({}, {})
    with pytest.raises(DamagedArtifact, match="not there any more"):
        fetch_text(kept, store)
    remove_artifact(kept, store)


def test_files_may_be_read_by_whom_the_user_lets(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text(tmp_path / "a.json", "{}")
    kept = save_weights(TinyNet(), optuna.create_study(), FolderStore(tmp_path))
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "a.json", kept)}
    assert len(modes) == 1


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    class Interrupted(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FolderStore(tmp_path).write("an-artifact", Interrupted())
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "\ud800")
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_all_that_is_written_to_a_full_disk(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, study, store = torch.nn.Linear(200, 200), optuna.create_study(), FolderStore(small_disk)
    kept = save_weights(TinyNet(), study, store)
    before = list(small_disk.iterdir())
    calls: list[Callable[[], object]] = [
        lambda: save_weights(large, study, store),
        lambda: write_weights(small_disk / "w", portable_state(large)),
        lambda: write_text(small_disk / "a", "x" * 100_000),
    ]
    for call in calls:
        with pytest.raises(OSError, match="No space left"):
            call()
        assert list(small_disk.iterdir()) == before
    # The disk for temporary files counts, too.
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with pytest.raises(OSError, match="No space left"):
        save_weights(large, study, FolderStore(tmp_path / "roomy"))
    monkeypatch.undo()
    assert fetch_weights(kept, store).keys() == TinyNet().state_dict().keys()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("s3://nowhere", "can't be written and read: "),
        ("s3://weights/and/more", "give a bucket and nothing else"),
        ("s3://", "give a bucket and nothing else"),
        ("/proc/nowhere", "can't be written and read: "),
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
