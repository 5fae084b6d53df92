"""A swapped model of transformers or diffusers in a folder: as its own library saves it, with the gates beside it."""

import importlib
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from spatial_decay.checkpoint import load_checkpoint
from spatial_decay.layers.kinds import KINDS, Kind, as_kind
from spatial_decay.swap.by_host import load_by_host
from spatial_decay.swap.decayed import AddedDecay, added_decays, put_back, take_out
from spatial_decay.swap.swap import swap_attention

__all__ = ["load_swapped", "save_swapped"]

_Model = TypeVar("_Model", bound=nn.Module)

_OPTIONS, _WEIGHTS = "spatial_decay.json", "spatial_decay.safetensors"
_BY_HAND = (
    "For other files (of Lightning, of accelerate's save_state), build the model, swap_attention with the same "
    "keywords, and load its state_dict."
)


def save_swapped(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a model that swap_attention has changed, for load_swapped.

    The folder is what the model's own save_pretrained writes, which its library still reads, then without the decay;
    the options of the swap and the gates, LPE and output gates lie beside it. For other models save the state_dict: the
    names of their own weights have not changed.

    Args:
        model: With a method save_pretrained.
        folder: Made where there is none.

    Raises:
        ValueError: the model is not swapped, or has no save_pretrained; its kind of decay is none of the library's, so
            that load_swapped could not make it again. Nothing is written then.
        ImportError: without the safetensors package.
    """
    added = added_decays(model)
    if not added or not hasattr(model, "save_pretrained"):
        raise ValueError(
            "the model must have been changed by swap_attention and have a save_pretrained: got "
            f"{type(model).__name__} with {len(added)} decays. Save the state_dict of other models."
        )
    for core in added.values():
        _check_goes_through_json(core.decay.kind)
    safetensors = _safetensors()
    taken = take_out(model)
    try:
        cast(Any, model).save_pretrained(folder)
    finally:
        put_back(model, taken)
    weights = {name: value.detach().cpu().contiguous() for name, value in _container(added).state_dict().items()}
    safetensors.save_file(weights, Path(folder, f"{_WEIGHTS}.part"))
    Path(folder, f"{_OPTIONS}.part").write_text(json.dumps(next(iter(added.values())).options, indent=2))
    for name in (_WEIGHTS, _OPTIONS):
        os.replace(Path(folder, f"{name}.part"), Path(folder, name))


def load_swapped(
    model_class: type[_Model],
    folder: str | os.PathLike[str],
    *,
    swap: Mapping[str, Any] | None = None,
    **options: Any,
) -> _Model:
    """The model that save_swapped has saved, or its own library, swapped again.

    Args:
        model_class: Its class, for instance transformers.ViTModel.
        folder: Of save_swapped; or, with swap, what the model's own save_pretrained has written after the swap, such as
            a checkpoint of transformers' Trainer, an average of diffusers' EMAModel or a part of a pipeline.
        swap: The keywords with which the model was swapped, which such a folder does not hold; save_swapped's does.
        options: For model_class.from_pretrained.

    Raises:
        FileNotFoundError: the folder is not one of save_swapped, and swap is left out.
        TypeError: model_class is no class of models.
        ValueError: a file; swap beside the keywords of the folder; the options of the swap are not those of this
            version; the gates do not fit the model.
        ImportError: without the safetensors package.
    """
    if Path(folder).is_file():
        raise ValueError(f"folder must be a folder: got the file {folder}. {_BY_HAND}")
    if swap is not None:
        if Path(folder, _OPTIONS).exists():
            raise ValueError(
                f"swap must be left out for {folder}, whose {_OPTIONS} has the keywords: got {dict(swap)}."
            )
        return load_by_host(model_class, folder, swap, options)
    saved = _options_of_swap(Path(folder, _OPTIONS))
    safetensors = _safetensors()
    model: _Model = cast(Any, model_class).from_pretrained(folder, **options)
    _swap_again(model, saved)
    container, weights = _container(added_decays(model)), Path(folder, _WEIGHTS)
    if container.state_dict() or safetensors.load_file(weights):  # kinds without gates have none
        load_checkpoint(container, weights)
    return model


def _swap_again(model: nn.Module, saved: dict[str, Any]) -> None:
    """Swap with these keywords, or see that the model's class has done so as it was built."""
    added = added_decays(model)
    if not added:
        swap_attention(model, **saved)
    for core in added.values():
        if json.dumps(core.options, sort_keys=True) != json.dumps(saved, sort_keys=True):
            raise ValueError(
                f"{type(model).__name__} swaps as it is built, and must do so with the keywords that were saved, "
                f"{saved}: got {core.options}. Build it as it was, or load the folder with the class inside."
            )


def _options_of_swap(file: Path) -> dict[str, Any]:
    """The keywords of swap_attention that were saved, checked before a model is loaded for them."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} must be a folder of save_swapped: it has no {file.name}. Where the model's own library has "
            'written it after the swap, pass the keywords of the swap, such as swap={"decay": "full"}. ' + _BY_HAND
        )
    expected = set(inspect.signature(swap_attention).parameters) - {"model"}
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict) or set(found) != expected:
            raise ValueError(f"it needs {', '.join(sorted(expected))}, and has {', '.join(sorted(found))}.")
        as_kind(found["decay"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is not what this version's save_swapped writes. Load it with the version of spatial-decay "
            f"that has saved it, or swap the model of its folder anew: {error}"
        ) from error
    return found


def _check_goes_through_json(kind: Kind) -> None:
    try:
        found: Kind | None = as_kind(kind.config)
    except (TypeError, ValueError):
        found = None
    if found != kind:
        raise ValueError(
            f"the kind of decay must be one of {', '.join(KINDS)}, which load_swapped can make again: got "
            f"{type(kind).__module__}.{type(kind).__qualname__}, {kind.name!r}. Save the state_dict, and swap with the "
            "same value before loading it."
        )


def _container(added: dict[str, AddedDecay]) -> nn.Module:
    """All that was added as one module; the names of modules may not contain dots."""
    return nn.ModuleDict({name.replace(".", "/"): module for name, module in added.items()})


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError("saved gates need the safetensors package: pip install spatial-decay[hf].") from error
