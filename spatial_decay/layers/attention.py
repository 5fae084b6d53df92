"""Spatial Decay Attention, the whole of SDT Eq. 13: gate, rotary embedding, LPE, output gate, projections."""

from typing import TypedDict

from einops import rearrange
from torch import Tensor, nn

from spatial_decay.decay import Decay
from spatial_decay.grid import Grid, GridSize
from spatial_decay.layers.local_position import DepthwiseConv
from spatial_decay.layers.mask import SpatialDecayMask
from spatial_decay.layers.output_gate import OutputGate
from spatial_decay.layers.rotary import RotaryEmbedding
from spatial_decay.ops import attention_weights, decay_attention
from spatial_decay.ops.choice import check_backend
from spatial_decay.positions import Positions, as_placed_tokens
from spatial_decay.precision import check_like_weights

__all__ = ["AttentionOptions", "SpatialDecayAttention"]


class AttentionOptions(TypedDict, total=False):
    """The keywords of SpatialDecayAttention that blocks and backbones hand on to it, the same for all blocks."""

    alpha: float
    qkv_bias: bool
    qk_norm: bool
    rope: str
    lpe_kernel_size: int
    gate_rank: int
    gate_bias: bool
    gate_bias_init: float
    causal: bool
    initial_value: float
    initial_grid_size: GridSize
    attn_drop: float
    proj_drop: float
    backend: str


class SpatialDecayAttention(nn.Module):
    """Multi-head self-attention that fades with distance, as fast as each token says.

    O = U * [softmax(R(Q) R(K)^T / sqrt(d) + M_decay) V + LPE(V)]        (Mao et al. 2025, Eq. 13)

    followed by the output projection. It takes the place of a ViT's attention: (B, L, D) in and out, or maps
    (B, H, W, D) in and out, of any size at each call.

    Args:
        dim: D.
        num_heads: N; D must be a multiple of it.
        decay: Kind of decay, see SpatialDecayMask.
        alpha: Scale of kind `full`, > 0.
        qkv_bias: Bias of the projection to q, k and v.
        qk_norm: LayerNorm of q and k over d, before the rotary embedding.
        rope: "axial", "flat" or "none", see RotaryEmbedding.
        lpe_kernel_size: Kernel of the depthwise convolution on V, odd; 0 turns LPE off.
        gate_rank: Rank of the output gate U; 0 turns it off.
        num_prefix_tokens: P, class and register tokens, first in the sequence.
        gate_bias: Give the decay's gates a trained bias.
        gate_bias_init: Its first value, see ContextAwareGate.
        causal: Kind `1d` only, see SpatialDecayMask.
        initial_value: Fixed kinds only, see SpatialDecayMask.
        heads_range: Fixed kinds only, see SpatialDecayMask.
        initial_grid_size: Kind `gaussian` only, see GaussianGate.
        attn_drop: Dropout of attention weights.
        proj_drop: Dropout of the output.
        backend: "auto", or one of decay_attention's backends.

    Raises:
        ValueError: an option that cannot be; the message says what must hold.

    Example:
        >>> attn = SpatialDecayAttention(192, num_heads=3, num_prefix_tokens=1)
        >>> attn(torch.randn(2, 1 + 14 * 14, 192)).shape
        torch.Size([2, 197, 192])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        decay: str = "full",
        alpha: float = 0.1,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        rope: str = "axial",
        lpe_kernel_size: int = 5,
        gate_rank: int = 16,
        num_prefix_tokens: int = 0,
        gate_bias: bool = False,
        gate_bias_init: float = 0.0,
        causal: bool = False,
        initial_value: float = 2.0,
        heads_range: float = 4.0,
        initial_grid_size: GridSize = (14, 14),
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"dim must be a multiple of num_heads: got dim = {dim}, num_heads = {num_heads}. Change one of the two."
            )
        if gate_rank < 0:
            raise ValueError(f"gate_rank must be >= 0 (0 turns the output gate off): got {gate_rank}.")
        if not 0.0 <= attn_drop < 1.0:
            raise ValueError(f"attn_drop must satisfy 0 <= attn_drop < 1: got {attn_drop}.")
        check_backend(backend)
        self.dim, self.num_heads, self.num_prefix_tokens = dim, num_heads, num_prefix_tokens
        self.head_dim = dim // num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.rope = RotaryEmbedding(self.head_dim, rope)
        self.decay = SpatialDecayMask(
            dim,
            num_heads,
            kind=decay,
            alpha=alpha,
            num_prefix_tokens=num_prefix_tokens,
            gate_bias=gate_bias,
            gate_bias_init=gate_bias_init,
            causal=causal,
            initial_value=initial_value,
            heads_range=heads_range,
            initial_grid_size=initial_grid_size,
        )
        self.attn_drop = attn_drop
        self.lpe = DepthwiseConv(dim, lpe_kernel_size) if lpe_kernel_size else None
        self.output_gate = OutputGate(dim, gate_rank) if gate_rank else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        grid_size: GridSize | None = None,
        attn_mask: Tensor | None = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: Tokens (B, L, D) or a map (B, H, W, D), floating point.
            grid_size: (H, W) of the patch tokens. None: a map has its own; tokens are taken as a square.
            attn_mask: Added to the decay: bool (True = may attend) or floating point, broadcastable to (B, N, L, L).
                It masks attention only: LPE and other convolutions still see neighbours that it hides.
            positions: Of all L tokens that fill no grid, in place of grid_size and num_prefix_tokens. Needs
                lpe_kernel_size=0, rope "axial" or "none", and a kind that takes them, see SpatialDecayMask.bias.

        Returns:
            The shape of x.

        Raises:
            TypeError, ValueError: x, grid_size, attn_mask or positions do not fit; the message says what must hold.
        """
        tokens, grid = self._tokens(x, grid_size, positions)
        q, k, v, bias = self._heads(tokens, grid)
        out = decay_attention(
            q,
            k,
            v,
            bias,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop if self.training else 0.0,
            backend=self.backend,
        )
        out = _merge_heads(out)  # (B, L, D)
        if self.lpe is not None:
            out = out + self.lpe(_merge_heads(v), grid)
        if self.output_gate is not None:
            out = out * self.output_gate(tokens)
        out = self.proj_drop(self.proj(out))
        return out.reshape(x.shape)

    def attention_weights(
        self,
        x: Tensor,
        grid_size: GridSize | None = None,
        attn_mask: Tensor | None = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """The softmax of Eq. 13 for these features, (B, N, L, L), to look at; arguments as in forward."""
        tokens, grid = self._tokens(x, grid_size, positions)
        q, k, _, bias = self._heads(tokens, grid)
        return attention_weights(q, k, bias, attn_mask=attn_mask)

    def decay_features(self, x: Tensor) -> Tensor:
        """What self.decay reads of tokens (B, L, D): the tokens, or for kind `gaussian` their queries, (B, L, D)."""
        if self.decay.kind != "gaussian":
            return x
        queries = self.qkv(x)[..., : self.dim].unflatten(-1, (self.num_heads, -1))
        return self.q_norm(queries).flatten(-2)

    def _tokens(
        self, x: Tensor, grid_size: GridSize | None, positions: Positions | None
    ) -> tuple[Tensor, Grid | Positions]:
        tokens, grid = as_placed_tokens(
            x, positions, dim=self.dim, grid_size=grid_size, num_prefix_tokens=self.num_prefix_tokens
        )
        check_like_weights("x", x, getattr(self.qkv, "weight", None))
        return tokens, grid

    def _heads(self, tokens: Tensor, grid: Grid | Positions) -> tuple[Tensor, Tensor, Tensor, Decay | None]:
        """Tokens (B, L, D) -> queries and keys with rotary embedding, values, (B, N, L, d) each, and the decay."""
        # Unbound before the transposition: so the three gradients are put together in the layout of qkv, in one copy.
        qkv = rearrange(self.qkv(tokens), "b l (three n d) -> b l three n d", three=3, n=self.num_heads)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        q, k = self.q_norm(q), self.k_norm(k)
        bias = self.decay.describe(_merge_heads(q) if self.decay.kind == "gaussian" else tokens, grid)
        return *self.rope(q, k, grid), v, bias


def _merge_heads(x: Tensor) -> Tensor:
    """(B, N, L, d) -> (B, L, N*d)."""
    return rearrange(x, "b n l d -> b l (n d)")
