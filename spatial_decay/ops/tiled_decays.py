"""The decays that backend `tiled` knows, block by block, with their slopes.

One form, with t a number a token and F a function of the steps between two tokens (FactoredDecay):

    M[i, j] = (t_i + s * t_j) * F[i, j]                     F = 0 wherever a prefix token takes part
    dt_i = sum_j dS[i, j] F[i, j] + s * sum_j dS[j, i] F[j, i]

And, with h_j and w_j the row and the column of the key, the product of two exponentials (LocAtViT):

    M[i, j] = a_i * exp(u_i[h_j]) * exp(v_i[w_j])
    da_i = sum_j Z[i, j]    du_i[h] = a_i * sum_{j: h_j = h} Z[i, j]    dv_i[w] = a_i * sum_{j: w_j = w} Z[i, j]
    with Z = dS o M / a

s, i and j are slices: some sequences, some queries, some keys; of the last two one is all tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.decay import GaussianDecay, factor
from spatial_decay.layout import Grid, Steps
from spatial_decay.precision import at_least_float32

__all__ = ["Factored", "Gaussian", "gaussian_numbers"]


class _OnGrid:
    """A decay's numbers on a grid of H x W tokens behind P prefix tokens.

    Args:
        t: Numbers of each token, (S, L, ...).
        height: H.
        width: W.
        num_prefix: P.
    """

    def __init__(self, t: Tensor, height: int, width: int, num_prefix: int) -> None:
        self.t, self.height, self.width, self.num_prefix = t, height, width, num_prefix
        self.length = t.shape[1]

    def num_first(self, x: slice) -> int:
        """How many of these tokens are prefix tokens."""
        return min(max(0, self.num_prefix - x.start), x.stop - x.start)


class Factored(_OnGrid):
    """(t_i + s * t_j) * F(steps); t is (S, L).

    Args:
        t: As in _OnGrid.
        factor: Name of F.
        sign: s.
        *grid: H, W and P.
    """

    def __init__(self, t: Tensor, factor: str, sign: int, *grid: int) -> None:
        super().__init__(t, *grid)
        self.factor, self.sign = factor, sign
        self.all_steps = Grid(self.height, self.width).steps(device=t.device, dtype=t.dtype)

    def of_grid(self, i: slice, j: slice) -> Tensor:
        """F, (i, j), the same for all sequences: on a grid one operation a pair, where its two axes meet."""
        by_queries = j.stop - j.start == self.length
        steps = self.steps(i) if by_queries else self.steps(j)
        if not by_queries:  # contiguous, since F lies in memory as they do
            steps = tuple(-step.permute(1, 2, 0).contiguous() for step in steps)
        f = torch.broadcast_tensors(factor(self.factor, *steps), *steps)[0]  # (i, H, W) or (H, W, j)
        f = f.flatten(1) if by_queries else f.flatten(0, 1)
        first_i, first_j = self.num_first(i), self.num_first(j)
        return F.pad(f, (first_j, 0, first_i, 0)) if first_i or first_j else f

    def steps(self, x: slice) -> Steps:
        """From these tokens to all rows and to all columns, (x, H, 1) and (x, 1, W)."""
        first = x.start + self.num_first(x) - self.num_prefix
        return tuple(steps[first : x.stop - self.num_prefix] for steps in self.all_steps)

    def write(self, s: slice, i: slice, j: slice, f: Tensor | None, out: Tensor) -> None:
        """M of a block into out, (s, i, j)."""
        assert f is not None
        t = self.t[s]
        torch.add(t[:, i, None], t[:, None, j], alpha=self.sign, out=out).mul_(f)

    def differentiate(self, s: slice, i: slice, f: Tensor | None, ds: Tensor, dt: Tensor, scratch: Tensor) -> None:
        """Add to dt what dS of a block, (s, i, L), says of it; ds is spent."""
        del scratch
        assert f is not None
        ds.mul_(f)
        dt[s].add_(ds.sum(1), alpha=self.sign)
        dt[s, i].add_(ds.sum(2))


class Gaussian(_OnGrid):
    """a_i * exp(u_i[h_j]) * exp(v_i[w_j]); t is a, u and v side by side, (S, L, 1 + H + W).

    Its methods take what those of Factored take; f is None, and j all keys.
    """

    def __init__(self, t: Tensor, height: int, width: int, num_prefix: int) -> None:
        super().__init__(t, height, width, num_prefix)
        self.amplitude, rows, columns = t.split((1, height, width), -1)
        self.rows, self.columns = rows.exp(), columns.exp()
        # Which of "the grid", its rows and its columns a key is in, 0 or 1, (L, 1 + H + W).
        one, row, column = (torch.eye(n, dtype=t.dtype, device=t.device) for n in (1, height, width))
        lines = (one.expand(height * width, -1), row.repeat_interleave(width, 0), column.repeat(height, 1))
        self.lines = F.pad(torch.cat(lines, -1), (0, 0, num_prefix, 0))

    def of_grid(self, i: slice, j: slice) -> None:
        """Sequences share nothing."""

    # Other decays read all of them.
    def write(self, s: slice, i: slice, j: slice, f: Tensor | None, out: Tensor) -> None:  # noqa: ARG002
        """M of a block into out, (s, i, j)."""
        self.outer(self.rows[s, i].mul(self.amplitude[s, i]), self.columns[s, i], out)

    def outer(self, rows: Tensor, columns: Tensor, out: Tensor) -> None:
        """rows[h_j] * columns[w_j] for all keys j into out, (s, i, L); zero for prefix keys."""
        maps = out[..., self.num_prefix :].unflatten(-1, (self.height, self.width))
        torch.mul(rows[..., :, None], columns[..., None, :], out=maps)
        out[..., : self.num_prefix] = 0

    # Other decays read all of them.
    def differentiate(self, s: slice, i: slice, f: Tensor | None, ds: Tensor, dt: Tensor, scratch: Tensor) -> None:  # noqa: ARG002
        """Write to dt what dS of a block, (s, i, L), says of it; ds and scratch are spent."""
        self.outer(self.rows[s, i], self.columns[s, i], scratch)
        dt[s, i] = ds.mul_(scratch) @ self.lines
        dt[s, i, 1:].mul_(self.amplitude[s, i])


def gaussian_numbers(decay: GaussianDecay, grid: Grid) -> Tensor:
    """a, u and v of each query side by side, (B, N, L, 1 + H + W); zero for prefix tokens."""
    num_prefix = grid.num_prefix_tokens
    amplitude, *variances = (at_least_float32(x)[..., num_prefix:, None] for x in decay.numbers)
    steps = grid.steps(device=amplitude.device, dtype=amplitude.dtype)  # (H*W, H, 1) and (H*W, 1, W)
    exponents = [decay.exponent(step.flatten(1), x) for step, x in zip(steps, variances, strict=True)]
    return F.pad(torch.cat([amplitude, *exponents], -1), (0, 0, num_prefix, 0))
