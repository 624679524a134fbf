"""Weights as files: safetensors, in the artifact store or a folder."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from optuna.artifacts import upload_artifact
from optuna.artifacts._protocol import ArtifactStore
from optuna.study import Study
from optuna.trial import Trial
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from autocompress.artifacts import fetched, replacing
from autocompress.errors import DamagedArtifact
from autocompress.models import portable_state

DIGEST = "digest"
"""Where a file of weights keeps their digest: a bit that flips is no error for safetensors."""


def save_weights(model: nn.Module, owner: Trial | Study, store: ArtifactStore) -> str:
    """Upload a network's weights as safetensors; returns the artifact's id."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        state = portable_state(model)
        path.write_bytes(save(state, {DIGEST: state_digest(state)}))
        return upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=owner)


def fetch_weights(artifact_id: str, store: ArtifactStore) -> dict[str, Tensor]:
    """Download weights that `save_weights` uploaded.

    Raises:
        DamagedArtifact: If they are not there, can't be read, or are not those that were uploaded.
    """
    damaged = f"The weights in artifact {artifact_id} can't be read"
    cure = "put them back from a copy."
    with fetched(artifact_id, store) as path:
        try:
            with safe_open(path, "pt") as file:
                digest = (file.metadata() or {}).get(DIGEST)
            state = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise DamagedArtifact(f"{damaged} ({error}); {cure}") from error
    # Weights that were kept before there were digests have none.
    if digest not in (None, state_digest(state)):
        raise DamagedArtifact(f"{damaged} (their digest is another); {cure}")
    return state


def state_digest(state: Mapping[str, Tensor]) -> str:
    """12 hex digits that identify weights."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def write_weights(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict as safetensors, beside and then renamed."""
    with replacing(path) as beside:
        # By Python: safetensors has an error of its own for a full disk.
        beside.write_bytes(save(dict(state), dict(metadata or {}) or None))
