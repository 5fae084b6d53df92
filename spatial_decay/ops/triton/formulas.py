"""The table of pair formulas that the kernels know: what a decay becomes for them, and what they are told of it.

    manhattan: (a_i + a_j) * d_M        path: -|c_i - c_j|        gaussian: a_i * exp(-(u_i dh^2 + v_i dw^2))

A row here goes with a value and a slope of the same name in kernels/tiles.py. Nothing else asks for a name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spatial_decay.decay import GaussianDecay, ManhattanDecay, PairwiseDecay, PathDecay

__all__ = ["FORMULAS", "Formula", "formula_of"]


def _as_it_is(numbers: tuple[Tensor, ...]) -> Tensor:
    return numbers[0][None]


def _with_precisions(numbers: tuple[Tensor, ...]) -> Tensor:
    amplitude, variance_h, variance_w = numbers
    return torch.stack([amplitude, 0.5 / variance_h, 0.5 / variance_w])


def _no_reasons(decay: PairwiseDecay) -> list[str]:
    return []


def _reasons_of_path(decay: PathDecay) -> list[str]:
    return ["a causal PathDecay (needs causal=False)"] if decay.causal else []


def _reasons_of_gaussian(decay: GaussianDecay) -> list[str]:
    if decay.layout.largest_step <= decay.max_distance:
        return []
    return [f"{decay.layout} with max_distance={decay.max_distance} (needs a Grid within it, or none)"]


class Formula(NamedTuple):
    """A row.

    Args:
        decay: The class that it computes; None for no decay.
        num_numbers: How many numbers of a query the kernels read: none, 1 or 3.
        reads_keys: Whether they read the first number of a key too.
        is_path: Whether a token's position is its place along the raster, instead of (h, w).
        lowered: The decay's numbers, (S|1, N, L) float32 each -> (num_numbers, S|1, N, L).
        reasons: Why the kernels cannot compute a decay of this class; empty where they can.
    """

    decay: type[PairwiseDecay] | None
    num_numbers: int
    reads_keys: bool
    is_path: bool = False
    lowered: Callable[[tuple[Tensor, ...]], Tensor] = _as_it_is
    reasons: Callable[[Any], list[str]] = _no_reasons


FORMULAS = {
    "none": Formula(None, 0, reads_keys=False),
    "manhattan": Formula(ManhattanDecay, 1, reads_keys=True),
    "path": Formula(PathDecay, 1, reads_keys=True, is_path=True, reasons=_reasons_of_path),
    "gaussian": Formula(GaussianDecay, 3, reads_keys=False, lowered=_with_precisions, reasons=_reasons_of_gaussian),
}


def formula_of(decay: PairwiseDecay | None) -> str | None:
    """The name of a decay's formula; None where the kernels know none, as of subclasses, which may say more."""
    cls = None if decay is None else type(decay)
    return next((name for name, formula in FORMULAS.items() if formula.decay is cls), None)
