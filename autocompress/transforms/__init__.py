"""The transforms: one frozen dataclass for each way to replace a layer by smaller ones."""

from autocompress.errors import ConfigError
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


def register(kind: type[Transform], alias: str | None = None) -> type[Transform]:
    """Make a transform of your own known by its `name`, to plans and to `load`.

    A study does this by itself for what `search.transforms` names as `package.module:Class`. A
    program that loads a network in which the transform occurs must do it first.

    Args:
        kind: The class, a frozen dataclass as `base.Transform` describes it.
        alias: Another name by which it is found, too.

    Returns:
        The class, so that this can stand above it as a decorator.

    Raises:
        ConfigError: If another transform has that name.
    """
    for name in (kind.name, alias or kind.name):
        known = TRANSFORMS.setdefault(name, kind)
        if _place(known) != _place(kind):
            raise ConfigError(
                f"There is a transform {name!r} already, {known.__qualname__} of "
                f"{known.__module__}; give {kind.__qualname__} another name."
            )
        # The same class again, from a module that was read anew.
        TRANSFORMS[name] = kind
    return kind


def _place(kind: type[Transform]) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


__all__ = [
    "CP",
    "SVD",
    "TRANSFORMS",
    "SpatialSVD",
    "TensorTrain",
    "Transform",
    "Tucker2",
    "register",
]
