"""Backend `tiled`: exact attention by blocks in bounded scratch memory, with the decay's gradient; tuned for CPUs.

The decays that it knows, and their gradients, stand in tiled_decays.py. No L x L matrix is stored: blocks of rows (or,
forward on long sequences, of keys) go through two buffers that stay in cache. The backward pass computes each block
again. With P the softmax of a block, dO the output's gradient and o the product by elements:

    dP = dO V^T        dS = P o (dP - rowsum(P o dP))
    dV = P^T dO        dQ = scale * dS K        dK = scale * dS^T Q

Both passes are torch.library operators, so torch.compile and torch.export take them as they are. No second derivatives,
no torch.func transforms.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spatial_decay.decay import FactoredDecay, GaussianDecay, PairwiseDecay
from spatial_decay.ops.attn_mask import added_by
from spatial_decay.ops.inputs import Inputs
from spatial_decay.ops.math import avoid_reasons_on_small_inputs
from spatial_decay.ops.tiled_decays import Factored, Gaussian, gaussian_numbers
from spatial_decay.precision import at_least_float32

__all__ = ["attention", "avoid_reasons", "unsupported_reasons"]

_softmax = partial(torch.ops.aten._softmax.out, dim=-1, half_to_float=False)
_softmax_backward = torch.ops.aten._softmax_backward_data.out
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Elements of a block of scores. Two float32 buffers of so many whole sequences stay in the cache of two cores; the
# rows of longer sequences make long matrix products instead, and the buffers (32 MB) are read from further away.
_BLOCK, _LONG_BLOCK = 3 << 17, 1 << 22
# Up to this length the forward pass takes whole sequences; above, the CPU's flash kernel is faster.
_SHORT = 320
# Up to this length a block of the backward pass is whole sequences; above, some rows of so many sequences.
_WHOLE, _SEQUENCES = 512, 4
# Keys of a block in the forward pass on long sequences; up to _ALL_KEYS, where one head's mask is a block, all of them.
_KEYS, _ALL_KEYS = 256, 1280


def unsupported_reasons(inputs: Inputs) -> list[str]:
    """It needs a decay that it knows on a grid, and neither dropout nor a gradient of attn_mask."""
    reasons = []
    if not _knows(inputs.decay):
        what = "no decay" if inputs.decay is None else type(inputs.decay).__name__
        reasons.append(f"{what} (needs a FactoredDecay, as ManhattanDecay and PathDecay are, or a GaussianDecay)")
    elif inputs.decay is not None and not inputs.decay.layout.is_grid:
        reasons.append("tokens with Positions of their own (needs those of a Grid)")
    return reasons + inputs.shared_reasons()


def _knows(decay: PairwiseDecay | None) -> bool:
    """Not subclasses that say more: what they say would not be heard."""
    return type(decay) is GaussianDecay or (isinstance(decay, FactoredDecay) and decay.has_form())


def avoid_reasons(inputs: Inputs) -> list[str]:
    """Where it is slower than others, and where the program is to leave Python."""
    if inputs.q.device.type != "cpu":
        return ["its blocks are tuned for CPUs"]
    if inputs.is_exporting:
        return ["torch.export: the program would need this package"]
    if not torch.compiler.is_compiling():
        return avoid_reasons_on_small_inputs(inputs)
    fused = f"torch.compile fuses the decay into the mask, which is faster up to L = {_SHORT}"
    return [fused] if inputs.length <= _SHORT else []


def attention(inputs: Inputs) -> Tensor:
    """softmax(scale * Q K^T + M) V (SDT Eq. 10), in float32 at least inside, in the dtype of q outside."""
    decay = inputs.decay
    assert isinstance(decay, (FactoredDecay, GaussianDecay))
    grid = decay.layout.as_grid("backend 'tiled'")
    if isinstance(decay, GaussianDecay):
        numbers, form = gaussian_numbers(decay, grid), (_GAUSSIAN, 0, False)
    else:
        numbers, form = at_least_float32(decay.numbers[0]), (decay.factor, decay.sign, decay.hides_later)
    sizes = [*grid.size, grid.num_prefix_tokens]
    return _forward(*inputs.sequences(), numbers, inputs.attn_mask, inputs.scale, sizes, *form)


# Schemas are spelt out: torch 2.6 does not infer them from today's annotations. The functions that torch calls back are
# left untyped (no-untyped-def): it passes them what the schema says. What an operator does not look at itself, it hands
# on to _Blocks, whose arguments come in the same order.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor numbers, Tensor? attn_mask, float scale, SymInt[] grid, str factor, "
    "int sign, bool hides_later"
)
_GAUSSIAN = ""  # in place of a factor's name


@torch.library.custom_op("spatial_decay::tiled", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _forward(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, attn_mask: Tensor | None, *others: Any) -> Tensor:
    """O, (B, N, L, d).

    numbers: t (B|1, N, L), or those of gaussian_numbers. attn_mask: (B|1, N|1, L|1, L). grid: H, W and P. factor, sign
    and hides_later: of FactoredDecay.
    """
    blocks = _Blocks(q, k, v, numbers, attn_mask, *others)
    by_keys = q.shape[2] > _SHORT and attn_mask is None and not blocks.hides_later and q.device.type == "cpu"
    if isinstance(blocks.decay, Gaussian):  # a part of the keys is no product of rows and columns
        by_keys = by_keys and q.shape[2] <= _ALL_KEYS
    out = blocks.forward_by_keys() if by_keys else blocks.forward_by_rows()
    return out.view(q.shape).to(q.dtype)


@_forward.register_fake
def _(q, *others):  # type: ignore[no-untyped-def]  # as torch calls it
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op(
    "spatial_decay::tiled_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and numbers from that of O."""
    dq, dk, dv, dt = _Blocks(q, k, v, numbers, *others).backward(grad)
    dt = dt.view(*q.shape[:3], *numbers.shape[3:])
    dt = dt.sum(0, keepdim=True) if numbers.shape[0] == 1 and q.shape[0] > 1 else dt  # shared by all images
    dq, dk, dv = (x.view(q.shape).to(q.dtype) for x in (dq, dk, dv))
    return dq, dk, dv, dt.to(numbers.dtype)


@_backward.register_fake
def _(grad, q, k, v, numbers, *others):  # type: ignore[no-untyped-def]  # as torch calls it
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, numbers))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # as torch calls it
    *tensors, ctx.scale, ctx.grid, ctx.factor, ctx.sign, ctx.hides_later = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]  # as torch calls it
    gradients = _backward(grad, *ctx.saved_tensors, ctx.scale, ctx.grid, ctx.factor, ctx.sign, ctx.hides_later)
    return *gradients, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


class _Blocks:
    """The tensors of one call in their working form, and the loops over blocks.

    The heads of all images are one list of S = B * N sequences: q, k, v are (S, L, d), and so are the decay's numbers.
    In the loops s, i and j are slices: some sequences, some queries, some keys.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        numbers: Tensor,
        attn_mask: Tensor | None,
        scale: float,
        grid: list[int],
        factor: str,
        sign: int,
        hides_later: bool,
    ) -> None:
        batch_size, self.num_heads, self.length, self.head_dim = q.shape
        self.num_sequences = batch_size * self.num_heads
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = (self.as_sequences(x) for x in (q, k, v))
        self.attn_mask, self.scale, self.hides_later = attn_mask, scale, hides_later
        t = numbers.to(self.dtype).expand(batch_size, *numbers.shape[1:])
        t = t.reshape(self.num_sequences, *numbers.shape[2:])
        self.decay: Factored | Gaussian = (
            Gaussian(t, *grid) if factor == _GAUSSIAN else Factored(t, factor, sign, *grid)
        )

    def as_sequences(self, x: Tensor) -> Tensor:
        """(B, N, L, d) -> (S, L, d) in the working dtype."""
        return x.reshape(self.num_sequences, self.length, self.head_dim).to(self.dtype).contiguous()

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.q.device)

    def sequence_blocks(self, num_rows: int) -> list[tuple[slice, Tensor | None]]:
        """Blocks of sequences for blocks of num_rows queries, with their part of attn_mask, (heads|1, L|1, L).

        With a mask a block stays within one image, because the mask tells images apart.
        """
        count = max(torch.get_num_threads(), _SEQUENCES if self.length > _WHOLE else _BLOCK // (num_rows * self.length))
        if self.attn_mask is None:
            return [(s, None) for s in _slices(0, self.num_sequences, count)]
        found: list[tuple[slice, Tensor | None]] = []
        for image in range(self.num_sequences // self.num_heads):
            mask = self.attn_mask[image if len(self.attn_mask) > 1 else 0]
            first = image * self.num_heads
            found += [
                (s, mask[s.start - first : s.stop - first] if len(mask) > 1 else mask)
                for s in _slices(first, first + self.num_heads, count)
            ]
        return found

    def row_blocks(self) -> list[slice]:
        """Blocks of queries: all of a short sequence, else so many that they make a block with all keys."""
        if self.length <= _WHOLE:
            return [slice(0, self.length)]
        sequences = max(torch.get_num_threads(), _SEQUENCES)
        parts = math.ceil(self.length / max(64, _LONG_BLOCK // (sequences * self.length)))
        return _slices(0, self.length, math.ceil(self.length / parts))

    def buffers(self, rows: list[slice], sequences: list[tuple[slice, Tensor | None]]) -> tuple[Tensor, Tensor]:
        """Two blocks of the largest size, flat; of no size where there is no image."""
        count = max((s.stop - s.start for s, _ in sequences), default=0)
        size = count * max(i.stop - i.start for i in rows) * self.length
        return self.empty(size), self.empty(size)

    def view(self, buffer: Tensor, s: slice, i: slice) -> Tensor:
        """The beginning of a buffer as a block (s, i, L)."""
        shape = (s.stop - s.start, i.stop - i.start, self.length)
        return buffer[: shape[0] * shape[1] * shape[2]].view(shape)

    def probabilities(
        self, q: Tensor, s: slice, i: slice, f: Tensor | None, mask: Tensor | None, scores: Tensor, out: Tensor
    ) -> None:
        """P of a block into out, (s, i, L); scores is scratch of that shape, q is scaled."""
        self.decay.write(s, i, slice(0, self.length), f, scores)
        is_empty = None
        if mask is not None:
            mask = mask[:, i] if mask.shape[1] > 1 else mask
            added, is_empty = added_by(mask, self.dtype, out=out[: mask.shape[0], : mask.shape[1]])
            scores.add_(added)
        if self.hides_later:
            assert f is not None
            scores.masked_fill_(f > 0, float("-inf"))
        scores.baddbmm_(q[s, i], self.k[s].transpose(1, 2))
        if is_empty is None or not is_empty.any():
            _softmax(scores, out=out)
            return
        _softmax(scores.masked_fill_(is_empty, 0.0), out=out)
        out.masked_fill_(is_empty, 0.0)

    def forward_by_rows(self) -> Tensor:
        """Blocks of queries against all keys."""
        out, q = torch.empty_like(self.q), self.q * self.scale
        rows = self.row_blocks()
        sequences = self.sequence_blocks(rows[0].stop)
        buffers = self.buffers(rows, sequences)
        for i in rows:
            f = self.decay.of_grid(i, slice(0, self.length))
            for s, mask in sequences:
                scores, p = (self.view(buffer, s, i) for buffer in buffers)
                self.probabilities(q, s, i, f, mask, scores, p)
                torch.bmm(p, self.v[s], out=out[s, i])
        return out

    def forward_by_keys(self) -> Tensor:
        """All queries against blocks of keys by the CPU's flash kernel; blocks are merged by their log-sum-exp."""
        out, lse = torch.empty_like(self.q), self.empty(self.num_sequences, self.length)
        # The kernel takes its threads from heads and queries.
        keys, count = (self.length, 1) if self.length <= _ALL_KEYS else (_KEYS, torch.get_num_threads())
        buffer = self.empty(count * self.length * keys)
        for j in _slices(0, self.length, keys):
            f = self.decay.of_grid(slice(0, self.length), j)
            for s in _slices(0, self.num_sequences, count):
                shape = (s.stop - s.start, self.length, j.stop - j.start)
                mask = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
                self.decay.write(s, slice(0, self.length), j, f, mask)
                q, k, v = self.q[None, s], self.k[None, s, j], self.v[None, s, j]
                (part,), (part_lse,) = _flash(q, k, v, attn_mask=mask[None], scale=self.scale)
                if j.start == 0:
                    out[s], lse[s] = part, part_lse
                    continue
                total = torch.logaddexp(lse[s], part_lse)
                out[s].mul_((lse[s] - total).exp_()[..., None])
                out[s].addcmul_(part, (part_lse - total).exp_()[..., None])
                lse[s] = total
        return out

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dQ, dK, dV, (S, L, d), and dt, as the decay's t; the equations are at the top of the file."""
        grad, q = self.as_sequences(grad), self.q * self.scale
        dq, dk, dv = (torch.empty_like(self.q) for _ in range(3))
        dt = torch.zeros_like(self.decay.t)
        rows = self.row_blocks()
        sequences = self.sequence_blocks(rows[0].stop)
        buffers = self.buffers(rows, sequences)
        for i in rows:
            f = self.decay.of_grid(i, slice(0, self.length))
            for s, mask in sequences:
                ds, p = (self.view(buffer, s, i) for buffer in buffers)
                self.probabilities(q, s, i, f, mask, ds, p)
                torch.bmm(grad[s, i], self.v[s].transpose(1, 2), out=ds)  # dP
                _add_product(dv[s], p.transpose(1, 2), grad[s, i], is_first=i.start == 0)
                _softmax_backward(ds, p, -1, self.dtype, grad_input=ds)
                torch.bmm(ds, self.k[s], out=dq[s, i])
                _add_product(dk[s], ds.transpose(1, 2), q[s, i], is_first=i.start == 0)
                self.decay.differentiate(s, i, f, ds, dt, p)
        return dq.mul_(self.scale), dk, dv, dt


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """total += a @ b; the first time total = a @ b, which is one call where baddbmm_ with beta = 0 is one a matrix."""
    if is_first:
        torch.bmm(a, b, out=total)
    else:
        total.baddbmm_(a, b)


def _slices(start: int, stop: int, size: int) -> list[slice]:
    """start .. stop in pieces of size, the last one smaller."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
