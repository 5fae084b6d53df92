"""A swapped model of transformers or diffusers in a folder: as its own library saves it, with the gates beside it."""

import copy
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from spatial_decay.checkpoint import load_checkpoint
from spatial_decay.checkpoint.tensors import reason_against, refusal
from spatial_decay.folders import check_signed, reading, rivals, signed, weight_files, writing
from spatial_decay.layers.kinds import KINDS, Kind, as_kind
from spatial_decay.swap.by_host import added_names, load_by_host
from spatial_decay.swap.decayed import AddedDecay, added_decays
from spatial_decay.swap.options import keywords_of
from spatial_decay.swap.swap import able_to_swap, restore_attention, swap_attention

__all__ = ["load_swapped", "save_swapped"]

_Model = TypeVar("_Model", bound=nn.Module)

_SIGNATURE = {"files", "sha256"}
_OPTIONS, _WEIGHTS, _CONFIG = "spatial_decay.json", "spatial_decay.safetensors", "config.json"
_BY_HAND = (
    "For other files (of Lightning, of accelerate's save_state), build the model, swap_attention with the same "
    "keywords, and load its state_dict."
)


def save_swapped(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a model that swap_attention has changed, for load_swapped.

    The folder is what the model's own save_pretrained writes, which its library still reads, then without the decay;
    the options of the swap and the gates, LPE and output gates lie beside it. For other models save the state_dict: the
    names of their own weights have not changed.

    The model is not touched: what is saved is a copy of its modules around the same tensors. The folder is written
    whole or not at all, see spatial_decay.folders: killed at any moment, load_swapped finds the old content or the new.

    Args:
        model: With a method save_pretrained. What torch.compile has put around it is left out.
        folder: Made where there is none. Its other files stay.

    Raises:
        ValueError: the model is not swapped, or has no save_pretrained; its kind of decay is none of the library's, its
            parts were swapped with different keywords, it has adapters of PEFT, its gates are not in
            memory (offloaded by accelerate), or it cannot be copied, so that load_swapped could not make it again.
            Nothing is written then.
        ImportError: without the safetensors package.
        OSError: the folder cannot be written; it is as it was, as after an error of the model's own library.
    """
    model = getattr(model, "_orig_mod", model)
    added = added_decays(model)
    if not added or not hasattr(model, "save_pretrained"):
        raise ValueError(
            "the model must have been changed by swap_attention and have a save_pretrained: got "
            f"{type(model).__name__} with {len(added)} decays. Save the state_dict of other models."
        )
    _check_has_no_adapters(model)
    for core in added.values():
        _check_goes_through_json(core.decay.kind)
    safetensors = _safetensors()
    plain = _without_decay(model)
    swap = _swap_of(plain, added)
    weights = _container(added).state_dict()
    if reasons := {name: reason for name, value in weights.items() if (reason := reason_against(value))}:
        raise refusal("gates must be plain tensors", reasons, "Take off what offloads or shards the model.")
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with writing(folder) as part:
        cast(Any, plain).save_pretrained(part)
        safetensors.save_file(weights, part / _WEIGHTS)
        config = [part / _CONFIG] if (part / _CONFIG).exists() else []
        (part / _OPTIONS).write_text(json.dumps(signed(swap, weight_files(part), editable=config), indent=2))


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

    Returns:
        The model, in the mode in which model_class.from_pretrained gives it.

    Raises:
        FileNotFoundError: the folder is not one of save_swapped, and swap is left out.
        TypeError: model_class is no class of models.
        ValueError: a file; swap beside the keywords of the folder; the files of the folder do not belong together, or
            one is damaged; the options of the swap are not those of this version; the gates do not fit the model, or it
            has weights that the folder has not; an option that is for other folders, or output_loading_info.
        ImportError: without the safetensors package.
        OSError: another process saves to the folder meanwhile.
    """
    if options.get("output_loading_info"):
        raise ValueError("output_loading_info must be left out: what it would tell is checked, and the model returned.")
    if Path(folder).is_file():
        raise ValueError(f"folder must be a folder: got the file {folder}. {_BY_HAND}")
    with reading(folder, _OPTIONS) as directory:
        if swap is not None:
            if (directory / _OPTIONS).exists():
                raise ValueError(
                    f"swap must be left out for {folder}, whose {_OPTIONS} has the keywords: got {dict(swap)}."
                )
            return load_by_host(model_class, folder, swap, options)
        saved = _options_of_swap(directory / _OPTIONS)
        _check_reads_what_was_saved(options)
        safetensors = _safetensors()
        model = _from_pretrained(model_class, directory, options)
        _swap_again(model, saved)
        container, weights = _container(added_decays(model)), directory / _WEIGHTS
        if container.state_dict() or safetensors.load_file(weights):  # kinds without gates have none
            load_checkpoint(container, weights)
    return model


def _from_pretrained(model_class: type[_Model], directory: Path, options: Mapping[str, Any]) -> _Model:
    """By the model's own library; what it gives a first value, with a warning, is refused where it says so."""
    load = cast(Any, model_class).from_pretrained
    libraries = {cls.__module__.partition(".")[0] for cls in model_class.__mro__}
    if not libraries & {"diffusers", "transformers"}:
        return cast(_Model, load(directory, **options))
    model, info = load(directory, **{**options, "output_loading_info": True})
    if missing := sorted({*info["missing_keys"]} - {*added_names(info["missing_keys"])}):  # gates lie beside them
        raise ValueError(
            f"the folder must have every weight of the model: {directory} has none for {', '.join(missing[:4])}"
            f"{', ...' * (len(missing) > 4)}. Load it with the class and the options that the model was built with."
        )
    return cast(_Model, model)


def _swap_again(model: nn.Module, saved: dict[str, Any]) -> None:
    """Swap with these keywords, or see that the model's class has done so as it was built."""
    added = added_decays(model)
    if not added:
        swap_attention(model, **saved)
    for core in added.values():
        if json.dumps(core.options, sort_keys=True) != json.dumps(saved, sort_keys=True):
            raise ValueError(
                f"{type(model).__name__} swaps as it is built, and must do so with the keywords that were saved, "
                f"{saved}: got {core.options}. Build it as it was, or load the folder with the library's own class."
            )


def _without_decay(model: nn.Module) -> nn.Module:
    """The modules of the model before swap_attention, around the same tensors; the model itself stays as it is."""
    shared = [*model.parameters(), *model.buffers()]
    for module in model.modules():  # hooks may belong to anything, and the copy is never called
        dicts = [value for name, value in vars(module).items() if name.endswith("_hooks") and isinstance(value, dict)]
        shared += [hook for hooks in dicts for hook in hooks.values()]
    try:
        plain = copy.deepcopy(model, {id(value): value for value in shared})
    except Exception as error:  # whatever the model keeps has errors of its own
        raise ValueError(
            f"the model must be one that copy.deepcopy copies, to be saved without being changed ({error}). Save its "
            "state_dict, or take off what other libraries have put on it since the swap."
        ) from error
    restore_attention(plain)
    return plain


def _swap_of(plain: nn.Module, added: dict[str, AddedDecay]) -> dict[str, Any]:
    """The keywords with which swap_attention makes just these decays again."""
    swap = next(iter(added.values())).options
    same = [core.options | {"layers": None} == swap | {"layers": None} for core in added.values()]
    able = able_to_swap(plain, swap["patch_embed"]) if all(same) else []
    if not set(added) <= set(able):
        raise ValueError(
            "all attention with decay must come from one swap, which load_swapped can do again: got "
            + (f"{', '.join(set(added) - set(able))} that it would not find" if all(same) else "different keywords")
            + ". Save the state_dict, and swap in the same steps before loading it."
        )
    if set(added) == set(able_to_swap(plain, swap["patch_embed"], swap["layers"])):
        return swap
    return swap | {"layers": [i for i, name in enumerate(able) if name in added]}  # restore_attention has left these


def _options_of_swap(file: Path) -> dict[str, Any]:
    """The keywords of swap_attention that were saved, checked before a model is loaded for them."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} must be a folder of save_swapped: it has no {file.name}. Where the model's own library has "
            'written it after the swap, pass the keywords of the swap, such as swap={"decay": "full"}. ' + _BY_HAND
        )
    expected = keywords_of(swap_attention)
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict) or set(found) - _SIGNATURE != expected:
            raise ValueError(f"it needs {', '.join(sorted(expected))}, and has {', '.join(sorted(found))}.")
        as_kind(found["decay"])
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not what this version's save_swapped writes, or is damaged. Load it with the version of "
            f"spatial-decay that has saved it, or swap the model of its folder anew: {error}"
        ) from error
    _check_whole(file, found)
    return {name: found[name] for name in expected}


def _check_whole(file: Path, manifest: dict[str, Any]) -> None:
    """Raise where the weights in a manifest's directory are not those that were saved with it."""
    files = {path.name: path for path in file.parent.iterdir()}
    check_signed(manifest, str(file), files)
    if others := [path.name for path in rivals(file.parent, manifest["files"])]:
        raise ValueError(
            f"{file.parent} must hold only the weights that were saved together: {', '.join(others)} came to "
            f"{', '.join(manifest['files'])} later, and might be read in their place. Move them to another folder."
        )


def _check_reads_what_was_saved(options: dict[str, Any]) -> None:
    """Raise where from_pretrained would read other weights than those of the manifest."""
    given = [name for name in ("gguf_file", "subfolder", "variant") if options.get(name)]
    given += ["use_safetensors"] if options.get("use_safetensors") is False else []
    if given:
        raise ValueError(
            f"load_swapped must read the weights that save_swapped wrote: got {', '.join(given)}, which may name "
            "others. Leave it out."
        )


def _check_has_no_adapters(model: nn.Module) -> None:
    """PEFT changes the names of the weights, so that from_pretrained would give those below adapters first values."""
    for name, module in model.named_modules():
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
            raise ValueError(
                f"the model must be as its own library builds it: got {type(module).__name__} of PEFT at "
                f"{name or 'the root'!r}. Save what merge_and_unload() returns; or the state_dict, with the adapters."
            )


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
