"""A swapped model from a folder of its own library, which has the gates among its weights, and not the keywords."""

import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from torch import nn

from spatial_decay.swap.decayed import added_decays
from spatial_decay.swap.options import keywords_of
from spatial_decay.swap.swap import swap_attention

__all__ = ["added_names", "load_by_host"]

_Model = TypeVar("_Model", bound=nn.Module)


def load_by_host(
    model_class: type[_Model], folder: str | os.PathLike[str], swap: Mapping[str, Any], options: Mapping[str, Any]
) -> _Model:
    """The model of a folder, loaded by from_pretrained of a class that swaps as it builds.

    So it is the library that finds the gates in its files, whatever these are, and gives them their names.

    Args:
        model_class: Its class.
        folder: For from_pretrained.
        swap: Keywords of swap_attention.
        options: Further ones for from_pretrained.

    Raises:
        TypeError: model_class is no class of models.
        ValueError: keywords that swap_attention has not; gates that do not fit them.
    """
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise TypeError(f"model_class must be the class of the model itself, such as ViTModel: got {model_class}.")
    known = keywords_of(swap_attention)
    if unknown := set(swap) - known:
        raise ValueError(
            f"swap must hold keywords of swap_attention ({', '.join(sorted(known))}): got {', '.join(sorted(unknown))}."
        )
    given: dict[str, Any] = {"ignore_mismatched_sizes": True, **options, "output_loading_info": True}
    model, info = cast(Any, _swapping(model_class, swap)).from_pretrained(folder, **given)
    model.__class__ = model_class
    # What the library itself has been told to ignore are its own weights, never ours.
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    if options.get("ignore_mismatched_sizes"):
        mismatched = added_names(mismatched)
    problems = {
        "missing": added_names(info["missing_keys"]),
        "not in the swapped model": added_names(info["unexpected_keys"]),
        "of another shape": sorted(mismatched),
    }
    if any(problems.values()):
        found = [
            f"{what}: {', '.join(names[:4])}{', ...' * (len(names) > 4)}" for what, names in problems.items() if names
        ]
        raise ValueError(
            f"{folder} must hold the gates of a model that was swapped with {dict(swap)}: {'; '.join(found)}. Pass the "
            "keywords that it was swapped with. Where it was never swapped, use swap_attention after from_pretrained."
        )
    return cast(_Model, model)


def _swapping(model_class: type[_Model], swap: Mapping[str, Any]) -> type[_Model]:
    """A class that its library takes for the model's own: it has its name, and its __init__ the same arguments."""

    @functools.wraps(model_class.__init__)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        if added_decays(self):
            raise ValueError(
                f"{model_class.__name__} must not swap by itself beside swap=: it does so in its own __init__. Leave "
                f"swap= out, or use {model_class.__name__}.from_pretrained."
            )
        swap_attention(self, **swap)

    members = {
        "__init__": init,
        **{name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")},
    }
    return cast("type[_Model]", type(model_class.__name__, (model_class,), members))


def added_names(names: Iterable[str]) -> list[str]:
    """Of names of weights, those that swap_attention has added."""
    return sorted(name for name in names if ".spatial_decay." in f".{name}")
