"""Published architectures, each compressed by half: costs as predicted, trainable, exportable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autocompress.allocator import ALONE, Knobs, decode
from autocompress.formats import check_onnx, export_onnx
from autocompress.grouping import find_groups, removable
from autocompress.importance import build_ladders
from autocompress.layers import inspect_layers
from autocompress.models import build_model
from autocompress.observation import observe_layers
from autocompress.profiler import profile_model
from autocompress.sensitivity import build_table
from autocompress.space import SearchSpace
from autocompress.surgery import FactorCache, apply_plan
from autocompress.task import Task
from autocompress.training import fit
from autocompress.transforms import TRANSFORMS

FAST = {"zoo:resnet20": 32, "torchvision:shufflenet_v2_x0_5": 64}
SLOW = {
    "zoo:resnet18": 32,
    "torchvision:resnet18": 64,
    "torchvision:resnet50": 64,
    "torchvision:vgg11_bn": 64,
    "torchvision:alexnet": 96,
    "torchvision:densenet121": 64,
    "torchvision:googlenet": 64,
    "torchvision:inception_v3": 139,
    "torchvision:mobilenet_v2": 64,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:mnasnet0_5": 64,
    "torchvision:squeezenet1_1": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:regnet_y_400mf": 64,
    "torchvision:resnext50_32x4d": 64,
    "torchvision:convnext_tiny": 64,
    "torchvision:vit_b_16": 224,
    "timm:efficientnet_lite0": 64,
    "timm:ghostnet_100": 64,
    "timm:resnest14d": 64,
}
CASES = [
    *FAST.items(),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW.items()),
]


@pytest.mark.parametrize(("source", "size"), CASES)
def test_it_is_compressed_by_half(
    source: str, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch.manual_seed(0)
    model = build_model(source, {"num_classes": 10}, None)
    images = torch.randn(8, 3, size, size)
    loader = [(images, torch.arange(8) % 10)] * 2
    task = Task(model, loader, loader, loader)  # type: ignore[arg-type]
    example = task.example()
    layers, _ = inspect_layers(model, example)
    seen = observe_layers(model, task, layers, patches=64)
    cache = FactorCache(model, seen.patches)
    table = build_table(model, layers, cache, seen, tuple(TRANSFORMS))
    groups, refused = find_groups(model, example)
    groups = removable(groups, layers, {}, refused)
    assert groups, refused
    table = replace(table, ladders=build_ladders(model, task, groups, seen, "outputs"))
    before = profile_model(model, example, latency=False)
    for objective, budget, weight in (
        ("params", 0.5, ALONE),
        ("macs", 0.7, 0.0),
        ("params", 0.6, -ALONE),
    ):
        space = SearchSpace.from_table(table, objective, before.cost)
        here, picked = decode(space, Knobs(budget, channels=weight))
        small = apply_plan(model, here.plan(picked), cache)
        after = profile_model(small, example, latency=False)
        assert getattr(after, objective) == here.cost(picked)
        assert here.plan(picked).channels or weight == ALONE
        if weight > -ALONE:
            assert getattr(after, objective) <= budget * getattr(before, objective)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(small, example, path)
    check_onnx(path, small, images)
    result = fit(small, task, epochs=1, learning_rate=1e-4, seed=0, teacher=model, distillation=0.5)
    assert result.steps == 2
