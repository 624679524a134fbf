"""Weights as files: safetensors, in the artifact store or a folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from optuna.artifacts import upload_artifact
from optuna.artifacts._protocol import ArtifactStore
from optuna.study import Study
from optuna.trial import Trial
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autocompress.artifacts import fetched
from autocompress.errors import DamagedArtifact


def save_weights(model: nn.Module, owner: Trial | Study, store: ArtifactStore) -> str:
    """Upload a network's weights as safetensors; returns the artifact's id."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(portable_state(model), path)
        return upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=owner)


def fetch_weights(artifact_id: str, store: ArtifactStore) -> dict[str, Tensor]:
    """Download weights that `save_weights` uploaded.

    Raises:
        DamagedArtifact: If they are not there or can't be read.
    """
    with fetched(artifact_id, store) as path:
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise DamagedArtifact(
                f"The weights in artifact {artifact_id} can't be read ({error})."
            ) from error


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


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors, beside and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(dict(state), beside)
    os.replace(beside, path)
