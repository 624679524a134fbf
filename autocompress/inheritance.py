"""A child network that starts from its parent's fine-tuned weights instead of the baseline's."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from autocompress.channels import mute_channels, remove_channels, restore_channels
from autocompress.models import load_state
from autocompress.observation import Observations
from autocompress.plan import Plan
from autocompress.surgery import FactorCache, apply_plan, dense_weight


def multiply_out(parent: nn.Module, plan: Plan, baseline: nn.Module) -> nn.Module:
    """The baseline's architecture with the parent's weights, factored layers multiplied out.

    Channels that the parent lacks are made with the baseline's weights, and nobody weighs them.

    Args:
        parent: The compressed network of `plan`.
        plan: What was done to it.
        baseline: Gives the architecture; not edited.
    """
    channels = list(plan.channels.values())
    dense = remove_channels(baseline, channels) if channels else deepcopy(baseline)
    originals = dict(dense.named_modules())
    replaced = {name: parent.get_submodule(name) for name in plan.layers}
    inside = tuple(f"{name}." for name in replaced)
    kept = {k: v for k, v in parent.state_dict().items() if not k.startswith(inside)}
    load_state(dense, kept, strict=False)
    with torch.no_grad():
        for name, replacement in replaced.items():
            original = originals[name]
            weight = original.get_parameter("weight")
            weight.copy_(dense_weight(replacement, original))
            bias = _last_bias(replacement)
            if bias is not None:
                original.get_parameter("bias").copy_(bias)
    if not channels:
        return dense
    return restore_channels(dense, mute_channels(baseline, channels), channels)


class Elder:
    """A fine-tuned network whose children begin with its weights.

    Args:
        model: The network; it stays as it is.
        plan: What was done to it.
        baseline: Gives the architecture; not edited.
        observations: Real inputs of the layers, by which they are cut; None for none.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        baseline: nn.Module,
        observations: Observations | None,
    ) -> None:
        self.model, self.plan = model, plan
        self._dense = multiply_out(model, plan, baseline)
        self._cache = (
            FactorCache(self._dense)
            if observations is None
            else observations.factor_cache(self._dense)
        )

    def child(self, plan: Plan) -> nn.Module:
        """The network of `plan` with the elder's weights.

        A layer with the elder's transform, rank and channels is taken over as it is; any other is
        multiplied out to a dense kernel and cut anew.
        """
        same = {
            name: self.model.get_submodule(name)
            for name, transform in plan.layers.items()
            if self.plan.layers.get(name) == transform
            and _channels_of(plan, name) == _channels_of(self.plan, name)
        }
        return apply_plan(self._dense, plan, self._cache, same)


def _channels_of(plan: Plan, layer: str) -> dict[tuple[str, str], tuple[int, ...]]:
    """The channels that a plan keeps in one layer, by group and side."""
    return {
        (name, member.side): part.kept
        for name, part in plan.channels.items()
        for member in part.group.members
        if member.layer == layer
    }


def _last_bias(replacement: nn.Module) -> Tensor | None:
    """The bias of a replacement, which its last layer carries."""
    biases = [p for key, p in replacement.named_parameters() if key.split(".")[-1] == "bias"]
    return biases[-1] if biases else None
