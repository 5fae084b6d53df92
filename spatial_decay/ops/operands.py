"""What the operators of triton and of native need alike of their tensors: memory in the order that others want."""

from torch import Tensor

__all__ = ["empty_heads", "summed_as", "with_features_together"]


def with_features_together(x: Tensor) -> Tensor:
    """x with neighbouring features beside each other in memory; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_heads(q: Tensor) -> Tensor:
    """(B, N, L, d) or (B, O, N, L, d) as q, all features of a token together in memory, as the output projection wants.

    Columns, (B, W, N, H, d), lie as maps (B, H, W, N, d) do: see to_columns.
    """
    if q.ndim == 4:
        batch_size, num_heads, length, head_dim = q.shape
        return q.new_empty((batch_size, length, num_heads, head_dim)).transpose(1, 2)
    batch_size, lines, num_heads, length, head_dim = q.shape
    if q.stride(3) > q.stride(1):
        return q.new_empty((batch_size, length, lines, num_heads, head_dim)).permute(0, 2, 3, 1, 4)
    return q.new_empty((batch_size, lines, length, num_heads, head_dim)).transpose(2, 3)


def summed_as(dnumbers: Tensor, numbers: Tensor) -> Tensor:
    """Gradients of each sequence's numbers, (M, S, N, L), as the numbers, (M, S|1, N, L): summed where shared."""
    return dnumbers.sum(1, keepdim=True) if numbers.shape[1] == 1 and dnumbers.shape[1] != 1 else dnumbers
