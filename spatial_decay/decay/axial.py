"""The arrangement of two decays along the axes of the grid: SDT Eq. 11-12 (`decomposed`) and RMT's first stages."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Self

from spatial_decay.decay.base import PairwiseDecay
from spatial_decay.decay.manhattan import ManhattanDecay
from spatial_decay.decay.path import PathDecay
from spatial_decay.grid import Grid, to_columns, to_rows
from spatial_decay.positions import Positions

__all__ = ["AxialDecay"]


@dataclass(frozen=True)
class AxialDecay:
    """Attention over each row first, then over each column of the result (SDT Eq. 12, O = Attn_H(Attn_W V)).

    Args:
        rows: The decay within rows, for B*H sequences of W tokens: tensors (B*H, N, W), or 1 for B*H.
        columns: The decay within columns, for B*W sequences of H tokens: tensors (B*W, N, H), or 1 for B*W.
        grid: The grid of all tokens. It has no prefix tokens: they belong to no row or column.
    """

    rows: PairwiseDecay
    columns: PairwiseDecay
    grid: Grid

    def __post_init__(self) -> None:
        _check_is_full(self.grid)

    @classmethod
    def from_gates(cls, gate_h: Tensor, gate_w: Tensor, grid: Grid) -> Self:
        """SDT Eq. 11 from two gates (B, N, H*W): gate_w decays within rows, gate_h within columns. No alpha."""
        _check_is_full(grid)
        height, width = grid.size
        return cls(
            rows=PathDecay.from_gate(to_rows(gate_w, grid).flatten(0, 1), Grid(1, width)),
            columns=PathDecay.from_gate(to_columns(gate_h, grid).flatten(0, 1), Grid(height, 1)),
            grid=grid,
        )

    @classmethod
    def constant(cls, rates: Tensor, grid: Grid) -> Self:
        """-|lambda_n| * distance along each axis, from one rate a head, (N,), nats per grid step (RMT)."""
        _check_is_full(grid)
        height, width = grid.size
        return cls(
            rows=ManhattanDecay.constant(rates, Grid(1, width)),
            columns=ManhattanDecay.constant(rates, Grid(height, 1)),
            grid=grid,
        )


def _check_is_full(grid: Grid | Positions) -> None:
    if isinstance(grid, Positions):
        raise ValueError(
            "decomposed decays need whole rows and columns: got Positions, which may leave gaps. Pass a Grid, or use "
            "another kind, for instance full."
        )
    if grid.num_prefix_tokens:
        raise ValueError(
            "decomposed decays need a grid without prefix tokens, which belong to no row or column: got "
            f"num_prefix_tokens = {grid.num_prefix_tokens}. Use another kind, for instance full."
        )
