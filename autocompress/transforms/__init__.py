"""The transforms: one frozen dataclass for each way to replace a layer by smaller ones."""

from autocompress.transforms.base import Transform
from autocompress.transforms.cp import CP
from autocompress.transforms.svd import SVD, SpatialSVD
from autocompress.transforms.tensor_train import TensorTrain
from autocompress.transforms.tucker import Tucker2

TRANSFORMS: dict[str, type[Transform]] = {
    "svd": SVD,
    "spatial_svd": SpatialSVD,
    "tucker2": Tucker2,
    "cp": CP,
    "tt": TensorTrain,
}

__all__ = ["CP", "SVD", "TRANSFORMS", "SpatialSVD", "TensorTrain", "Transform", "Tucker2"]
