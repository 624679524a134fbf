"""Files that outlive the process: weights and texts, in Optuna's artifact store or a folder."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from optuna.artifacts import (
    Boto3ArtifactStore,
    FileSystemArtifactStore,
    download_artifact,
    upload_artifact,
)
from optuna.artifacts._protocol import ArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.study import Study
from optuna.trial import Trial

from autocompress.errors import ConfigError, DamagedArtifact

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_S3 = "s3://"
PROBE = b"autocompress"
"""What is written and read to see whether a place can be used."""


class FolderStore(FileSystemArtifactStore):
    """Optuna's folder of artifacts, in which none is ever half there.

    Args:
        folder: Where they are; it is made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write beside, then rename; an error leaves nothing behind."""
        with replacing(self._get_filepath(artifact_id)) as beside, beside.open("xb") as file:
            shutil.copyfileobj(content_body, file)
            file.flush()
            os.fsync(file.fileno())


class BucketStore(Boto3ArtifactStore):
    """Optuna's bucket of artifacts, whose errors are those of a disk.

    A bucket that can't be reached costs what a folder does that can't be written then: a checkpoint
    is left out, and what is to be removed stays.
    """

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """All of the artifact, so that a connection that is lost on the way is an error here."""
        with _as_disk_errors(), super().open_reader(artifact_id) as body:
            return io.BytesIO(body.read())

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Upload it; S3 shows all of an object or nothing."""
        with _as_disk_errors():
            super().write(artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        """Remove it; one that is gone is no error."""
        with _as_disk_errors():
            super().remove(artifact_id)


@contextmanager
def _as_disk_errors() -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def open_artifacts(place: str, writes: bool = True) -> ArtifactStore:
    """The artifact store at a place.

    Args:
        place: A folder, or "s3://bucket". boto3 finds credentials and an endpoint of one's own in
            its usual files and variables (`AWS_ENDPOINT_URL`).
        writes: Whether it is to be written, which is tried then.

    Raises:
        ConfigError: If it can't be written and read.
    """
    try:
        store = _s3(place) if place.startswith(_S3) else FolderStore(Path(place).expanduser())
        if not writes:
            return store
        artifact_id = str(uuid4())
        store.write(artifact_id, io.BytesIO(PROBE))
        with store.open_reader(artifact_id) as reader:
            found = reader.read()
        store.remove(artifact_id)
        if found != PROBE:
            raise OSError(errno.EIO, "what was written is not what is read")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"run.artifacts = '{place}' can't be written and read: {error}. Give a folder, or a "
            "bucket that there is and may be written: s3://BUCKET."
        ) from error
    return store


def _s3(place: str) -> ArtifactStore:
    bucket, _, prefix = place.removeprefix(_S3).strip("/").partition("/")
    if not bucket or prefix:
        raise ConfigError(
            f"run.artifacts = '{place}': give a bucket and nothing else, s3://BUCKET; the names in "
            "it are unique already."
        )
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise ConfigError(
            f"run.artifacts = '{place}' needs boto3: pip install 'autocompress[s3]'."
        ) from error
    # One that is away for a moment is asked again, up to eight times.
    retries: Any = {"mode": "standard", "max_attempts": 8}
    with _as_disk_errors():
        return BucketStore(bucket, boto3.client("s3", config=Config(retries=retries)))


def save_text(text: str, name: str, owner: Trial | Study, store: ArtifactStore) -> str:
    """Upload a text as a file of that name; returns the artifact's id."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(text, encoding="utf-8")
        return upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=owner)


def put_file(path: Path, store: ArtifactStore) -> str:
    """Store a file that no study or trial lists; returns its id."""
    artifact_id = str(uuid4())
    with path.open("rb") as file:
        store.write(artifact_id, file)
    return artifact_id


def fetch_text(artifact_id: str, store: ArtifactStore) -> str:
    """Download a text that `save_text` uploaded.

    Raises:
        DamagedArtifact: If it is not there or can't be read.
    """
    with fetched(artifact_id, store) as path:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DamagedArtifact(
                f"Artifact {artifact_id} is no text ({error}); put it back from a copy."
            ) from error


def fetch_file(artifact_id: str, path: Path, store: ArtifactStore) -> None:
    """Download a file that `put_file` stored.

    Raises:
        DamagedArtifact: If it is not there.
    """
    with fetched(artifact_id, store) as found:
        shutil.move(found, path)


def remove_artifact(artifact_id: str | None, store: ArtifactStore) -> None:
    """Remove an artifact; what is gone already, or None, is fine."""
    if artifact_id is not None and _ID.fullmatch(artifact_id):
        with suppress(ArtifactNotFound, OSError):
            store.remove(artifact_id)


@contextmanager
def fetched(artifact_id: str, store: ArtifactStore) -> Iterator[Path]:
    """A temporary file with what the artifact holds."""
    if not _ID.fullmatch(artifact_id):
        # It comes from a database, and becomes a part of a path.
        raise DamagedArtifact(f"{artifact_id!r} is no artifact's id.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact"
        try:
            download_artifact(artifact_store=store, artifact_id=artifact_id, file_path=str(path))
        except ArtifactNotFound as error:
            raise DamagedArtifact(
                f"Artifact {artifact_id} is not there any more; put it back from a copy."
            ) from error
        yield path


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never half of one."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside another, for a file that takes its place at the end of the block.

    After an error nothing of it is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
