"""Files that outlive the process: weights and texts, in Optuna's artifact store or a folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from optuna.artifacts import FileSystemArtifactStore, download_artifact, upload_artifact
from optuna.study import Study
from optuna.trial import Trial
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_weights(model: nn.Module, owner: Trial | Study, store: FileSystemArtifactStore) -> str:
    """Upload a network's weights as safetensors; returns the artifact's id."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(portable_state(model), path)
        return upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=owner)


def save_text(text: str, name: str, trial: Trial, store: FileSystemArtifactStore) -> str:
    """Upload a text as a file of that name; returns the artifact's id."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(text, encoding="utf-8")
        return upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=trial)


def fetch_weights(artifact_id: str, store: FileSystemArtifactStore) -> dict[str, Tensor]:
    """Download weights that `save_weights` uploaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        download_artifact(artifact_store=store, artifact_id=artifact_id, file_path=str(path))
        return load_file(path)


def portable_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, every tensor contiguous and in memory of its own."""
    return {
        key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()
    }


def state_digest(state: Mapping[str, Tensor]) -> str:
    """12 hex digits that identify weights."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(name, path)


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors, beside and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(dict(state), beside)
    os.replace(beside, path)
