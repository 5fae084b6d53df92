"""Who takes part in the benchmarks of attention: this package's backends, and the ways in which others add a decay."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import Call
from spatial_decay import Grid, decay_attention
from spatial_decay.decay import (
    AxialDecay,
    Decay,
    GaussianDecay,
    ManhattanDecay,
    PairwiseDecay,
    PathDecay,
    SquaredDecay,
    score_mod,
)
from spatial_decay.features import columns_of_rows, from_columns, to_columns, to_rows
from spatial_decay.ops import BACKENDS

__all__ = [
    "AUTOTUNED",
    "CASES",
    "COMPILED",
    "FLOOR",
    "MASK_COMPILED",
    "PASSES",
    "PEERS",
    "PLAIN",
    "Case",
    "Setting",
    "contenders",
    "gaussian_mask",
    "make_call",
]

FLOOR, MASK_COMPILED, FLEX_AUTOTUNED = "plain SDPA", "mask compiled", "flex, max-autotune"
PASSES = ("forward", "forward+backward")
ALPHA = {"full": 0.1, "squared": 0.01}

Gates: TypeAlias = tuple[Tensor, ...]
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Gates], Tensor]
"""q, k, v, (B, N, L, d), and gates, (B, N, L) -> the output."""


@dataclass(frozen=True)
class Case:
    """A kind of decay, named as in SpatialDecayMask, and the shape (B, N, L, d).

    compiles: Whether those that torch.compile compiles take part, which takes half a minute.
    """

    kind: str
    batch_size: int
    num_heads: int
    grid: Grid
    head_dim: int
    compiles: bool = True

    @property
    def shape(self) -> str:
        (height, width), num_prefix = self.grid.size, self.grid.num_prefix_tokens
        size = f"{height}x{width}" + (f"+{num_prefix}" if num_prefix else "")
        return f"{self.batch_size}, {self.num_heads}, {size}, {self.head_dim}"

    @property
    def num_gates(self) -> int:
        return {"gaussian": 3, "decomposed": 2, "bidirectional": 2}.get(self.kind, 1)

    def decay(self, gates: Gates) -> Decay:
        if self.kind == "decomposed":
            return AxialDecay.from_gates(gates[0], gates[1], self.grid)
        if self.kind == "1d":
            return PathDecay.from_gate(gates[0], self.grid)
        if self.kind == "bidirectional":
            return PathDecay.bidirectional(gates[0], gates[1], self.grid)
        if self.kind == "gaussian":
            amplitude, variance_h, variance_w = gaussian_numbers(gates)
            return GaussianDecay(amplitude, variance_h, variance_w, self.grid)
        described: type[ManhattanDecay] | type[SquaredDecay] = (
            SquaredDecay if self.kind == "squared" else ManhattanDecay
        )
        return described.from_gate(gates[0], self.grid, alpha=ALPHA[self.kind])


def gaussian_numbers(gates: Gates) -> Gates:
    """An amplitude >= 0 and two variances > 0 of three gates <= 0."""
    return -gates[0], 0.5 - 3 * gates[1], 0.5 - 3 * gates[2]


_ON_CUDA = (
    (128, 8, Grid(14, 14), 32),
    (64, 12, Grid(14, 14), 64),
    (32, 12, Grid(16, 16), 64),
    (32, 16, Grid(16, 16), 72),
    (8, 16, Grid(32, 32), 64),
    (1, 16, Grid(64, 64), 64),
)
CASES: dict[str, list[Case]] = {
    "cpu": [
        Case("full", 8, 8, Grid(14, 14), 32),
        Case("full", 4, 12, Grid(16, 16), 64, compiles=False),
        Case("full", 4, 12, Grid(14, 14, num_prefix_tokens=1), 64, compiles=False),
        Case("full", 1, 8, Grid(32, 32), 64),
        Case("full", 2, 6, Grid(37, 37), 64, compiles=False),
        Case("full", 1, 4, Grid(56, 56), 32),
        Case("bidirectional", 4, 8, Grid(20, 28), 32, compiles=False),
        Case("1d", 4, 12, Grid(16, 16), 64, compiles=False),
        Case("decomposed", 8, 4, Grid(28, 28), 32),
        Case("decomposed", 8, 4, Grid(56, 56), 16, compiles=False),
        Case("gaussian", 8, 8, Grid(14, 14), 32, compiles=False),
        Case("gaussian", 1, 8, Grid(32, 32), 64, compiles=False),
        Case("squared", 8, 8, Grid(14, 14), 32, compiles=False),
        Case("squared", 4, 12, Grid(14, 14, num_prefix_tokens=1), 64, compiles=False),
        Case("squared", 1, 8, Grid(32, 32), 64, compiles=False),
        Case("squared", 1, 4, Grid(56, 56), 32, compiles=False),
    ],
    "cuda": [
        *(Case(kind, *shape) for kind in ("full", "1d") for shape in _ON_CUDA),
        Case("full", 64, 12, Grid(14, 14, num_prefix_tokens=1), 64),
        Case("decomposed", 128, 4, Grid(28, 28), 32),
        Case("decomposed", 128, 4, Grid(56, 56), 16),
        Case("gaussian", 64, 12, Grid(14, 14, num_prefix_tokens=1), 64),
        Case("gaussian", 8, 16, Grid(32, 32), 64),
        Case("squared", 64, 12, Grid(14, 14, num_prefix_tokens=1), 64),
        Case("squared", 8, 16, Grid(32, 32), 64),
    ],
}
"""By device, the smallest of a kind first: layers of SDT-H, ViT-B, SDT-P and larger images; on cuda in real batches."""


@dataclass(frozen=True)
class Setting:
    """What all cases of a run share."""

    device: torch.device
    dtype: torch.dtype
    memory: str  # "tokens": q, k and v are (B, L, N, d) there, as a ViT has heads; "heads": (B, N, L, d)


# Peers: what one writes without this package. Eager ones get the table of distances for nothing.


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's own, with a mask in memory."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))


def plain(q: Tensor, k: Tensor, v: Tensor, mask: None, *, kernel: SDPBackend = SDPBackend.FLASH_ATTENTION) -> Tensor:
    """Without a mask; on cuda in half precision by one kernel, so that no choice of PyTorch's comes between."""
    one_kernel = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    with sdpa_kernel(kernel) if one_kernel else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def cudnn(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
    """The same by cuDNN."""
    return plain(q, k, v, mask, kernel=SDPBackend.CUDNN_ATTENTION)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """RMT's: softmax(Q K^T / sqrt(d) + M) V, step by step."""
    assert mask is not None
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask.to(q.dtype)
    return scores.softmax(-1) @ v


def path_mask(gate: Tensor) -> Tensor:
    """SDT Eq. 6, (..., L) -> (..., L, L)."""
    total = F.pad(gate.abs()[..., :-1], (1, 0)).cumsum(-1)
    return -(total[..., :, None] - total[..., None, :]).abs()


def peer(case: Case, attend: Callable[..., Tensor], added: Callable[[Gates], Sequence[Any]]) -> Attend:
    """An attention of q, k, v and what is added to the scores, in this case: one thing, or one for rows and columns."""
    grid = case.grid

    def whole(q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Tensor:
        return attend(q, k, v, *added(gates))

    def axes(q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Tensor:
        rows, columns = added(gates)
        v = attend(*(to_rows(x, grid).flatten(0, 1) for x in (q, k, v)), rows)  # (B*H, N, W, d)
        v = columns_of_rows(v.unflatten(0, (-1, grid.height))).flatten(0, 1)
        v = attend(*(to_columns(x, grid).flatten(0, 1) for x in (q, k)), v, columns)  # (B*W, N, H, d)
        return from_columns(v.unflatten(0, (-1, grid.width)))

    return axes if case.kind == "decomposed" else whole


def without_decay(case: Case, attend: Callable[..., Tensor]) -> Attend:
    """An attention without a decay, once or along rows and columns."""
    nothing = (None, None) if case.kind == "decomposed" else (None,)
    return peer(case, attend, lambda _gates: nothing)


def gaussian_mask(numbers: Gates, minus_half_squares: Tensor) -> Tensor:
    """LocAtViT's a_i * exp(-(dh^2 / s_h + dw^2 / s_w) / 2), as its code has it.

    Numbers (B, N, L) and -squares / 2, (L, L, 2), -> (B, N, L, L).
    """
    amplitude, *variances = (number[..., None] for number in numbers)  # (B, N, L, 1)
    return amplitude * (minus_half_squares / torch.stack(variances, -1)).sum(-1).exp()


def with_mask(case: Case, attend: Callable[..., Tensor], device: torch.device) -> Attend:
    """An attention that takes a mask: SDT Eq. 7-9, 6, 11-12, LocAtViT's or that of the squared distance."""
    grid, num_prefix = case.grid, case.grid.num_prefix_tokens
    steps = [axis[:, None] - axis for axis in grid.positions(device=device, dtype=torch.float32)]  # (H*W, H*W) each
    distances = {
        "full": lambda h, w: h.abs() + w.abs(),
        "squared": lambda h, w: h.square() + w.square(),
    }
    of_kind = distances.get(case.kind)
    distance = F.pad(of_kind(*steps), (num_prefix, 0, num_prefix, 0)) if of_kind else None
    minus_half_squares = -0.5 * torch.stack(steps, -1) ** 2 if case.kind == "gaussian" else None

    def masks(gates: Gates) -> Sequence[Tensor]:
        if case.kind == "decomposed":
            of_columns, of_rows = gates
            return [path_mask(x.flatten(0, 1)) for x in (to_rows(of_rows, grid), to_columns(of_columns, grid))]
        if case.kind == "bidirectional":  # Table 4: the backward scan is the forward one of the gates in reverse
            return [(path_mask(gates[0]) + path_mask(gates[1].flip(-1)).flip(-1, -2)) / 2]
        if minus_half_squares is not None:
            numbers = gaussian_numbers(tuple(gate[..., num_prefix:] for gate in gates))
            return [F.pad(gaussian_mask(numbers, minus_half_squares), (num_prefix, 0, num_prefix, 0))]
        if distance is None:
            return [path_mask(gates[0])]
        strength = gates[0] * (ALPHA[case.kind] / 2)
        return [(strength[..., :, None] + strength[..., None, :]) * distance]

    return peer(case, attend, masks)


def flex_autotuned(case: Case) -> Attend:
    """FlexAttention at its best: PyTorch times its tiles too."""
    kernel: Callable[..., Tensor] = torch.compile(
        importlib.import_module("torch.nn.attention.flex_attention").flex_attention,
        dynamic=False,
        fullgraph=True,
        mode="max-autotune-no-cudagraphs",
    )

    def decays(gates: Gates) -> Sequence[PairwiseDecay]:
        decay = case.decay(gates)
        return [decay.rows, decay.columns] if isinstance(decay, AxialDecay) else [decay]

    return peer(case, lambda q, k, v, decay: kernel(q, k, v, score_mod=score_mod(decay)), decays)


def library(case: Case, backend: Any, *, decays: bool = True) -> Attend:
    """This package's decay_attention."""

    def attend(q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Tensor:
        return decay_attention(q, k, v, case.decay(gates) if decays else None, backend=backend)

    return attend


# No gate and no mask: what decay is held against. The last two are for cuda only.
PLAIN: dict[str, Callable[[Case, torch.device], Attend]] = {
    FLOOR: lambda case, _device: without_decay(case, plain),
    "plain cuDNN": lambda case, _device: without_decay(case, cudnn),
    "triton, no decay": lambda case, _device: library(case, "triton", decays=False),
}
PEERS: dict[str, Callable[[Case, torch.device], Attend]] = {
    "mask eager": lambda case, device: with_mask(case, sdpa, device),
    MASK_COMPILED: lambda case, device: torch.compile(with_mask(case, sdpa, device), dynamic=False),
    "written-out softmax": lambda case, device: with_mask(case, written_out, device),
    FLEX_AUTOTUNED: lambda case, _device: flex_autotuned(case),
}
AUTOTUNED = ("triton_autotune", FLEX_AUTOTUNED)
NOT_MEANT_FOR_CUDA = ("auto", "native", "tiled", "math")
"""auto is triton there, and the others take 10 to 30 times as long."""
COMPILED = (MASK_COMPILED, "flex", FLEX_AUTOTUNED)


def contenders(device: torch.device, *, autotune: bool = False) -> list[str]:
    """The floor, the backends of this package, the peers; those that time their tiles first only where asked for."""
    is_cuda = device.type == "cuda"
    names = [*(PLAIN if is_cuda else [FLOOR]), "auto", *BACKENDS, *PEERS]
    return [
        name for name in names if (autotune or name not in AUTOTUNED) and not (is_cuda and name in NOT_MEANT_FOR_CUDA)
    ]


def attend_by(contender: str, case: Case, device: torch.device) -> Attend:
    """The attention of that name."""
    others = PLAIN | PEERS
    return others[contender](case, device) if contender in others else library(case, contender)


def make_call(case: Case, setting: Setting, contender: str, which: str, exact: bool = False) -> Call:
    """One pass of one contender on inputs of its own; exact: the same inputs in float64."""
    device, needs_grad = setting.device, which == PASSES[1]
    generator = torch.Generator(device).manual_seed(0)

    def heads() -> Tensor:
        shape = (case.batch_size, case.grid.num_tokens, case.num_heads, case.head_dim)
        x = torch.randn(shape, generator=generator, device=device).to(setting.dtype).transpose(1, 2)
        x = x if setting.memory == "tokens" else x.contiguous()
        return x.double() if exact else x

    def gate() -> Tensor:
        shape = (case.batch_size, case.num_heads, case.grid.num_tokens)
        x = F.logsigmoid(torch.randn(shape, generator=generator, device=device))
        return x.double() if exact else x

    q, k, v, grad = (heads() for _ in range(4))
    gates = tuple(gate() for _ in range(case.num_gates))
    inputs = [x.requires_grad_(needs_grad) for x in ((q, k, v) if contender in PLAIN else (q, k, v, *gates))]
    attend = attend_by(contender, case, device)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(q, k, v, gates),)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v, gates), inputs, grad)

    return forward_and_backward if needs_grad else forward
