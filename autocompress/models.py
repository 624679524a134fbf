"""Networks by name (zoo, torchvision, timm or a function of the user's), and trained weights."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autocompress.errors import ConfigError, did_you_mean
from autocompress.published import WRAPPERS, translate
from autocompress.zoo import ZOO

PRETRAINED = "pretrained"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHOWN_MISMATCHES = 5
"""How many names of each kind an error about weights that don't fit may list."""

_SOURCES = ("zoo", "torchvision", "timm")


def build_model(
    source: str,
    arguments: Mapping[str, Any],
    weights: str | None,
    folder: Path | None = None,
) -> nn.Module:
    """Make a network, in evaluation mode, on the CPU.

    Args:
        source: "zoo:NAME", "torchvision:NAME", "timm:NAME" or "package.module:function".
        arguments: Keyword arguments of the network.
        weights: None for random ones, "pretrained" for the library's, else a file.
        folder: Where modules of the user are looked for besides Python's path and the current
            folder; usually the study file's.

    Raises:
        ConfigError: If there is no such network, or the arguments or weights don't fit it.
    """
    make = _find(source, folder)
    kind = source.partition(":")[0]
    library = kind in ("torchvision", "timm")
    if weights == PRETRAINED and not library:
        raise ConfigError(
            f"model.weights = 'pretrained': {source} has none. Give a file, or leave it out to "
            "train the baseline."
        )
    model = _call(make, source, arguments, pretrained=library and weights == PRETRAINED)
    if weights not in (None, PRETRAINED):
        load_weights(model, str(weights))
    return model.eval()


def rebuilding_arguments(
    source: str, arguments: Mapping[str, Any], weights: str | None
) -> dict[str, Any]:
    """The arguments with which a network is built again without the library's weights.

    torchvision's GoogLeNet and Inception change with their pretrained weights: they scale their
    inputs, and GoogLeNet drops its auxiliary classifiers.
    """
    found = dict(arguments)
    kind, _, name = source.partition(":")
    if kind == "torchvision" and weights == PRETRAINED and name in ("googlenet", "inception_v3"):
        found.setdefault("transform_input", True)
        found.setdefault("aux_logits", name == "inception_v3")
    return found


def pretrained_normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that a library's pretrained network expects.

    timm writes them on the network; of torchvision's classifiers all but a few expect ImageNet's.
    """
    own = getattr(model, "pretrained_cfg", None) or {}
    return tuple(own.get("mean", IMAGENET_MEAN)), tuple(own.get("std", IMAGENET_STD))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file of weights into `model`: safetensors, or a state dict that `torch.save` wrote.

    A state dict may be wrapped (`{"state_dict": ...}`), its names prefixed by DataParallel
    (`module.`) or `torch.compile` (`_orig_mod.`), and layers named as in `published.RENAMINGS`.
    Nothing but tensors is ever unpickled.

    Raises:
        ConfigError: If the file can't be read or doesn't fit, with the names that don't.
    """
    state = _unprefixed(_read_weights(Path(path).expanduser()), model)
    own = model.state_dict()
    if not state.keys() <= own.keys():
        ours = translate(state, own)
        state = {ours[name]: value for name, value in state.items()}
    # Counters of batches, absent in files from before torch 0.4.1; they change no output.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} (file {tuple(state[k].shape)}, network {tuple(own[k].shape)})"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(faults.values()):
        found = "; ".join(f"{what}: {_some(names)}" for what, names in faults.items() if names)
        raise ConfigError(
            f"model.weights = '{path}' doesn't fit the network. {found}. "
            "Check model.source and model.arguments."
        )
    load_state(model, state, strict=False)


def portable_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, every tensor contiguous and in memory of its own.

    Raises:
        ConfigError: If something in it is no tensor.
    """
    state = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"'{name}' in the network's state is a {type(value).__name__}; only tensors can "
                "be saved. Register it as a buffer."
            )
        state[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return state


def load_state(model: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
    """Load tensors by name, as they are named by the network's modules of today.

    `load_state_dict` alone asks which version of each module wrote them, which a file of bare
    tensors doesn't tell; torchvision's MNASNet refuses to load without.

    Raises:
        RuntimeError: If they don't fit; with `strict`, also if names are missing or too many.
    """
    versioned = OrderedDict(state)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(versioned, strict=strict)


def list_models() -> dict[str, list[str]]:
    """Names of networks by source; timm's only where it is installed."""
    import torchvision

    found = {"zoo": sorted(ZOO), "torchvision": _torchvision_names(torchvision)}
    try:
        import timm
    except ImportError:
        return found
    return {**found, "timm": list(timm.list_models())}


def load_function(source: str, key: str, folder: Path | None = None) -> Callable[..., Any]:
    """The function that "package.module:function" names.

    Args:
        source: Its place.
        key: The setting that it comes from, for messages.
        folder: Searched after Python's own path and before the current folder.

    Raises:
        ConfigError: If there is no such module or function.
    """
    module_name, _, name = source.partition(":")
    # Last on the path and left there: nothing installed is shadowed, and worker processes and later
    # imports inside the function find their modules too.
    for place in (folder, Path.cwd()):
        if place is not None and str(place) not in sys.path:
            sys.path.append(str(place))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{key} = '{source}': {module_name} needs {error.name}.") from error
        raise ConfigError(
            f"{key} = '{source}': there is no module '{module_name}' on Python's path, in the "
            "current folder or in the study file's."
        ) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{key} = '{source}': '{module_name}' is no name of a module ({_first_line(error)})."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [
            n
            for n, value in vars(module).items()
            if inspect.isroutine(value) and n[0] != "_" and value.__module__ == module_name
        ]
        raise ConfigError(f"{key} = '{source}': no function '{name}'.{did_you_mean(name, known)}")
    found: Callable[..., Any] = function
    return found


def _find(source: str, folder: Path | None) -> Callable[..., nn.Module]:
    """The function that makes a network; torchvision's and timm's also take `pretrained`."""
    kind, colon, name = source.partition(":")
    if kind == "zoo":
        if name not in ZOO:
            raise ConfigError(
                f"model.source = '{source}': no such network.{did_you_mean(name, ZOO)}"
            )
        return ZOO[name]
    if kind == "torchvision":
        import torchvision

        _check_name(source, name, _torchvision_names(torchvision))
        return partial(_torchvision_model, name)
    if kind == "timm":
        timm = _import_timm(source)
        if not name.startswith("hf-hub:") and not timm.is_model(name):
            _check_name(source, name, timm.list_models())
        return partial(timm.create_model, name)
    if kind == "python":
        raise ConfigError(
            f"model.source = '{source}': this network was given to autocompress.compress(); "
            "only Python can give it again."
        )
    near = get_close_matches(kind, _SOURCES, n=1)
    if not colon or (near and importlib.util.find_spec(kind.partition(".")[0]) is None):
        raise ConfigError(
            f"model.source = '{source}': no such source."
            f"{did_you_mean(kind, [*_SOURCES, 'package.module'])}"
        )
    return load_function(source, "model.source", folder)


def _call(
    make: Callable[..., nn.Module], source: str, arguments: Mapping[str, Any], pretrained: bool
) -> nn.Module:
    options = dict(arguments)
    if source.startswith(("torchvision:", "timm:")):
        options["pretrained"] = pretrained
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ConfigError(f"model.arguments don't fit {source}: {_first_line(error)}") from None
    if source.startswith("zoo:"):
        _check_sizes(make, options)
    if source.startswith(("torchvision:", "timm:", "zoo:")):
        try:
            return make(**options)
        except Exception as error:
            if not pretrained or isinstance(error, (TypeError, ValueError)):
                raise ConfigError(
                    f"model.arguments don't fit {source}: {_first_line(error)}"
                ) from error
            # The libraries raise whatever their HTTP client raises.
            raise ConfigError(
                f"model.weights = 'pretrained': the weights of {source} can't be downloaded "
                f"({_first_line(error)}). Download them elsewhere and give model.weights = a file."
            ) from error
    model = make(**options)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.source = '{source}' must return a torch.nn.Module, got {type(model).__name__}."
        )
    return model


def _check_sizes(make: Callable[..., nn.Module], options: Mapping[str, Any]) -> None:
    """Check the arguments that all networks of the zoo have.

    Raises:
        ConfigError: If a number of channels or classes isn't one, or a multiplier isn't positive.
    """
    whole = {"num_classes", "in_channels", "width"}
    if isinstance(inspect.signature(make).parameters["width"].default, float):
        whole.remove("width")
        width = options.get("width", 1.0)
        if not isinstance(width, (int, float)) or not 0 < width < math.inf:
            raise ConfigError(
                f"model.arguments.width = {width!r} must be a number > 0: it multiplies the "
                "channels of this network."
            )
    for key in sorted(whole & options.keys()):
        if not isinstance(options[key], int) or options[key] < 1:
            raise ConfigError(
                f"model.arguments.{key} = {options[key]!r} must be a whole number >= 1"
            )


def _torchvision_model(name: str, pretrained: bool, **arguments: Any) -> nn.Module:
    import torchvision

    weights = "DEFAULT" if pretrained else None
    model: nn.Module = torchvision.models.get_model(name, weights=weights, **arguments)
    return model


def _torchvision_names(torchvision: Any) -> list[str]:
    # The top module holds the classification networks; detection and video have their own.
    return list(torchvision.models.list_models(module=torchvision.models))


def _import_timm(source: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"model.source = '{source}' needs timm: pip install 'autocompress[zoo]'"
        ) from error
    return timm


def _check_name(source: str, name: str, known: list[str]) -> None:
    if name in known:
        return
    near = get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(repr(word) for word in near)}?" if near else ""
    raise ConfigError(
        f"model.source = '{source}': no such network.{hint} `autocompress models` lists all."
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(f"model.weights = '{path}': no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Files of torch.save are zip archives, or plain pickles of protocol 2 before torch 1.6.
        with path.open("rb") as file:
            head = file.read(12)
        if not head.startswith((b"PK", b"\x80\x02")):
            raise ConfigError(
                f"model.weights = '{path}' is no file of weights: it begins with "
                f"{head!r}. Was a web page saved instead?"
            ) from error
        raise ConfigError(
            f"model.weights = '{path}' holds Python objects, perhaps a whole pickled network, "
            "which could run any code and is refused. Save its weights instead: "
            "torch.save(model.state_dict(), ...)."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(
            f"model.weights = '{path}' is no readable file of weights "
            f"({type(error).__name__}: {_first_line(error)})."
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = content if isinstance(content, Mapping) else {}
    state = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not state:
        raise ConfigError(
            f"model.weights = '{path}' holds no weights by name: expected a state dict, alone or "
            f"under {', '.join(repr(key) for key in WRAPPERS)}."
        )
    return state


def _unprefixed(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    own = model.state_dict().keys()
    if any(name in own for name in state):
        return state
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    while all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
        if any(name in own for name in state):
            break
    return state


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN_MISMATCHES
    shown = ", ".join(names[:SHOWN_MISMATCHES])
    return f"{shown} and {more} more" if more > 0 else shown


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
