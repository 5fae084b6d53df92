"""What the emulator runs: kinds, layouts, dtypes and masks, forward and all gradients, against float64."""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spatial_decay.layout import Grid, Layout, Positions
from spatial_decay.ops import decay_attention
from tests.cases import CASES, make_gates
from tests.ops.test_triton import TOLERANCE, error, run

__all__ = ["SLOW", "Run", "checked", "everything"]

_CASES = {case.name: case for case in CASES}


class Run(NamedTuple):
    """A call of the backend.

    Args:
        kind: Of tests/cases.py, or "none".
        size: H and W.
        num_prefix: P.
        head_dim: d.
        dtype: Of q, k and v.
        mask: "keys": which may be attended to, none in the last image; "added": numbers, for each head.
        places: "placed": tokens at positions in no order; "nowhere": some of them lie nowhere. "": on the grid.
        memory: "projection": q, k and v are parts of one tensor (B, L, 3, N, d); "odd": a token's features start behind
            an element that is none of them, so that nothing is aligned. "": (B, L, N, d).
        batch_size: B.
        num_heads: N.
        differentiates: Whether all gradients are asked for too.
    """

    kind: str
    size: tuple[int, int]
    num_prefix: int = 0
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    mask: str = ""
    places: str = ""
    memory: str = ""
    batch_size: int = 1
    num_heads: int = 2
    differentiates: bool = True

    def __str__(self) -> str:
        (height, width), dtype = self.size, str(self.dtype).removeprefix("torch.")
        words = [self.kind, f"{height}x{width}+{self.num_prefix}", f"d{self.head_dim}", dtype]
        return "-".join(filter(None, [*words, self.mask, self.places, self.memory]))


def checked(of: Run) -> list[float]:
    """Relative errors of the output and of all gradients; they and the kernels are as they must be."""
    inputs, options = _inputs(of)
    call = run if of.differentiates else _output
    found, expected = (call(*inputs, backend=backend, **options) for backend in ("triton", "math"))
    # Between the two attentions of an axial kind the output is rounded once more.
    tolerance = TOLERANCE[of.dtype] * (2 if of.kind in _CASES and _CASES[of.kind].is_axial else 1)
    assert all(x.isfinite().all() for x in found), of
    errors = [error(*pair) for pair in zip(found, expected, strict=True)]
    assert max(errors) < tolerance, f"{of}: {errors}"
    return errors


def _inputs(of: Run) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """On the CPU, whatever else there is: q, k, v, the gradient of the output, a decay; and a mask."""
    layout = _layout(of)
    shape = of.batch_size, layout.num_tokens, of.num_heads, of.head_dim
    features = [_placed(torch.randn(shape).to(of.dtype), of.memory) for _ in range(4)]
    if of.memory == "projection":
        features[:3] = torch.stack(features[:3], 2).unbind(2)
    features = [x.transpose(1, 2) for x in features]
    decay = None
    if of.kind != "none":
        case = _CASES[of.kind]
        gates = make_gates(case, of.batch_size, of.num_heads, layout.num_tokens, torch.float32)
        decay = case.build(gates, of.num_heads, layout)
    if of.mask == "keys":
        mask = torch.rand(of.batch_size, 1, 1, layout.num_tokens) > 0.4
        mask[-1] = False
        return (*features, decay), {"attn_mask": mask}
    if of.mask == "added":
        return (*features, decay), {"attn_mask": torch.randn(1, of.num_heads, 1, layout.num_tokens).to(of.dtype)}
    return (*features, decay), {}


def _placed(x: Tensor, memory: str) -> Tensor:
    if memory != "odd":
        return x
    wider = x.new_full((*x.shape[:-1], x.shape[-1] + 1), float("nan"))
    wider[..., 1:] = x
    return wider[..., 1:]


def _output(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, decay: Any, backend: str, **options: Any) -> list[Tensor]:
    """As run of test_triton.py, without gradients."""
    if backend == "math":
        q, k, v = q.double(), k.double(), v.double()
    return [decay_attention(q, k, v, decay, backend=backend, **options)]


def _layout(of: Run) -> Layout:
    if not of.places:
        return Grid(*of.size, of.num_prefix)
    shape = of.batch_size, of.size[0] * of.size[1]
    h, w = torch.randint(0, 9, (2, *shape)).float()
    if of.places == "placed":
        return Positions(h, w)
    known = torch.rand(shape) > 0.3
    return Positions(h.masked_fill(~known, float("nan")), w, known)


_B, _H, _F = torch.bfloat16, torch.float16, torch.float32

SLOW = [
    # Each kind, each dtype.
    *[Run(kind, (12, 14), 1, dtype=dtype) for kind, dtype in [("full", _H), ("1d", _B), ("gaussian", _H)]],
    *[Run(kind, (7, 8), 1, 32, _F) for kind in ("full", "1d", "gaussian", "alibi")],
    Run("alibi", (9, 9), 1, dtype=_H),
    *[Run("squared", (12, 14), 1, dtype=_B), Run("squared", (7, 8), 1, 32, _F)],
    *[Run("fixed", (9, 9), batch_size=2), Run("bidirectional", (9, 9), 5, 32), Run("none", (9, 9), head_dim=72)],
    # Masks and positions.
    Run("full", (9, 9), 1, mask="keys", batch_size=2),
    Run("gaussian", (5, 10), 0, 32, _F, mask="added"),
    Run("full", (5, 14), 0, places="nowhere", mask="keys", batch_size=2),
    Run("1d", (5, 14), 0, 32, places="nowhere"),
    Run("alibi", (5, 14), 0, 32, places="nowhere"),
    Run("squared", (5, 14), 0, places="nowhere"),
    Run("gaussian", (5, 14), 0, places="placed", batch_size=2),
    Run("full", (7, 10), 0, 72, memory="projection"),
    Run("1d", (7, 10), 0, 40, _H, memory="odd"),
    # Rows and columns, by the kernels for short sequences and the others.
    Run("decomposed", (14, 20), batch_size=2),
    Run("fixed_decomposed", (5, 40), 0, 32, _H),
    Run("decomposed", (5, 12), 0, 16, _F, mask="keys", batch_size=2),
    Run("decomposed", (2, 130), 0, 64),
    # Lengths, widths of heads.
    Run("full", (1, 1), 0, 16),
    Run("1d", (1, 1), 1, 16),
    Run("full", (32, 32), 1, num_heads=1),
    Run("1d", (16, 16), 0, 128, num_heads=1),
    Run("gaussian", (3, 3), 70, 40),
    Run("full", (7, 10), 0, 1, _F),
]


def everything() -> Iterator[Run]:
    """Much more: what `python -m tests.ptx` runs, some hours of it."""
    yield from SLOW
    long = ("none", "full", "fixed", "alibi", "squared", "1d", "bidirectional", "gaussian")
    axial = ("decomposed", "fixed_decomposed")
    sizes = [(1, 2), (3, 5), (4, 4), (4, 8), (3, 11), (7, 7), (7, 9), (8, 8), (8, 16), (14, 14), (16, 16), (32, 32)]
    for size, num_prefix, dtype, kind in product(sizes, (0, 1, 5), (_B, _H, _F), long):
        if (kind, num_prefix) in [("none", 0), *product(long[1:], (0, 1, 5))] and (size != (32, 32) or dtype != _F):
            yield Run(kind, size, num_prefix, dtype=dtype)
    for head_dim, dtype, kind in product((1, 3, 8, 16, 20, 32, 40, 72, 80, 96, 128), (_B, _H, _F), long):
        yield Run(kind, (7, 10), 0 if kind == "none" else 1, head_dim, dtype)
    for mask, places, dtype, kind in product(("", "keys", "added"), ("", "placed", "nowhere"), (_B, _F), long[1:]):
        yield Run(kind, (8, 10), 0, 64, dtype, mask, places, batch_size=2)
    for memory, size, head_dim, kind in product(("projection", "odd"), ((4, 5), (7, 10)), (40, 64, 72), long[1:]):
        yield Run(kind, size, 0, head_dim, memory=memory, batch_size=2)
    for size, head_dim, dtype, kind in product(
        [(1, 7), (7, 1), (3, 5), (5, 14), (14, 14), (28, 28), (8, 56), (3, 130)], (16, 32, 64, 128), (_B, _H, _F), axial
    ):
        yield Run(kind, size, 0, head_dim, dtype, batch_size=2)
