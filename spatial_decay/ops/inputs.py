"""What a backend is given: the checked tensors of one attention, over all tokens or along an axis of the grid."""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from spatial_decay.decay import AxialDecay, Decay, PairwiseDecay, dense
from spatial_decay.features import columns_of_rows, to_columns, to_rows
from spatial_decay.ops.attn_mask import added_by, checked_mask, columns_of_mask, rows_of_mask, without
from spatial_decay.precision import autocast_dtype
from spatial_decay.values import are_readable, is_jit_tracing

__all__ = ["Inputs", "along_columns", "along_rows", "checked_inputs", "total_mask"]


@dataclass(frozen=True)
class Inputs:
    """One attention, checked.

    Args:
        q: Queries, (B, N, L, d), floating point; or, along an axis of the grid, (B, O, N, L, d): the O rows or columns
            of each image as they lie in memory. Then decay and attn_mask are those of B * O sequences.
        k: Keys, the same.
        v: Values, the same.
        decay: What is added to the scores, or None.
        attn_mask: The caller's own, (B|1, N|1, L|1, L), or None; what it adds to the scores says added_by.
        dropout_p: 0 <= dropout_p < 1.
        scale: Multiplies Q K^T.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: PairwiseDecay | None
    attn_mask: Tensor | None
    dropout_p: float
    scale: float

    @property
    def length(self) -> int:
        """L."""
        return self.q.shape[-2]

    @property
    def head_dim(self) -> int:
        """d."""
        return self.q.shape[-1]

    @property
    def num_scores(self) -> int:
        """B * N * L * L, of all sequences."""
        return self.q.shape[:-1].numel() * self.length

    def sequences(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as (S, N, L, d); columns of a grid are copied."""
        q, k, v = (x.flatten(0, -4) for x in (self.q, self.k, self.v))
        return q, k, v

    @property
    def of_decay(self) -> tuple[Tensor, ...]:
        """What the decay is made from: its numbers, and the tensors of where its tokens lie."""
        return () if self.decay is None else (*self.decay.numbers, *self.decay.layout.tensors)

    @property
    def needs_grad(self) -> bool:
        """Whether anything but attn_mask will get a gradient."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v, *self.of_decay))

    @property
    def is_exporting(self) -> bool:
        """Whether torch.export traces; torch 2.6 does not tell."""
        return getattr(torch.compiler, "is_exporting", bool)()

    @property
    def transforms(self) -> list[str]:
        """What is done with any of the tensors for which operators of our own have no rules, as reasons."""
        if torch.compiler.is_compiling():
            return []
        reasons = []
        if any(map(torch._C._functorch.is_functorch_wrapped_tensor, self._tensors)):
            reasons.append("inside a torch.func transform (needs none)")
        reasons += self.forward_mode
        if is_jit_tracing():
            reasons.append("torch.jit.trace, which cannot record such an operator (needs torch.export)")
        return reasons

    @property
    def forward_mode(self) -> list[str]:
        """Whether a tensor carries a tangent, as a reason; torch.func.jvp's are hidden in its own."""
        if torch.compiler.is_compiling() or forward_ad._current_level < 0:
            return []
        has_tangent = any(forward_ad.unpack_dual(x).tangent is not None for x in self._tensors)
        return ["forward-mode derivatives (needs none)"] if has_tangent else []

    @property
    def _tensors(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.attn_mask, *self.of_decay) if x is not None]

    def shared_reasons(self) -> list[str]:
        """What no backend can but `sdpa` and `math`."""
        reasons = []
        if self.dropout_p:
            reasons.append(f"dropout_p={self.dropout_p} (needs 0)")
        if self.attn_mask is not None and self.attn_mask.requires_grad and torch.is_grad_enabled():
            reasons.append("attn_mask requires grad (needs one without)")
        positions = () if self.decay is None else self.decay.layout.tensors
        if any(x.requires_grad for x in positions) and torch.is_grad_enabled():
            reasons.append("the positions of tokens require grad (needs some without)")
        if self.is_exporting and _is_in_onnx_export():
            reasons.append("torch.onnx.export traces, and ONNX has no such operator (needs PyTorch)")
        return reasons + self.transforms


def _is_in_onnx_export() -> bool:
    onnx = sys.modules.get("torch.onnx")  # it is large, and loaded by then
    return onnx is not None and onnx.is_in_onnx_export()


# What torch.compiler.assume_constant_result does, without its import of the compiler. Tracing through, torch takes
# is_in_onnx_export() as False, and torch.onnx.export, which tries both ways, would never tell why the first one failed.
_is_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a function


def checked_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay | None,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> Inputs:
    """Check all that a caller can get wrong, once; raise TypeError or ValueError.

    Under autocast q, k and v come down to its dtype, as for F.scaled_dot_product_attention; the decay does not.
    An AxialDecay is checked and left out: it is for along_rows and along_columns.
    """
    dtype = autocast_dtype(q.device)
    if dtype is not None:
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    _check_heads(q, k, v)
    _check_decay(q, decay)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must satisfy 0 <= dropout_p < 1: got {dropout_p}.")
    _check_scale(scale)
    if attn_mask is not None:
        attn_mask = _without_later(checked_mask(attn_mask, q), decay)
    return Inputs(
        q,
        k,
        v,
        decay=None if isinstance(decay, AxialDecay) else decay,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )


def along_rows(whole: Inputs, decay: AxialDecay) -> Inputs:
    """The first softmax of Eq. 12: H sequences of W tokens in each image."""
    grid, mask = decay.layout, whole.attn_mask
    if mask is not None:
        mask = _without_later(rows_of_mask(mask, whole.q.shape[0], grid), decay.rows)
    return Inputs(
        to_rows(whole.q, grid),
        to_rows(whole.k, grid),
        to_rows(whole.v, grid),
        decay=decay.rows,
        attn_mask=mask,
        dropout_p=whole.dropout_p,
        scale=whole.scale,
    )


def along_columns(whole: Inputs, decay: AxialDecay, v_rows: Tensor) -> Inputs:
    """The second softmax of Eq. 12: W sequences of H tokens; v_rows is the first one's output, (B, H, N, W, d)."""
    grid, mask = decay.layout, whole.attn_mask
    if mask is not None:
        mask = _without_later(columns_of_mask(mask, whole.q.shape[0], grid), decay.columns)
    return Inputs(
        to_columns(whole.q, grid),
        to_columns(whole.k, grid),
        columns_of_rows(v_rows),
        decay=decay.columns,
        attn_mask=mask,
        dropout_p=whole.dropout_p,
        scale=whole.scale,
    )


def total_mask(inputs: Inputs, *, dtype: torch.dtype, row_multiple: int = 1) -> tuple[Tensor | None, Tensor | None]:
    """Decay and attn_mask as one mask, and the queries that it leaves nothing to attend to.

    Args:
        inputs: Of one attention.
        dtype: Of the mask.
        row_multiple: As in dense.

    Returns:
        The mask, broadcastable to (B, N, L, L), None where there is neither. Rows of -inf alone are replaced by
        zeros, because their softmax is 0 / 0.
        Which rows these were, bool, broadcastable to (B, N, L, 1); None where there are none. The caller gives
        them an output of zero.
    """
    decay = inputs.decay
    if inputs.attn_mask is None:  # a decay alone leaves each query itself
        return None if decay is None else dense(decay, dtype=dtype, row_multiple=row_multiple), None
    wide = torch.promote_types(dtype, torch.float32)
    total, is_empty = added_by(inputs.attn_mask, wide)
    if decay is not None:
        total = dense(decay, dtype=wide, row_multiple=row_multiple) + total
        largest = total.detach().amax(-1, keepdim=True)
        is_empty = largest == float("-inf")  # the decay may hide keys as well
        if dtype != wide:  # what is left of a row may be far away: half precision keeps its digits near 0 only
            total = total - largest.masked_fill(is_empty, 0.0)
    has_none = are_readable(is_empty) and not is_empty.any()
    total = (total if has_none else total.masked_fill(is_empty, 0.0)).to(dtype)  # where there is none, a copy less
    padding = -total.shape[-1] % row_multiple  # the sum has lost the alignment of the decay
    return F.pad(total, (0, padding))[..., :-padding] if padding else total, None if has_none else is_empty


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.is_floating_point():
        raise TypeError(
            f"q, k and v must be floating point: got {q.dtype}. Convert them first, for instance q.float()."
        )
    if q.ndim != 4:
        raise ValueError(f"q must be (B, N, L, d): got shape {tuple(q.shape)}. Split the heads and add the batch.")
    for name, x in (("k", k), ("v", v)):
        for what in ("shape", "dtype", "device"):
            wanted, got = getattr(q, what), getattr(x, what)
            if wanted != got:
                raise ValueError(
                    f"q, k and v must have the same {what}: got q {_readable(wanted)} and {name} {_readable(got)}. "
                    "Attention with decay is self-attention; convert or move the odd one."
                )


def _without_later(attn_mask: Tensor, decay: Any) -> Tensor:
    """The mask without the keys that a causal decay hides from each query: rows are judged by what is left of them."""
    if not getattr(decay, "hides_later", False):
        return attn_mask
    number = next(name for name, value in vars(decay).items() if isinstance(value, Tensor))
    zeros = torch.zeros_like(decay.numbers[0][:1, :1])
    return without(attn_mask, dense(replace(decay, **{number: zeros})) == float("-inf"))


def _check_scale(scale: object) -> None:
    if scale is None or isinstance(scale, torch.SymFloat):
        return
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(
            f"scale must be a number: got {type(scale).__name__}. Pass float(scale); for a scale that is trained, "
            "multiply q by it and pass scale=1.0."
        )
    if scale != scale or scale in (math.inf, -math.inf):
        raise ValueError(f"scale must be finite: got {scale}.")


def _check_decay(q: Tensor, decay: Decay | None) -> None:
    if decay is None:
        return
    if not isinstance(decay, (PairwiseDecay, AxialDecay)):
        raise TypeError(
            f"decay must be a description, for instance a ManhattanDecay, or None: got {type(decay).__name__}. "
            "Pass a mask that is a tensor as attn_mask."
        )
    batch_size, num_heads, num_tokens, _ = q.shape
    decay.layout.check("q", batch_size=batch_size, num_tokens=num_tokens, device=q.device)
    if isinstance(decay, AxialDecay):
        height, width = decay.layout.size
        _check_numbers("decay.rows", decay.rows, (batch_size * height, num_heads, width), q.device)
        _check_numbers("decay.columns", decay.columns, (batch_size * width, num_heads, height), q.device)
    else:
        _check_numbers("decay", decay, (batch_size, num_heads, num_tokens), q.device)


def _check_numbers(name: str, decay: PairwiseDecay, shape: tuple[int, int, int], device: torch.device) -> None:
    for numbers in decay.numbers:
        if tuple(numbers.shape) not in (shape, (1, *shape[1:])):
            raise ValueError(
                f"the tensors of {name} must have shape {shape}, or 1 in place of {shape[0]}: got "
                f"{tuple(numbers.shape)}. They belong to the images, heads and tokens of q."
            )
        if numbers.device != device:
            raise ValueError(f"{name} must be on the device of q: got {numbers.device} and {device}. Move one.")


def _readable(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
