"""The middle of SDT Eq. 13, once: what spatial decay does between q, k, v and the output projection."""

from torch import Tensor, nn

from spatial_decay.decay import Decay
from spatial_decay.layers.depthwise_conv import DepthwiseConv
from spatial_decay.layers.mask import SpatialDecayMask
from spatial_decay.layers.output_gate import OutputGate
from spatial_decay.layout import Layout
from spatial_decay.ops import Backend, decay_attention
from spatial_decay.ops.choice import check_backend

__all__ = ["AttentionCore", "DecayAttention", "merge_heads"]


class DecayAttention(nn.Module):
    """decay_attention as a module without parameters, so that hooks see what each layer gives it (viz.record).

    Args:
        backend: "auto", or one of decay_attention's backends.

    Raises:
        ValueError: the backend is unknown.
    """

    def __init__(self, backend: Backend = "auto") -> None:
        super().__init__()
        check_backend(backend)
        self.backend: Backend = backend

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Decay | None,
        layout: Layout,  # noqa: ARG002  for those who look on: a decay of None does not say it
        *,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """As decay_attention, (B, N, L, d)."""
        return decay_attention(
            q, k, v, decay, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


class AttentionCore(nn.Module):
    """U * [softmax(R(Q) R(K)^T / sqrt(d) + M_decay) V + LPE(V)]        (Mao et al. 2025, Eq. 13)

    for queries, keys and values that somebody else has made: SpatialDecayAttention, or the attention module of another
    library. Subclasses set the four parts.

    Attributes:
        decay: Makes M_decay.
        lpe: Local position encoding of the values, or None.
        output_gate: U, or None.
        attention: The softmax.
    """

    decay: SpatialDecayMask
    lpe: DepthwiseConv | None
    output_gate: OutputGate | None
    attention: DecayAttention

    @property
    def backend(self) -> Backend:
        """That of the softmax."""
        return self.attention.backend

    def describe(self, tokens: Tensor, q: Tensor, layout: Layout) -> Decay | None:
        """The decay of tokens (B, L, D) or, where the kind reads them, of their queries (B, N, L, d).

        Args:
            tokens: (B, L, D).
            q: Queries, (B, N, L, d).
            layout: Where the L tokens lie.

        Returns:
            What is added to the scores; None for kind `none`.
        """
        return self.decay.describe_tokens(merge_heads(q) if self.decay.kind.reads_queries else tokens, layout)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Decay | None,
        tokens: Tensor,
        layout: Layout,
        *,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """Eq. 13 before the output projection.

        Args:
            q: Queries, turned by the rotary embedding, (B, N, L, d).
            k: Keys, the same.
            v: Values, the same shape.
            decay: Of describe.
            tokens: What q, k and v were made of, (B, L, D): U reads them.
            layout: Where they lie.
            attn_mask: As in decay_attention.
            dropout_p: As in decay_attention.
            scale: As in decay_attention.

        Returns:
            (B, L, N * d).
        """
        out = self.attention(q, k, v, decay, layout, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale)
        out = merge_heads(out)  # (B, L, N * d)
        if self.lpe is not None:
            out = out + self.lpe(merge_heads(v), layout)
        if self.output_gate is not None:
            out = out * self.output_gate(tokens)
        return out


def merge_heads(x: Tensor) -> Tensor:
    """(B, N, L, d) -> (B, L, N * d)."""
    return x.transpose(1, 2).flatten(2)
