"""What every layout says of the tokens of a sequence."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from spatial_decay.layout.grid import Grid
    from spatial_decay.layout.positions import Positions


GridSize: TypeAlias = Sequence[int]
"""(H, W): rows and columns of patch tokens; never (W, H)."""

Steps: TypeAlias = tuple[Tensor, ...]
"""Signed differences of position from queries to keys, one tensor an axis, in grid steps. They broadcast together."""


class Layout(ABC):
    """Where the L tokens of a sequence lie. Nothing is added to any score of a token that lies nowhere.

    Attributes:
        num_prefix_tokens: P, tokens without a position, first in the sequence; a description of pairs is without them.
    """

    num_prefix_tokens: int

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """L."""

    @property
    def is_grid(self) -> bool:
        """Whether the tokens, behind prefix tokens, fill a grid in raster order."""
        return False

    @property
    def known(self) -> Tensor | None:
        """Which tokens lie somewhere, bool, (B, L) or (1, L). None: all of them, behind num_prefix_tokens."""
        return None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made from: each may have a gradient of its own, or be part of a transform."""
        return ()

    @property
    @abstractmethod
    def largest_step(self) -> float:
        """The largest distance along an axis that two tokens can have."""

    @abstractmethod
    def positions(self, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Row and column of the tokens behind num_prefix_tokens, two tensors that broadcast against (B, N, L).

        Args:
            device: Of the tensors.
            dtype: Of the tensors.

        Returns:
            Rows and columns, in grid steps; 0 for tokens that lie nowhere.
        """

    @abstractmethod
    def steps(self, *, device: torch.device, dtype: torch.dtype, row_multiple: int = 1) -> Steps:
        """From each token behind num_prefix_tokens to each, for `queries` and `keys` of the same row_multiple.

        Args:
            device: Of the tensors.
            dtype: Of the tensors.
            row_multiple: The number of keys is padded to a multiple of it, as in keys.

        Returns:
            One tensor an axis, in grid steps, key minus query; they broadcast together.
        """

    @abstractmethod
    def queries(self, x: Tensor) -> Tensor:
        """Numbers (B, N, L), without prefix tokens, as those of queries: to broadcast against `steps`.

        Args:
            x: (B, N, L) without prefix tokens.

        Returns:
            The same numbers, with dimensions for the keys.
        """

    @abstractmethod
    def keys(self, x: Tensor, *, row_multiple: int = 1) -> Tensor:
        """Numbers (B, N, L), without prefix tokens, as those of keys: so many that their count is a multiple.

        Args:
            x: (B, N, L) without prefix tokens.
            row_multiple: Zeros are added until the number of keys is a multiple of it.

        Returns:
            The same numbers, with a dimension for the queries.
        """

    @abstractmethod
    def running_sum(self, cost: Tensor, *, inclusive: bool) -> Tensor:
        """Of (B, N, L) along the raster scan: over k < i, or k <= i; tokens that lie nowhere cost nothing.

        Args:
            cost: (B, N, L), prefix tokens too.
            inclusive: Whether a token's own cost counts.

        Returns:
            (B, N, L).
        """

    @abstractmethod
    def raster_numbers(self, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Of each token's place along the raster scan, as `positions`; tokens at one place share theirs.

        Args:
            device: Of the tensors.
            dtype: Of the tensors.

        Returns:
            Numbers from 0 on, to broadcast against (B, N, L).
        """

    @abstractmethod
    def subset(self, indices: Tensor, num_prefix_tokens: int) -> "Positions":
        """The tokens that are left behind the prefix tokens, by their number there, (B, K), in any order.

        Args:
            indices: (B, K), numbers behind the prefix tokens.
            num_prefix_tokens: P, tokens that are kept in front.

        Returns:
            Positions of the P + K tokens.
        """

    @abstractmethod
    def behind(self, num_tokens: int) -> "Layout":
        """This layout behind more tokens that lie nowhere.

        Args:
            num_tokens: How many: text that joins the image in one softmax, for instance.

        Returns:
            The layout of all of them.
        """

    def as_grid(self, what: str, remedy: str = "Pass (H, W) or a Grid.") -> "Grid":
        """This layout, where it is a grid.

        Args:
            what: What needs a grid, for the error.
            remedy: What to do, for the error.

        Returns:
            Itself.

        Raises:
            ValueError: it is none, and what is asked for needs one.
        """
        raise ValueError(f"{what} needs a whole grid, rows and columns without gaps: got {self}. {remedy}")

    def check(self, of: str, *, batch_size: int, num_tokens: int, device: torch.device) -> None:
        """Compare this layout with the tokens of a call.

        Args:
            of: What the tokens are called, for the error.
            batch_size: B.
            num_tokens: L.
            device: Where the tokens are.

        Raises:
            ValueError: this is not the layout of L tokens of B images on that device.
        """
        del batch_size, device
        if self.num_tokens != num_tokens:
            raise ValueError(
                f"the layout must have the L = {num_tokens} tokens of {of}: got {self}, {self.num_tokens} tokens. "
                "Make it for the tokens of this call."
            )


LayoutLike: TypeAlias = Layout | GridSize | None
"""What a public `layout` argument takes: (H, W), a Grid or Positions; None: a map has its own, tokens are a square."""


def cumulative_sum(cost: Tensor, *, inclusive: bool) -> Tensor:
    """Of (B, N, L) along its last dimension, over k < i, or k <= i."""
    return (cost if inclusive else F.pad(cost, (1, 0))[..., :-1]).cumsum(-1)
