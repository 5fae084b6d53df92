"""The arrangement of two decays along the axes of the grid: SDT Eq. 11-12 (`decomposed`) and RMT's first stages."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Self

from spatial_decay.decay.base import PairwiseDecay
from spatial_decay.decay.manhattan import ManhattanDecay
from spatial_decay.decay.path import PathDecay
from spatial_decay.features import to_columns, to_rows
from spatial_decay.layout import Grid, Layout

__all__ = ["AxialDecay"]


@dataclass(frozen=True, repr=False)
class AxialDecay:
    """Attention over each row first, then over each column of the result (SDT Eq. 12, O = Attn_H(Attn_W V)).

    Args:
        rows: The decay within rows, for B * H sequences of W tokens: tensors (B * H, N, W), or 1 for B * H.
        columns: The decay within columns, for B * W sequences of H tokens: tensors (B * W, N, H), or 1 for B * W.
        layout: The grid of all tokens. It has no prefix tokens: they belong to no row or column.
    """

    rows: PairwiseDecay
    columns: PairwiseDecay
    layout: Grid

    def __post_init__(self) -> None:
        _checked(self.layout)

    def __repr__(self) -> str:
        kinds = {type(decay).__name__: None for decay in (self.rows, self.columns)}
        return f"AxialDecay({' and '.join(kinds)} of rows and of columns, {self.layout})"

    @classmethod
    def from_gates(cls, gate_h: Tensor, gate_w: Tensor, layout: Layout) -> Self:
        """SDT Eq. 11 from two gates (B, N, H * W): gate_w decays within rows, gate_h within columns. No alpha.

        Args:
            gate_h: Gate within columns, (B, N, H * W), <= 0, nats per grid step.
            gate_w: Gate within rows, the same.
            layout: A Grid without prefix tokens.

        Returns:
            Two path decays.

        Raises:
            ValueError: the layout is no grid without prefix tokens.
        """
        grid = _checked(layout)
        height, width = grid.size
        return cls(
            rows=PathDecay.from_gate(to_rows(gate_w, grid).flatten(0, 1), Grid(1, width)),
            columns=PathDecay.from_gate(to_columns(gate_h, grid).flatten(0, 1), Grid(height, 1)),
            layout=grid,
        )

    @classmethod
    def constant(cls, rates_h: Tensor, rates_w: Tensor, layout: Layout) -> Self:
        """-|lambda_n| * distance along each axis, from one rate a head and axis, (N,), nats per grid step (RMT).

        Args:
            rates_h: lambda_n within columns, (N,), nats per grid step.
            rates_w: lambda_n within rows, the same; RMT has one for both.
            layout: A Grid without prefix tokens.

        Returns:
            Two Manhattan decays.

        Raises:
            ValueError: the layout is no grid without prefix tokens.
        """
        grid = _checked(layout)
        height, width = grid.size
        return cls(
            rows=ManhattanDecay.constant(rates_w, Grid(1, width)),
            columns=ManhattanDecay.constant(rates_h, Grid(height, 1)),
            layout=grid,
        )


def _checked(layout: Layout) -> Grid:
    grid = layout.as_grid("a decomposed decay", "Pass a Grid, or use another kind, for instance full.")
    if grid.num_prefix_tokens:
        raise ValueError(
            "decomposed decays need a grid without prefix tokens, which belong to no row or column: got "
            f"num_prefix_tokens = {grid.num_prefix_tokens}. Use another kind, for instance full."
        )
    return grid
