"""A model's arguments, kept as JSON values by one decorator, so that Class(**model.config) builds the same again."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

from typing_extensions import Unpack

from spatial_decay.layers import AttentionOptions, SpatialDecayAttention
from spatial_decay.layers.kinds import KINDS, Kind

__all__ = ["as_json", "keeps_config"]

P = ParamSpec("P")

_RUNNING = "_config_is_being_made"
"""Attribute of a model while the __init__ that makes its config runs."""


def keeps_config(**defaults: Unpack[AttentionOptions]) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorator for the __init__ of a model that takes the keywords of AttentionOptions as **options.

    `self.config` holds every argument before __init__ runs, those left out too, and so do the options that __init__
    gets. What __init__ works out (kinds with every option, one value a stage) it writes into `self.config` itself. A
    subclass may decorate its own __init__: then config holds the subclass's arguments.

    Args:
        defaults: The options where the model differs from SpatialDecayAttention.

    Raises:
        TypeError: (when a model is made) a keyword that it does not have; the message lists those that it has.
    """
    layer = inspect.signature(SpatialDecayAttention.__init__).parameters
    all_defaults = {name: layer[name].default for name in AttentionOptions.__annotations__} | dict(defaults)

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        signature = inspect.signature(init)
        own = [name for name in signature.parameters if name not in ("self", "options")]

        @functools.wraps(init)
        def init_with_config(*arguments: P.args, **keywords: P.kwargs) -> None:
            model: Any = arguments[0]
            _check_keywords(type(model).__name__, keywords, own)
            try:
                bound = signature.bind(*arguments, **keywords)
            except TypeError as error:
                raise TypeError(f"{type(model).__name__}: {error}.") from None
            bound.apply_defaults()
            bound.arguments["options"] = options = all_defaults | bound.arguments["options"]
            everything = {name: bound.arguments[name] for name in own} | options
            values = {name: as_json(value) for name, value in everything.items()}
            if _RUNNING in vars(model):  # this is a base class's __init__
                init(*bound.args, **bound.kwargs)
                return
            model.config = dict(values)
            vars(model)[_RUNNING] = True
            try:
                init(*bound.args, **bound.kwargs)
            finally:
                del vars(model)[_RUNNING]
            # Without what a base class worked out of arguments that are not ours.
            model.config = {name: model.config[name] for name in values}

        return init_with_config

    return decorate


def as_json(value: Any) -> Any:
    """Tuples as lists, kinds as their mappings; other values as they are."""
    if isinstance(value, Kind):
        return value.config
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value


def _check_keywords(model: str, keywords: Mapping[str, object], own: list[str]) -> None:
    options = list(AttentionOptions.__annotations__)
    unknown = [name for name in keywords if name not in own and name not in options]
    if not unknown:
        return
    message = (
        f"{model} has no keyword {', '.join(sorted(unknown))}: its own are {', '.join(own)}, and those for all blocks "
        f"{', '.join(options)}."
    )
    if of_kinds := [name for name in unknown if any(name in kind.options() for kind in KINDS.values())]:
        message += f" Options of a kind belong to decay, for instance decay={{'kind': ..., {of_kinds[0]!r}: ...}}."
    raise TypeError(message)
