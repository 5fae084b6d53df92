"""The table of pair formulas that the compiled kernels know, triton's and native's: what a decay becomes for them.

    manhattan: (a_i + a_j) * d_M        path: -|c_i - c_j|        gaussian: a_i * exp(-(u_i dh^2 + v_i dw^2))
    euclidean: (a_i + a_j) * sqrt(dh^2 + dw^2)        squared: (a_i + a_j) * (dh^2 + dw^2)

A row here goes with a value and a slope in triton/kernels/pairs.py and in native/source. Nothing else asks for a name.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.decay import EuclideanDecay, GaussianDecay, ManhattanDecay, PairwiseDecay, PathDecay, SquaredDecay
from spatial_decay.layout import Layout

__all__ = ["FORMULAS", "Formula", "formula_of", "position_table", "reasons_of_decay"]


def _as_it_is(numbers: tuple[Tensor, ...]) -> Tensor:
    return numbers[0][None]


# A variance counts as this at least: at it a distance of 1e-7 grid steps already adds nothing, and both 0.5 / s and
# its derivative are numbers. The precision of a smaller one may be infinite, which times a step of 0 is NaN.
_LEAST_VARIANCE = 2.0**-62


def _with_precisions(numbers: tuple[Tensor, ...]) -> Tensor:
    amplitude, variance_h, variance_w = numbers
    u, v = (0.5 / variance.clamp(min=_LEAST_VARIANCE) for variance in (variance_h, variance_w))
    return torch.stack([amplitude, u, v])


class Formula(NamedTuple):
    """A row.

    Args:
        decay: The class that it computes; None for no decay.
        num_numbers: How many numbers of a query the kernels read: none, 1 or 3.
        reads_keys: Whether they read the first number of a key too.
        is_path: Whether a token's position is its place along the raster, instead of (h, w).
        hides_later: Whether a query may not attend to tokens behind it.
        lowered: The decay's numbers, (S|1, N, L) float32 each -> (num_numbers, S|1, N, L).
    """

    decay: type[PairwiseDecay] | None
    num_numbers: int
    reads_keys: bool
    is_path: bool = False
    hides_later: bool = False
    lowered: Callable[[tuple[Tensor, ...]], Tensor] = _as_it_is


FORMULAS = {
    "none": Formula(None, 0, reads_keys=False),
    "manhattan": Formula(ManhattanDecay, 1, reads_keys=True),
    "path": Formula(PathDecay, 1, reads_keys=True, is_path=True),
    "causal path": Formula(PathDecay, 1, reads_keys=True, is_path=True, hides_later=True),
    "gaussian": Formula(GaussianDecay, 3, reads_keys=False, lowered=_with_precisions),
    "euclidean": Formula(EuclideanDecay, 1, reads_keys=True),
    "squared": Formula(SquaredDecay, 1, reads_keys=True),
}


_NAMES = {(row.decay, row.hides_later): name for name, row in FORMULAS.items()}


def formula_of(decay: PairwiseDecay | None) -> str | None:
    """The name of a decay's formula; None where the table has none, as of subclasses, which may say more."""
    return _NAMES.get((None if decay is None else type(decay), getattr(decay, "hides_later", False)))


def reasons_of_decay(decay: PairwiseDecay | None) -> list[str]:
    """Why no row computes this decay; empty where one does."""
    if formula_of(decay) is not None:
        return []
    known = dict.fromkeys(row.decay.__name__ for row in FORMULAS.values() if row.decay is not None)
    return [f"{type(decay).__name__} (needs None or a {', '.join(known)})"]


def position_table(layout: Layout, formula: str, device: torch.device) -> Tensor:
    """Where each token lies, float32: its row and column; for a path 0 and the place along it.

    Returns:
        (1, 2, L) of a grid, zeros for prefix tokens. Of Positions (B|1, 3, L): also 1.0 for tokens that lie somewhere.
    """
    if FORMULAS[formula].is_path:
        w = layout.raster_numbers(device=device, dtype=torch.float32)
        h = torch.zeros_like(w)
    else:
        h, w = layout.positions(device=device, dtype=torch.float32)
    if layout.is_grid:
        return F.pad(torch.stack([h, w])[None], (layout.num_prefix_tokens, 0))
    flags = torch.ones_like(h) if layout.known is None else layout.known[:, None].to(h).expand_as(h)
    return torch.cat([h, w, flags], 1)
