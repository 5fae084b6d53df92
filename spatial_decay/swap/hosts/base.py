"""What the file of a host library says: its attention modules, its patch embeddings, and what leaves tokens out."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import Tensor, nn

from spatial_decay.layout import Grid, Layout
from spatial_decay.swap.calls import Calls
from spatial_decay.swap.stand_in import StandIn

__all__ = ["Host", "Library", "PatchEmbed", "ReadLayout", "Removable", "class_names", "read_map", "rows_of"]


@dataclass(frozen=True)
class Host:
    """A class of attention modules that can take a decay, as register_attention has it, with every answer.

    All but mask, stand_in, text and forward are asked of a module of the class.
    """

    heads: Callable[[Any], int]
    width: Callable[[Any], int]
    channels: Callable[[Any], int]
    mask: str
    stand_in: type[StandIn]
    reason_against: Callable[[Any], str]
    num_prefix_tokens: Callable[[Any], int | None]
    num_suffix_tokens: Callable[[Any], int | None]
    text: str | None
    forward: Callable[..., Any] | None

    def answers(self, attn: nn.Module) -> dict[str, Any]:
        """What the functions say of a module, by name, each checked; of a module that is refused, the reason alone.

        Raises:
            AttributeError: the module is not built as its class is, such as one whose projections another library has
                wrapped.
            TypeError, ValueError: an answer that cannot be.
        """
        found: dict[str, Any] = {}
        for name in ("reason_against", "heads", "width", "channels", "num_prefix_tokens", "num_suffix_tokens"):
            try:
                found[name] = answer = getattr(self, name)(attn)
            except AttributeError as error:
                raise AttributeError(f"{name} cannot be asked of it ({error})") from error
            least, is_optional = (0, True) if name.startswith("num_") else (1, False)
            if name == "reason_against":
                fits, needed = isinstance(answer, str), "a string, empty where there is none"
            else:
                is_whole = isinstance(answer, int) and not isinstance(answer, bool) and answer >= least
                fits, needed = is_whole or (is_optional and answer is None), f"a whole number >= {least}"
            if not fits:
                raise TypeError(f"{name} of {type(attn).__name__} must give {needed}: got {answer!r}. {_REGISTER}")
            if name == "reason_against" and answer:
                return found
        if found["channels"] % found["heads"]:
            raise ValueError(
                f"channels of {type(attn).__name__} must be a multiple of its heads: got {found['channels']} and "
                f"{found['heads']}. {_REGISTER}"
            )
        return found


_REGISTER = "Register the class with the right function, see sd.swap.register_attention."

ReadLayout: TypeAlias = Callable[[Any, Sequence[Any], dict[str, Any], Any, int], tuple[Layout, Tensor]]
"""A patch embedding, its arguments, keywords and output, and how many tokens lie nowhere (first in the layout) ->
where the tokens lie, and a tensor of its output. Of a model that is given where its tokens lie: None for the output,
and a tensor of the tokens.

A function of a module, so that a model that has been swapped can be pickled.
"""


def read_map(
    module: Any, _args: Sequence[Any], _kwargs: dict[str, Any], output: Any, num_prefix_tokens: int
) -> tuple[Grid, Tensor]:
    """Of a convolution that makes patches, (B, D, H, W), or (B, D, T, H, W) of a video.

    Raises:
        ValueError: it gives no such map.
    """
    if not isinstance(output, Tensor) or output.ndim not in (4, 5):
        what = f"{tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"the patch embedding must give a map (B, D, H, W): got {what} of {type(module).__name__}. Pass "
            "swap_attention the name of the convolution that makes the patches as patch_embed, or leave it out."
        )
    return Grid(output.shape[-2], output.shape[-1], num_prefix_tokens), output


@dataclass(frozen=True)
class PatchEmbed:
    """A module of a model that sees the grid of an image, and how it is read; is_input: of what the module is given."""

    name: str
    module: nn.Module
    read: ReadLayout = read_map
    is_input: bool = False


class Removable(Protocol):
    """Something that was done to a module: a hook's RemovableHandle, for instance."""

    def remove(self) -> None:
        """Undo it."""


@dataclass(frozen=True)
class Library:
    """What a library of models has around its attention, under the full name of a class, module and all.

    Args:
        patch_embeds: How the layout is read of those patch embeddings that are more than a convolution, subclasses as
            well, or by the path to one, see rows_of. Convolutions are found without being named here.
        inputs: Of models that are given where their tokens lie.
        dropouts: Of modules that leave patch tokens out or bring them back, exactly of these classes: make one tell the
            Calls that it is given which tokens go on, and return what undoes that.
        insertions: The same of models that put other tokens in front, subclasses as well.
        refused: Why attention of a class that is not registered cannot take a decay.
        num_prefix_tokens: P, asked of a model, subclasses as well, that has no attribute num_prefix_tokens.
    """

    patch_embeds: Mapping[str, ReadLayout] = field(default_factory=dict)
    inputs: Mapping[str, ReadLayout] = field(default_factory=dict)
    dropouts: Mapping[str, Callable[[nn.Module, Calls], Sequence[Removable]]] = field(default_factory=dict)
    insertions: Mapping[str, Callable[[nn.Module, Calls], Sequence[Removable]]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    num_prefix_tokens: Mapping[str, Callable[[Any], int]] = field(default_factory=dict)


def class_names(module: nn.Module) -> list[str]:
    """Full names of the module's class and its bases."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]


_Row = TypeVar("_Row")


def rows_of(table: Mapping[str, _Row], modules: Mapping[str, nn.Module]) -> dict[str, _Row]:
    """What a table has for the modules of a model: under the longest path to one, at last under the name of its class.

    Args:
        table: By the full name of a class; or of a class above the module and the path from there, with numbers as they
            are or as `*`: "package.module.ViT.blocks.*.attn".
        modules: All modules of the model, by name.

    Returns:
        The rows of those that it has one for, by their names.
    """
    beginnings = {".".join(key.split(".")[:end]) for key in table for end in range(1, key.count(".") + 2)}
    classes = {name: [cls for cls in class_names(module) if cls in beginnings] for name, module in modules.items()}
    found = dict[str, _Row]()
    for name in modules:
        parts = name.split(".") if name else []
        ways = [(part, "*") if part.isdecimal() else (part,) for part in parts]
        keys = (
            ".".join(key)
            for depth in range(len(parts) + 1)
            for key in itertools.product(classes[".".join(parts[:depth])], *ways[depth:])
        )
        if key := next((key for key in keys if key in table), ""):
            found[name] = table[key]
    return found
