"""The caller's attn_mask: checked, and cut to rows and to columns of the grid."""

import torch
from torch import Tensor

from spatial_decay.features import to_columns, to_rows
from spatial_decay.layout import Grid

__all__ = ["as_float_mask", "columns_of_mask", "rows_of_mask"]


def as_float_mask(attn_mask: Tensor, q: Tensor) -> Tensor:
    """Check attn_mask against q (B, N, L, d); bool (True = may attend) or float -> (B|1, N|1, L|1, L), dtype of q."""
    batch_size, num_heads, num_tokens, _ = q.shape
    full_shape = (batch_size, num_heads, num_tokens, num_tokens)
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(
            f"attn_mask must be bool (True = may attend) or floating point (added to the scores): got "
            f"{attn_mask.dtype}. Convert a 0/1 mask with attn_mask.bool()."
        )
    if attn_mask.device != q.device:
        raise ValueError(f"attn_mask must be on the device of q: got {attn_mask.device} and {q.device}. Move one.")
    sizes = (1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape)
    if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, full_shape, strict=True)):
        raise ValueError(
            f"attn_mask must broadcast to (B, N, L, L) = {full_shape}: got shape {tuple(attn_mask.shape)}. "
            "Pass a key mask (B, L) as attn_mask[:, None, None, :]."
        )
    attn_mask = attn_mask.reshape(sizes).expand(-1, -1, -1, num_tokens)
    if attn_mask.dtype != torch.bool:
        return attn_mask.to(q.dtype)
    may_attend = torch.zeros((), dtype=q.dtype, device=q.device)
    return torch.where(attn_mask, may_attend, float("-inf"))


def rows_of_mask(attn_mask: Tensor, batch_size: int, grid: Grid) -> Tensor:
    """The pairs that share a row: (B|1, N|1, L|1, L) -> (B*H, N|1, W|1, W)."""
    if attn_mask.shape[2] == 1:
        return to_rows(attn_mask[:, :, 0].expand(batch_size, -1, -1), grid).flatten(0, 1)[:, :, None]
    pairs = _expand_to_grid(attn_mask, batch_size, grid).diagonal(dim1=2, dim2=4)  # (B, N|1, W, W, H)
    return pairs.permute(0, 4, 1, 2, 3).flatten(0, 1)


def columns_of_mask(attn_mask: Tensor, batch_size: int, grid: Grid) -> Tensor:
    """The pairs that share a column: (B|1, N|1, L|1, L) -> (B*W, N|1, H|1, H)."""
    if attn_mask.shape[2] == 1:
        return to_columns(attn_mask[:, :, 0].expand(batch_size, -1, -1), grid).flatten(0, 1)[:, :, None]
    pairs = _expand_to_grid(attn_mask, batch_size, grid).diagonal(dim1=3, dim2=5)  # (B, N|1, H, H, W)
    return pairs.permute(0, 4, 1, 2, 3).flatten(0, 1)


def _expand_to_grid(attn_mask: Tensor, batch_size: int, grid: Grid) -> Tensor:
    expanded = attn_mask.expand(batch_size, -1, grid.num_tokens, grid.num_tokens)
    return expanded.unflatten(3, grid.size).unflatten(2, grid.size)  # (B, N|1, H, W, H, W), a view
