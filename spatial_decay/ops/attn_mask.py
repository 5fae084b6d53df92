"""The caller's attn_mask: what its values mean, once for all backends; and its part in rows and columns of the grid."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.features import to_columns, to_rows
from spatial_decay.layout import Grid
from spatial_decay.values import are_readable

__all__ = ["added_by", "checked_mask", "columns_of_mask", "limit_of", "rows_of_mask", "tops_of", "without"]

_MAY_NOT_ATTEND = {torch.float64: -1e5, torch.float32: -1e5, torch.bfloat16: -99840.0, torch.float16: -32752.0}
"""By dtype, the largest value that means "may not attend": -1e5 as it is written there; of float16, which ends at
-65504, half of its lowest number."""


def checked_mask(attn_mask: Tensor, q: Tensor) -> Tensor:
    """Check attn_mask against q (B, N, L, d); bool (True = may attend) or float -> a view, (B|1, N|1, L|1, L)."""
    batch_size, num_heads, num_tokens, _ = q.shape
    full_shape = (batch_size, num_heads, num_tokens, num_tokens)
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in _MAY_NOT_ATTEND:
        raise TypeError(
            "attn_mask must be bool (True = may attend) or floating point of 16 bits or more (added to the scores): "
            f"got {attn_mask.dtype}. Convert a 0/1 mask with attn_mask.bool()."
        )
    if attn_mask.device != q.device:
        raise ValueError(f"attn_mask must be on the device of q: got {attn_mask.device} and {q.device}. Move one.")
    sizes = (1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape)
    if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, full_shape, strict=True)):
        raise ValueError(
            f"attn_mask must broadcast to (B, N, L, L) = {full_shape}: got shape {tuple(attn_mask.shape)}. "
            "Pass a key mask (B, L) as attn_mask[:, None, None, :]."
        )
    return attn_mask.reshape(sizes).expand(-1, -1, -1, num_tokens)


def added_by(attn_mask: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a mask adds to the scores.

    -inf where a query may not attend: by False, or by a value of at most -1e5 or half of its own dtype's lowest number.
    Whatever else is finite is added, less the largest value of its row: the softmax is the same, and rows that are
    wholly at -10000 keep the digits of the scores.

    Args:
        attn_mask: Whole rows of it, (..., L), bool or float.
        dtype: Of what is added.
        out: Memory for it, used where it fits.

    Returns:
        What is added, (..., L), and which rows may attend to nothing, bool, (..., 1).
    """
    if attn_mask.dtype == torch.bool:
        may, may_not = (torch.full((), x, dtype=dtype, device=attn_mask.device) for x in (0.0, float("-inf")))
        return torch.where(attn_mask, may, may_not, out=out), ~attn_mask.any(-1, keepdim=True)
    limit, wide = limit_of(attn_mask.dtype), torch.promote_types(attn_mask.dtype, dtype)
    if out is None or wide != dtype:
        added = F.threshold(attn_mask, limit, float("-inf")).to(wide)  # no more than the limit: -inf
    else:
        added = torch.ops.aten.threshold.out(attn_mask, limit, float("-inf"), out=out)
    largest, is_empty = tops_of(added)
    if not are_readable(largest) or largest.any():  # else it is a copy less
        added = added - largest
    return added.to(dtype), is_empty


def limit_of(dtype: torch.dtype) -> float:
    """The largest value of a float mask of this dtype that means "may not attend"."""
    return _MAY_NOT_ATTEND[dtype]


def tops_of(attn_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row of a float mask (..., L), (..., 1), which is 0 where the row has nothing.

    Returns:
        The values, and which rows have nothing, bool.
    """
    largest = attn_mask.detach().amax(-1, keepdim=True)
    is_empty = largest <= limit_of(attn_mask.dtype)
    return largest.masked_fill(is_empty, 0.0), is_empty


def without(attn_mask: Tensor, hidden: Tensor) -> Tensor:
    """The mask, and no query may attend to what is hidden from it, bool, broadcastable to (B, N, L, L)."""
    return attn_mask & ~hidden if attn_mask.dtype == torch.bool else attn_mask.masked_fill(hidden, float("-inf"))


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
