"""How published checkpoints name the layers that our networks have."""

from __future__ import annotations

import re
from collections.abc import Iterable

WRAPPERS = ("net", "state_dict", "model_state_dict", "model")
"""Keys under which checkpoints keep the weights; "net" is kuangliu's."""

_STAGES = tuple((rf"^conv{stage + 1}_x\.", f"layer{stage}.") for stage in (1, 2, 3, 4))

RENAMINGS: dict[str, tuple[tuple[str, str], ...]] = {
    # kuangliu/pytorch-cifar, and what was made from it, for networks named as torchvision's.
    "kuangliu": ((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc.")),
    # chenyaofo/pytorch-cifar-models: CIFAR ResNets named as torchvision's (shortcut B).
    "chenyaofo": ((r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear.")),
    # weiaicunzai/pytorch-cifar100: ResNets of nested sequences, of basic blocks (two convolutions)
    # or bottlenecks (three).
    "weiaicunzai": (
        (r"^conv1\.0\.", "conv1."),
        (r"^conv1\.1\.", "bn1."),
        *_STAGES,
        (r"\.residual_function\.0\.", ".conv1."),
        (r"\.residual_function\.1\.", ".bn1."),
        (r"\.residual_function\.3\.", ".conv2."),
        (r"\.residual_function\.4\.", ".bn2."),
        (r"\.residual_function\.6\.", ".conv3."),
        (r"\.residual_function\.7\.", ".bn3."),
        (r"\.shortcut\.", ".downsample."),
    ),
}
"""By whose code: patterns in the names of a checkpoint, and what stands there in ours."""


def translate(names: Iterable[str], own: Iterable[str]) -> dict[str, str]:
    """What each name of a checkpoint is in the network, where a known layout explains all of them.

    Args:
        names: The names in the checkpoint.
        own: The network's.

    Returns:
        Our name for each; the names as they are where no layout fits, so that what is missing can
        be told.
    """
    names, own = list(names), set(own)
    for renaming in RENAMINGS.values():
        ours = [_renamed(name, renaming) for name in names]
        if set(ours) <= own and len(set(ours)) == len(ours):
            return dict(zip(names, ours, strict=True))
    return {name: name for name in names}


def _renamed(name: str, renaming: Iterable[tuple[str, str]]) -> str:
    for pattern, ours in renaming:
        name = re.sub(pattern, ours, name)
    return name
