"""One table of the kinds of decay. A new kind adds one row here and inherits every check."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from spatial_decay.decay import (
    AxialDecay,
    EuclideanDecay,
    GaussianDecay,
    ManhattanDecay,
    PathDecay,
    SquaredDecay,
    alibi_slopes,
    fixed_rates,
)
from spatial_decay.layers.kinds import KINDS
from spatial_decay.layout import Grid, Positions
from spatial_decay.ops import BACKENDS
from spatial_decay.ops.native import library
from tests import references

# Backends that do all that `math` does. The others have no float64, among others: see ops/native/test_native.py,
# ops/test_flex.py and ops/test_triton.py; lowrank is for one kind: ops/test_lowrank.py.
EXACT_BACKENDS = [name for name in BACKENDS if name not in ("native", "lowrank", "flex", "triton", "triton_autotune")]

needs_native = pytest.mark.skipif(library.reason() is not None, reason=f"backend 'native': {library.reason()}")

# To be tested in the widest dtype that they have.
CPU_BACKENDS = [pytest.param("native", marks=needs_native), *EXACT_BACKENDS]


def widest_dtype(backend: str) -> torch.dtype:
    """That a backend of CPU_BACKENDS has."""
    return torch.float32 if backend == "native" else torch.float64


# A small SDTH with a block of each arrangement.
TWO_STAGES = {
    "embed_dims": [16, 32],
    "depths": [1, 1],
    "num_heads": [2, 2],
    "mlp_ratios": [2, 2],
    "decay": ["decomposed", "full"],
    "projection_dim": 24,
}

GRIDS = [(1, 1), (1, 7), (7, 1), (5, 9), (14, 14)]

ALPHA, INITIAL_VALUE, HEADS_RANGE = 0.1, 2.0, 4.0

# Relative to the largest value. float32 sums a few hundred products; bf16 has 8 bits, and the decay is rounded to it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """A kind: how the library describes it, and what the equations say of one head."""

    name: str
    num_gates: int
    build: Callable[[Sequence[Tensor], int, Grid], Any]  # gates (B, N, L) each, N, grid
    reference: Callable[[Sequence[list[float]], int, int, int, int], Any]  # gates of one head, n, N, H, W
    kind: str = ""  # its name
    options: dict[str, Any] = field(default_factory=dict)
    is_axial: bool = False
    along_path: bool = False  # what lies between two tokens counts

    @property
    def config(self) -> dict[str, Any]:
        """As `decay=` takes it."""
        return {"kind": self.kind, **self.options}

    def __str__(self) -> str:
        return self.name


def _rates(num_heads: int) -> Tensor:
    return fixed_rates(
        num_heads,
        initial_value=INITIAL_VALUE,
        heads_range=HEADS_RANGE,
        device=torch.get_default_device(),
        dtype=torch.float64,
    )


def _rate(n: int, num_heads: int) -> float:
    return references.fixed_rate(n, num_heads, INITIAL_VALUE, HEADS_RANGE)


def _slopes(num_heads: int) -> Tensor:
    return alibi_slopes(num_heads, device=torch.get_default_device(), dtype=torch.float64)


CASES = [
    Case(
        "full",
        1,
        lambda gates, n, grid: ManhattanDecay.from_gate(gates[0], grid, alpha=ALPHA),
        lambda gates, n, num_heads, h, w: references.full(gates[0], h, w, ALPHA),
        kind="full",
    ),
    Case(
        "fixed",
        0,
        lambda gates, n, grid: ManhattanDecay.constant(_rates(n), grid),
        lambda gates, n, num_heads, h, w: references.fixed(_rate(n, num_heads), h, w),
        kind="fixed",
    ),
    Case(
        "alibi",
        0,
        lambda gates, n, grid: EuclideanDecay.constant(_slopes(n), grid),
        lambda gates, n, num_heads, h, w: references.alibi(references.alibi_slopes(num_heads)[n], h, w),
        kind="alibi",
    ),
    Case(
        "1d",
        1,
        lambda gates, n, grid: PathDecay.from_gate(gates[0], grid),
        lambda gates, n, num_heads, h, w: references.path(gates[0]),
        kind="1d",
        along_path=True,
    ),
    Case(
        "1d_causal",
        1,
        lambda gates, n, grid: PathDecay.from_gate(gates[0], grid, causal=True),
        lambda gates, n, num_heads, h, w: references.path(gates[0], causal=True),
        kind="1d",
        along_path=True,
        options={"causal": True},
    ),
    Case(
        "bidirectional",
        2,
        lambda gates, n, grid: PathDecay.bidirectional(gates[0], gates[1], grid),
        lambda gates, n, num_heads, h, w: references.bidirectional(gates[0], gates[1]),
        kind="bidirectional",
        along_path=True,
    ),
    Case(
        "gaussian",
        3,
        lambda gates, n, grid: GaussianDecay(-gates[0], *(0.5 - 3 * gate for gate in gates[1:]), grid),
        lambda gates, n, num_heads, h, w: references.gaussian(
            [-g for g in gates[0]], *([0.5 - 3 * g for g in gate] for gate in gates[1:]), h, w
        ),
        kind="gaussian",
    ),
    Case(
        "squared",
        1,
        lambda gates, n, grid: SquaredDecay.from_gate(gates[0], grid),
        lambda gates, n, num_heads, h, w: references.squared(gates[0], h, w),
        kind="squared",
    ),
    Case(
        "decomposed",
        2,
        lambda gates, n, grid: AxialDecay.from_gates(gates[0], gates[1], grid),
        lambda gates, n, num_heads, h, w: references.decomposed(gates[0], gates[1], h, w),
        kind="decomposed",
        is_axial=True,
    ),
    Case(
        "fixed_decomposed",
        0,
        lambda gates, n, grid: AxialDecay.constant(_rates(n), _rates(n), grid),
        lambda gates, n, num_heads, h, w: references.fixed_decomposed(_rate(n, num_heads), h, w),
        kind="fixed_decomposed",
        is_axial=True,
    ),
]
# gaussian reads queries, not gates: see layers/test_gaussian.py for what its layers make of them. learned is the fixed
# of rates that are trained: see layers/test_kinds.py.
GATED = [case for case in CASES if case.kind != "gaussian"]
PAIRWISE = [case for case in CASES if not case.is_axial]
AXIAL = [case for case in CASES if case.is_axial]
TRAINED = [case for case in CASES if case.num_gates]

GATES_OF_KIND = {name: list(getattr(kind, "gates", ())) for name, kind in KINDS.items()}


def case_id(value: object) -> str | None:
    """Readable ids: full, 5x9, float32."""
    if isinstance(value, Case):
        return value.name
    if isinstance(value, tuple) and len(value) == 2:
        return f"{value[0]}x{value[1]}"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return None


def make_gates(case: Case, batch_size: int, num_heads: int, num_tokens: int, dtype=torch.float64) -> list[Tensor]:
    """Random gates G <= 0, (B, N, L) each."""
    return [
        torch.nn.functional.logsigmoid(torch.randn(batch_size, num_heads, num_tokens, dtype=dtype))
        for _ in range(case.num_gates)
    ]


def reference_mask(case: Case, gates: Sequence[Tensor], num_heads: int, grid: Grid) -> Tensor:
    """The equations' mask for each image and head, (B, N, L, L), from gates (B, N, L); not for axial kinds."""
    batch_size = gates[0].shape[0] if gates else 1
    masks = [
        [
            references.with_prefix(reference_of_head(case, gates, b, n, num_heads, grid), grid.num_prefix_tokens)
            for n in range(num_heads)
        ]
        for b in range(batch_size)
    ]
    return torch.tensor(masks, dtype=torch.float64)


def reference_mask_of_positions(
    case: Case, gates: Sequence[Tensor], num_heads: int, positions: Positions, size
) -> Tensor:
    """The equations on the tokens that lie somewhere, in raster order, put back where each came from, (B, N, L, L).

    size: H and W of a grid that holds all of them.
    """
    batch_size, num_tokens = len(positions.h), positions.num_tokens
    expected = torch.zeros(batch_size, num_heads, num_tokens, num_tokens, dtype=torch.float64)
    for b in range(batch_size):
        tokens = positions.has_position[b].nonzero()[:, 0].tolist()
        tokens.sort(key=lambda i, b=b: (positions.h[b, i].item(), positions.w[b, i].item()))
        for n in range(num_heads):
            if not case.along_path:  # a pair's number does not depend on who else is there
                whole = [torch.zeros(batch_size, num_heads, size[0] * size[1], dtype=torch.float64) for _ in gates]
                raster = [int(positions.h[b, i] * size[1] + positions.w[b, i]) for i in tokens]
                for gate, of_whole in zip(gates, whole, strict=True):
                    of_whole[b, n, raster] = gate[b, n, tokens].double()
                mask = torch.tensor(reference_of_head(case, whole, b, n, num_heads, Grid(*size)), dtype=torch.float64)
                mask = mask[raster][:, raster]
            else:
                line = [gate[:, :, tokens] for gate in gates]
                of_head = reference_of_head(case, line, b, n, num_heads, Grid(1, len(tokens)))
                mask = torch.tensor(of_head, dtype=torch.float64)
            for a, i in enumerate(tokens):
                for c, j in enumerate(tokens):
                    expected[b, n, i, j] = mask[a, c]
    return expected


def reference_of_head(case: Case, gates: Sequence[Tensor], b: int, n: int, num_heads: int, grid: Grid) -> Any:
    """What the equations say of one image and head: a mask over patch tokens, or (columns, rows)."""
    of_head = [gate[b, n, grid.num_prefix_tokens :].tolist() for gate in gates]
    return case.reference(of_head, n, num_heads, grid.height, grid.width)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
