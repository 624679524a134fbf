from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress.formats import export_onnx, quick_onnx
from autocompress.runtime import open_onnx, open_openvino

IMAGES = torch.randn(3, 4, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(6 * 20 * 20, 5)).eval()


@pytest.fixture(scope="module")
def file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "network.onnx"
    export_onnx(network, (IMAGES,), path)
    return path


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_file_and_its_content_compute_what_the_network_does(
    network: nn.Module, file: Path, name: str
) -> None:
    pytest.importorskip(name)
    opened = open_onnx if name == "onnxruntime" else open_openvino
    with torch.no_grad():
        expected = network(IMAGES)
    for source in (file, file.read_bytes(), quick_onnx(network, (IMAGES,))):
        (output,) = opened(source, threads=1)(IMAGES)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
