"""From features to a decay: the modules of a kind, and what they add as a description or as a mask (SDT Eq. 4-11)."""

from torch import Tensor, nn

from spatial_decay.decay import AxialDecay, Decay, PairwiseDecay, dense
from spatial_decay.features import as_tokens
from spatial_decay.layers.kinds import DecayLike, as_kind
from spatial_decay.layout import Layout, LayoutLike
from spatial_decay.ops.sdpa import row_multiple

__all__ = ["SpatialDecayMask"]


class SpatialDecayMask(nn.Module):
    """What spatial decay adds to the attention scores of these features.

    | kind | what is added to the score of query i and key j | source |
    |---|---|---|
    | `full` | -abs((G_i + G_j) / 2 * d_M(i, j) * alpha) | SDT Eq. 7-9 |
    | `fixed` | -abs(lambda_n) * d_M(i, j) | RMT; SDT Table 3 |
    | `learned` | -softplus(lambda_n) * d_M(i, j), lambda_n trained | |
    | `alibi` | -m_n * sqrt(dh^2 + dw^2) | 2-D ALiBi, CROMA |
    | `1d` | -sum of abs(g_k), k = min(i, j) .. max(i, j) - 1 over the raster sequence | SDT Eq. 6 |
    | `bidirectional` | the mean of a forward and a backward `1d` with a gate each | SDT Table 4 |
    | `decomposed` | `1d` within rows, then within columns, a gate each; no alpha | SDT Eq. 11-12 |
    | `fixed_decomposed` | -abs(lambda_n) * distance within rows, then within columns | RMT's first stages |
    | `gaussian` | a_i * exp(-(dh^2 / s_h,i + dw^2 / s_w,i) / 2) | LocAtViT |
    | `squared` | (G_i + G_j) / 2 * (dh^2 + dw^2) * alpha | `full`, with another distance |
    | `none` | nothing | SDT Table 3 |

    The features of kind `gaussian` are the queries, heads side by side; of the others, what the queries are made of.

    Args:
        dim: D, width of the features.
        num_heads: N.
        decay: Kind of decay: a name of the table, a value such as kinds.Full(alpha=0.2), or a mapping
            {"kind": "full", "alpha": 0.2}. Options that are left out are the paper's.
        num_prefix_tokens: P, class and register tokens, first in the sequence. Nothing is added to any score that they
            take part in. The decomposed kinds have no place for them.

    Attributes:
        kind: The value, with every option resolved.

    Raises:
        TypeError, ValueError: an unknown kind, or options that it has not or that cannot be; prefix tokens with a
            decomposed kind; num_heads < 1.

    Examples:
        >>> mask = SpatialDecayMask(dim=192, num_heads=3, num_prefix_tokens=1)
        >>> x = torch.randn(2, 1 + 14 * 14, 192)
        >>> mask(x).shape
        torch.Size([2, 3, 197, 197])
    """

    def __init__(self, dim: int, num_heads: int, *, decay: DecayLike = "full", num_prefix_tokens: int = 0) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be >= 1: got {num_heads}.")
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens must be >= 0: got {num_prefix_tokens}.")
        self.kind = as_kind(decay).resolved()
        self.kind.check(num_heads)
        self._check_takes(num_prefix_tokens)
        self.dim, self.num_heads, self.num_prefix_tokens = dim, num_heads, num_prefix_tokens
        for name, module in self.kind.modules(dim, num_heads).items():
            self.add_module(name, module)

    def describe(self, x: Tensor, layout: LayoutLike = None) -> Decay | None:
        """The decay as a description that no one has to materialise, for decay_attention.

        Args:
            x: Tokens (B, L, D) or a map (B, H, W, D), floating point.
            layout: (H, W) of the patch tokens, a Grid, or Positions of all L tokens. None: a map has its own; tokens
                are taken as a square. Not Positions for the decomposed kinds, nor for `gaussian`, whose width depends
                on the grid; for a kind with a reference_grid with their grid_size.

        Returns:
            A ManhattanDecay, EuclideanDecay, SquaredDecay, PathDecay, GaussianDecay or AxialDecay, float32 at least;
            None for kind `none`.

        Raises:
            TypeError, ValueError: x or layout do not fit, see the message.
        """
        tokens, layout = as_tokens(x, layout, dim=self.dim, num_prefix_tokens=self.num_prefix_tokens)
        return self.describe_tokens(tokens, layout)

    def describe_tokens(self, tokens: Tensor, layout: Layout) -> Decay | None:
        """describe, of tokens and a layout that fit: it may have text besides, before the layer's prefix tokens.

        Args:
            tokens: (B, L, D).
            layout: Where they lie.

        Returns:
            As describe.

        Raises:
            ValueError: the kind cannot take this layout.
        """
        if self.kind.needs_grid:
            grid = layout.as_grid(f"kind {self.kind.name!r}", "Use another kind, for instance 'full'.")
            self._check_takes(grid.num_prefix_tokens)
        return self.kind.describe(self, tokens, layout)

    def forward(self, x: Tensor, layout: LayoutLike = None) -> Tensor | tuple[Tensor, Tensor] | None:
        """The decay as attn_mask for F.scaled_dot_product_attention, in the dtype of x.

        Args:
            x: Tokens (B, L, D) or a map (B, H, W, D), as in describe.
            layout: As in describe.

        Returns:
            (B, N, L, L). For decomposed kinds the pair M_H (B, W, N, H, H), M_W (B, H, N, W, W). None for `none`.

        Raises:
            TypeError, ValueError: x or layout do not fit, see the message.
        """
        decay = self.describe(x, layout)
        if decay is None:
            return None
        batch_size = x.shape[0]
        if not isinstance(decay, AxialDecay):
            return self._dense(decay, x, batch_size)
        height, width = decay.layout.size
        columns = self._dense(decay.columns, x, batch_size * width)
        rows = self._dense(decay.rows, x, batch_size * height)
        return columns.unflatten(0, (batch_size, width)), rows.unflatten(0, (batch_size, height))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, decay={self.kind}"

    def _check_takes(self, num_prefix_tokens: int) -> None:
        if num_prefix_tokens and not self.kind.takes_prefix_tokens:
            raise ValueError(
                f"kind {self.kind.name!r} needs num_prefix_tokens = 0, because class, register and text tokens belong "
                f"to no row or column: got num_prefix_tokens={num_prefix_tokens}. Use another kind, such as 'full'."
            )

    def _dense(self, decay: PairwiseDecay, x: Tensor, num_sequences: int) -> Tensor:
        mask = dense(decay, dtype=x.dtype, row_multiple=row_multiple(x.device))
        return mask.expand(num_sequences, -1, -1, -1)
