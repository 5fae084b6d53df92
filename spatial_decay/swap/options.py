"""The arguments of swap_attention that are wrong, and what to write in their place."""

import difflib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from spatial_decay.layers.kinds import KINDS

__all__ = [
    "check_is_model",
    "check_is_whole",
    "check_known",
    "check_whole_number",
    "checked_layers",
    "did_you_mean",
    "keywords_of",
    "wrapped_part",
]


def keywords_of(function: Callable[..., Any]) -> set[str]:
    """The names of its options, all but the model."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY} | {"decay"}


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A question for an error, or nothing where no known name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_is_model(model: object) -> None:
    """Raise TypeError where it is no module: a pipeline, a class, a name."""
    if isinstance(model, nn.Module):
        return
    said = "model must be the torch.nn.Module whose attention is meant: got "
    if isinstance(model, type):
        raise TypeError(f"{said}the class {model.__name__}. Build a model of it first.")
    inside = [name for name, value in getattr(model, "__dict__", {}).items() if isinstance(value, nn.Module)]
    kind = type(model).__name__
    if inside:
        raise TypeError(f"{said}a {kind}, which holds {', '.join(inside)}. Pass one of these, such as .{inside[0]}.")
    raise TypeError(f"{said}a {kind}.")


def check_is_whole(model: nn.Module, done: str) -> None:
    """Raise ValueError where parameters are split over processes: styles and gathers count on what is there."""
    for name, weight in model.named_parameters():
        if type(weight).__name__ == "DTensor":
            raise ValueError(
                f"attention must be {done} before the model is split over processes: got the DTensor {name!r}. Build "
                "it anew."
            )


def wrapped_part(model: nn.Module) -> str:
    """What of it is wrapped for several processes, class and name; empty where nothing is."""
    wrappers = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
    for name, module in model.named_modules():
        if found := wrappers.intersection(cls.__name__ for cls in type(module).__mro__):
            return f"a {found.pop()} at {name or 'the root'!r}"
    return ""


def check_known(unknown: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise TypeError for keywords that swap_attention has not."""
    of_kinds = {option for kind in KINDS.values() for option in kind.options()}
    for name in unknown:
        meant = next(iter(difflib.get_close_matches(name, [*known, *sorted(of_kinds)], n=1)), name)
        kinds = [f"sd.kinds.{kind.__name__}({meant}=...)" for kind in KINDS.values() if meant in kind.options()]
        if kinds:
            advice = f" It is an option of a kind: decay={' or '.join(kinds)}."
        else:
            advice = did_you_mean(name, known) or f" Its options are {', '.join(sorted(known))}."
        raise TypeError(f"swap_attention has no option {name!r}.{advice}")


def check_whole_number(option: str, value: object) -> None:
    """Raise ValueError where it is neither None nor a whole number >= 0."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(f"{option} must be a whole number >= 0: got {value!r}. Or leave it out.")


def checked_layers(layers: Any) -> list[int] | None:
    """The numbers of a sequence as a list; None stays None.

    Raises:
        TypeError: no list, or one of other things than whole numbers.
        ValueError: an empty one.
    """
    if layers is None:
        return None
    said = "layers must be a list of numbers, of attention modules in the order of the model"
    if isinstance(layers, int) and not isinstance(layers, bool):
        raise TypeError(f"{said}: got {layers}. For this one alone pass [{layers}].")
    if isinstance(layers, str):
        raise TypeError(f"{said}: got {layers!r}. Leave it out for all.")
    try:
        numbers = [operator.index(number) for number in layers if not isinstance(number, bool)]
        is_fitting = len(numbers) == len(layers)
    except TypeError:
        is_fitting = False
    if not is_fitting:
        raise TypeError(f"{said}, such as [0, -1]: got {layers!r}. Leave it out for all.")
    if not numbers:
        raise ValueError(f"{said}, one or more: got none. Leave it out for all.")
    return numbers
