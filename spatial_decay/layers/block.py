"""The Spatial Decay Layer: attention with decay and a feed-forward network on residual branches (SDT Fig. 1-2)."""

from torch import Tensor, nn
from typing_extensions import Unpack

from spatial_decay.features import as_tokens
from spatial_decay.layers.attention import AttentionOptions, SpatialDecayAttention
from spatial_decay.layers.depthwise_conv import DepthwiseConv
from spatial_decay.layers.kinds import DecayLike
from spatial_decay.layers.mlp import ConvMlp
from spatial_decay.layers.residual import DropPath, LayerScale
from spatial_decay.layout import LayoutLike

__all__ = ["SDTBlock"]


class SDTBlock(nn.Module):
    """x + conv(x), then x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        dim: D.
        num_heads: N.
        mlp_ratio: Width of the MLP over D.
        decay: Kind of decay with its options, see SpatialDecayMask.
        drop_path: Stochastic depth of the two branches.
        init_values: First value of LayerScale on the two branches; None leaves it out.
        pos_kernel_size: Of the depthwise convolution at the block's start, odd; 0 turns it off.
        mlp_kernel_size: Of the depthwise convolution inside the MLP, odd; 0 turns it off.
        num_prefix_tokens: P, class and register tokens, first in the sequence.
        options: Further keywords of SpatialDecayAttention.

    Raises:
        ValueError, TypeError: an option that cannot be; the message says what must hold.

    Examples:
        >>> plain = {"pos_kernel_size": 0, "mlp_kernel_size": 0}
        >>> block = SDTBlock(192, num_heads=3, num_prefix_tokens=1, **plain)
        >>> block(torch.randn(2, 1 + 14 * 14, 192)).shape
        torch.Size([2, 197, 192])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 3.0,
        decay: DecayLike = "full",
        drop_path: float = 0.0,
        init_values: float | None = None,
        pos_kernel_size: int = 3,
        mlp_kernel_size: int = 3,
        num_prefix_tokens: int = 0,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__()
        self.pos = DepthwiseConv(dim, pos_kernel_size) if pos_kernel_size else None
        self.norm1: nn.Module = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SpatialDecayAttention(dim, num_heads, decay=decay, num_prefix_tokens=num_prefix_tokens, **options)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2: nn.Module = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), kernel_size=mlp_kernel_size)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, layout: LayoutLike = None, attn_mask: Tensor | None = None) -> Tensor:
        """Attention, then the MLP, each with its residual.

        Args:
            x: Tokens (B, L, D) or a map (B, H, W, D), floating point.
            layout: (H, W), a Grid or Positions; None: a map has its own, tokens are taken as a square.
            attn_mask: Added to the decay: bool or floating point, broadcastable to (B, N, L, L).

        Returns:
            The shape of x.

        Raises:
            TypeError, ValueError: as in SpatialDecayAttention.forward.
        """
        attn = self.attn
        tokens, layout = as_tokens(x, layout, dim=attn.dim, num_prefix_tokens=attn.num_prefix_tokens)
        if self.pos is not None:
            tokens = tokens + self.pos(tokens, layout)
        tokens = tokens + self.drop_path(self.ls1(attn(self.norm1(tokens), layout, attn_mask)))
        tokens = tokens + self.drop_path(self.ls2(self.mlp(self.norm2(tokens), layout)))
        return tokens.reshape(x.shape)
