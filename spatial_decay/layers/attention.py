"""Spatial Decay Attention, the whole of SDT Eq. 13: gate, rotary embedding, LPE, output gate, projections."""

from typing import TypedDict

from einops import rearrange
from torch import Tensor, nn

from spatial_decay.decay import Decay
from spatial_decay.features import as_tokens
from spatial_decay.layers.core import AttentionCore, DecayAttention
from spatial_decay.layers.depthwise_conv import DepthwiseConv
from spatial_decay.layers.initial import fill_skipped
from spatial_decay.layers.kinds import DecayLike
from spatial_decay.layers.mask import SpatialDecayMask
from spatial_decay.layers.output_gate import OutputGate
from spatial_decay.layers.rotary import RopeMode, RotaryEmbedding
from spatial_decay.layout import GridSize, Layout, LayoutLike
from spatial_decay.ops import Backend, attention_weights
from spatial_decay.precision import check_like_weights

__all__ = ["AttentionOptions", "SpatialDecayAttention"]


class AttentionOptions(TypedDict, total=False):
    """The keywords of SpatialDecayAttention that blocks and backbones hand on to it, the same for all blocks."""

    qkv_bias: bool
    qk_norm: bool
    rope: RopeMode
    rope_reference_grid: GridSize | None
    lpe_kernel_size: int
    gate_rank: int
    attn_drop: float
    proj_drop: float
    backend: Backend


class SpatialDecayAttention(AttentionCore):
    """Multi-head self-attention with spatial decay.

    O = U * [softmax(R(Q) R(K)^T / sqrt(d) + M_decay) V + LPE(V)]        (Mao et al. 2025, Eq. 13)

    followed by the output projection. It takes the place of a ViT's attention: (B, L, D) in and out, or maps
    (B, H, W, D) in and out, of any size at each call.

    Args:
        dim: D.
        num_heads: N; D must be a multiple of it.
        decay: Kind of decay with its options, see SpatialDecayMask.
        qkv_bias: Bias of the projection to q, k and v.
        qk_norm: LayerNorm of q and k over d, before the rotary embedding.
        rope: "axial", "flat" or "none", see RotaryEmbedding.
        rope_reference_grid: (H, W) of the patch tokens trained on, for images of other sizes, see RotaryEmbedding.
            None: off.
        lpe_kernel_size: Kernel of the depthwise convolution on V, odd; 0 turns LPE off.
        gate_rank: Rank of the output gate U; 0 turns it off.
        num_prefix_tokens: P, class and register tokens, first in the sequence.
        attn_drop: Dropout of attention weights.
        proj_drop: Dropout of the output.
        backend: "auto", or one of decay_attention's backends.

    Raises:
        TypeError, ValueError: an option that cannot be; the message says what must hold.

    Examples:
        >>> attn = SpatialDecayAttention(192, num_heads=3, num_prefix_tokens=1)
        >>> attn(torch.randn(2, 1 + 14 * 14, 192)).shape
        torch.Size([2, 197, 192])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        decay: DecayLike = "full",
        qkv_bias: bool = True,
        qk_norm: bool = False,
        rope: RopeMode = "axial",
        rope_reference_grid: GridSize | None = None,
        lpe_kernel_size: int = 5,
        gate_rank: int = 16,
        num_prefix_tokens: int = 0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"dim must be a multiple of num_heads: got dim = {dim}, num_heads = {num_heads}. Change one of the two."
            )
        if not 0.0 <= attn_drop < 1.0:
            raise ValueError(f"attn_drop must satisfy 0 <= attn_drop < 1: got {attn_drop}.")
        self.dim, self.num_heads, self.num_prefix_tokens = dim, num_heads, num_prefix_tokens
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.rope = RotaryEmbedding(self.head_dim, rope, rope_reference_grid)
        self.decay = SpatialDecayMask(dim, num_heads, decay=decay, num_prefix_tokens=num_prefix_tokens)
        self.attention = DecayAttention(backend)
        self.attn_drop = attn_drop
        self.lpe = DepthwiseConv(dim, lpe_kernel_size) if lpe_kernel_size else None
        self.output_gate = OutputGate(dim, gate_rank) if gate_rank else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        fill_skipped(self.qkv, self.proj)

    def forward(self, x: Tensor, layout: LayoutLike = None, attn_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: Tokens (B, L, D) or a map (B, H, W, D), floating point.
            layout: (H, W) of the patch tokens, a Grid, or Positions of all L tokens that fill no grid. None: a map has
                its own; tokens are taken as a square. Positions need lpe_kernel_size=0, rope "axial" or "none", and a
                kind that takes them, see SpatialDecayMask.describe; with rope_reference_grid also a grid_size.
            attn_mask: Added to the decay: bool (True = may attend) or floating point, broadcastable to (B, N, L, L).
                It masks attention only: LPE and other convolutions still see neighbours that it hides.

        Returns:
            The shape of x.

        Raises:
            TypeError, ValueError: x, layout or attn_mask do not fit; the message says what must hold.
        """
        tokens, layout = self._tokens(x, layout)
        q, k, v, decay = self._heads(tokens, layout)
        dropout_p = self.attn_drop if self.training else 0.0
        out = self.attend(q, k, v, decay, tokens, layout, attn_mask=attn_mask, dropout_p=dropout_p)  # (B, L, D)
        return self.proj_drop(self.proj(out)).reshape(x.shape)

    def attention_weights(self, x: Tensor, layout: LayoutLike = None, attn_mask: Tensor | None = None) -> Tensor:
        """The softmax of Eq. 13 for these features, to look at.

        Args:
            x: Tokens (B, L, D) or a map (B, H, W, D), floating point.
            layout: (H, W), a Grid or Positions; None: a map has its own, tokens are taken as a square.
            attn_mask: Added to the decay: bool or floating point, broadcastable to (B, N, L, L).

        Returns:
            (B, N, L, L), float32 at least; each row adds up to 1.

        Raises:
            TypeError, ValueError: as in forward.
        """
        q, k, _, decay = self._heads(*self._tokens(x, layout))
        return attention_weights(q, k, decay, attn_mask=attn_mask)

    def _tokens(self, x: Tensor, layout: LayoutLike) -> tuple[Tensor, Layout]:
        tokens, layout = as_tokens(x, layout, dim=self.dim, num_prefix_tokens=self.num_prefix_tokens)
        check_like_weights("x", x, getattr(self.qkv, "weight", None))
        return tokens, layout

    def _heads(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Decay | None]:
        """Tokens (B, L, D) -> queries and keys with rotary embedding, values, (B, N, L, d) each, and the decay."""
        # By d, not N: under tensor parallelism a process has only some of the heads.
        # Unbound before the transposition: so the three gradients are put together as qkv lies in memory, in one copy.
        qkv = rearrange(self.qkv(tokens), "b l (three n d) -> b l three n d", three=3, d=self.head_dim)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        q, k = self.q_norm(q), self.k_norm(k)
        decay = self.describe(tokens, q, layout)
        return *self.rope(q, k, layout), v, decay
