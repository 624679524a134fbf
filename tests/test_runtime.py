from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress.errors import ConfigError
from autocompress.export import export_onnx
from autocompress.runtime import compare_onnx_latency, open_onnx

IMAGES = torch.randn(3, 4, 24, 24, generator=torch.Generator().manual_seed(0))


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(4, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(width * 20 * 20, 5)).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    paths = folder / "wide.onnx", folder / "narrow.onnx"
    for width, path in zip((128, 4), paths, strict=True):
        export_onnx(network(width), (IMAGES,), path)
    return paths


def test_a_file_computes_what_the_network_does(files: tuple[Path, Path]) -> None:
    model = network(4)
    with torch.no_grad():
        expected = model(IMAGES)
    (output,) = open_onnx(files[1])(IMAGES)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_two_files_are_timed_side_by_side(files: tuple[Path, Path]) -> None:
    wide, narrow = compare_onnx_latency(*files, (IMAGES,), batch_size=2, seconds=0.0, min_runs=7)
    for found in (wide, narrow):
        assert (found.runtime, found.device) == ("ONNX Runtime", "cpu")
        assert (found.batch_size, found.runs) == (2, 7)
        assert found.threads == torch.get_num_threads()
    # A thousand times the multiply-adds.
    assert wide.median_ms > narrow.median_ms > 0


def test_a_batch_has_an_image(files: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="batch_size >= 1, got 0"):
        compare_onnx_latency(*files, (IMAGES,), batch_size=0)
