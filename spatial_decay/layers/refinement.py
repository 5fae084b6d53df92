"""Patch Representation Refinement: attention without parameters, LocAtViT's PRR."""

from torch import Tensor, nn

from spatial_decay.ops import Backend, decay_attention

__all__ = ["PatchRepresentationRefinement"]


class PatchRepresentationRefinement(nn.Module):
    """Z = concat_n softmax(X_n X_n^T / sqrt(d)) X_n, over heads n (Hajimiri et al. 2026, LocAtViT).

    Before a class token is read out it mixes with the patches by likeness, so that the loss on it trains the patches
    too. No parameters: it can stand behind any ViT's last norm.

    Args:
        num_heads: N.
        backend: "auto", or one of decay_attention's backends.

    Raises:
        ValueError: num_heads < 1.

    Examples:
        >>> PatchRepresentationRefinement(3)(torch.randn(2, 197, 192)).shape
        torch.Size([2, 197, 192])
    """

    def __init__(self, num_heads: int, *, backend: Backend = "auto") -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be >= 1: got {num_heads}.")
        self.num_heads, self.backend = num_heads, backend

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) -> (B, L, D).

        Raises:
            ValueError: x is not (B, L, D) with D a multiple of num_heads.
        """
        if x.ndim != 3 or x.shape[-1] % self.num_heads:
            raise ValueError(
                f"x must be (B, L, D) with D a multiple of num_heads = {self.num_heads}: got shape {tuple(x.shape)}. "
                "Flatten a map to tokens first."
            )
        heads = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, N, L, d)
        return decay_attention(heads, heads, heads, backend=self.backend).transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
