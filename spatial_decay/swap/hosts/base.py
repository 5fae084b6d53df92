"""What the file of a host library says: its attention modules, its patch embeddings, and what leaves tokens out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

from spatial_decay.layout import Grid, Layout
from spatial_decay.swap.calls import Calls
from spatial_decay.swap.stand_in import StandIn

__all__ = ["Host", "Library", "PatchEmbed", "ReadLayout", "Removable", "class_names", "read_map"]


@dataclass(frozen=True)
class Host:
    """A class of attention modules that can take a decay. All but mask_name is asked of a module of the class.

    Args:
        num_heads: N.
        dim: D, width of its tokens.
        num_channels: N * d, width of its values.
        mask_name: Keyword of forward that goes to F.scaled_dot_product_attention as attn_mask.
        stand_in: What goes there in its place.
        reason_against: Why this one cannot; empty where it can.
        num_prefix_tokens: P of its model where the module knows; None where the model itself does.
    """

    num_heads: Callable[[Any], int]
    dim: Callable[[Any], int]
    num_channels: Callable[[Any], int]
    mask_name: str
    stand_in: type[StandIn]
    reason_against: Callable[[Any], str]
    num_prefix_tokens: Callable[[Any], int | None]


ReadLayout: TypeAlias = Callable[[Sequence[Any], dict[str, Any], Any, int], tuple[Layout, Tensor]]
"""Arguments, keywords and output of a patch embedding, and how many tokens lie nowhere (first in the layout) ->
where the tokens lie, and a tensor of its output.

A function of a module, so that a model that has been swapped can be pickled.
"""


def read_map(
    _args: Sequence[Any], _kwargs: dict[str, Any], output: Tensor, num_prefix_tokens: int
) -> tuple[Grid, Tensor]:
    """Of a convolution that makes patches, (B, D, H, W)."""
    return Grid(output.shape[-2], output.shape[-1], num_prefix_tokens), output


@dataclass(frozen=True)
class PatchEmbed:
    """A module of a model that sees the grid of an image, and how it is read."""

    name: str
    module: nn.Module
    read: ReadLayout = read_map


class Removable(Protocol):
    """Something that was done to a module: a hook's RemovableHandle, for instance."""

    def remove(self) -> None:
        """Undo it."""


@dataclass(frozen=True)
class Library:
    """A library of models, everything under the full name of a class, module and all.

    Args:
        attention: Attention modules, subclasses as well.
        patch_embeds: How the layout is read of those patch embeddings that are more than a convolution, subclasses as
            well. Convolutions are found without being named here.
        dropouts: Of modules that leave patch tokens out, exactly of these classes: make one tell the Calls that it is
            given which tokens it keeps, and return what undoes that.
    """

    attention: Mapping[str, Host]
    patch_embeds: Mapping[str, ReadLayout] = field(default_factory=dict)
    dropouts: Mapping[str, Callable[[nn.Module, Calls], Sequence[Removable]]] = field(default_factory=dict)


def class_names(module: nn.Module | None) -> list[str]:
    """Full names of the module's class and its bases."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]
