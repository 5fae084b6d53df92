"""Attention with decay against plain F.scaled_dot_product_attention, and against the ways in which others add a decay.

    python -m benchmarks.attention                               # CPU, float32; results in outputs/benchmarks/attention
    python -m benchmarks.attention --device cuda --dtype bfloat16 --cold-cache

Contenders start at the gate: forward is gate -> output without autograd, forward+backward ends at the gradients of
q, k, v and the gate. The floor has no gate and no mask; on cuda, in half precision, it is PyTorch's flash kernel. Needs
the extra [viz] for the picture.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.report import DTYPES, Row, command_line, format_table, machine, timing_columns, write_results
from benchmarks.timing import Call, captured, interleaved, peak_memory, reasons, relative_error
from spatial_decay import Grid, decay_attention
from spatial_decay.decay import AxialDecay, Decay, ManhattanDecay, PairwiseDecay, PathDecay, score_mod
from spatial_decay.features import columns_of_rows, from_columns, to_columns, to_rows
from spatial_decay.ops import BACKENDS

FLOOR, COMPILED, FLEX_AUTOTUNED = "plain SDPA", "mask compiled", "flex, max-autotune"
PASSES = ("forward", "forward+backward")
ALPHA = 0.1

Gates: TypeAlias = tuple[Tensor, ...]
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Gates], Tensor]
"""q, k, v, (B, N, L, d), and gates, (B, N, L) -> the output."""


@dataclass(frozen=True)
class Case:
    """A kind of decay, named as in SpatialDecayMask, and the shape (B, N, L, d)."""

    kind: str
    batch_size: int
    num_heads: int
    grid: Grid
    head_dim: int

    @property
    def shape(self) -> str:
        height, width = self.grid.size
        return f"{self.batch_size}, {self.num_heads}, {height}x{width}, {self.head_dim}"

    def decay(self, gates: Gates) -> Decay:
        if self.kind == "decomposed":
            return AxialDecay.from_gates(gates[0], gates[1], self.grid)
        if self.kind == "1d":
            return PathDecay.from_gate(gates[0], self.grid)
        return ManhattanDecay.from_gate(gates[0], self.grid, alpha=ALPHA)


_Shapes: TypeAlias = dict[str, tuple[tuple[int, int, Grid, int], ...]]
_WHOLE: _Shapes = {
    "cpu": ((8, 8, Grid(14, 14), 32), (4, 12, Grid(16, 16), 64), (1, 8, Grid(32, 32), 64), (1, 4, Grid(56, 56), 32)),
    "cuda": (
        (128, 8, Grid(14, 14), 32),
        (64, 12, Grid(14, 14), 64),
        (32, 12, Grid(16, 16), 64),
        (32, 16, Grid(16, 16), 72),
        (8, 16, Grid(32, 32), 64),
        (1, 16, Grid(64, 64), 64),
    ),
}
_AXIAL: _Shapes = {
    "cpu": ((8, 4, Grid(28, 28), 32), (8, 4, Grid(56, 56), 16)),
    "cuda": ((128, 4, Grid(28, 28), 32), (128, 4, Grid(56, 56), 16)),
}
CASES = {
    device: {
        kind: [Case(kind, *shape) for shape in shapes[device]]
        for kind, shapes in {"full": _WHOLE, "1d": _WHOLE, "decomposed": _AXIAL}.items()
    }
    for device in ("cpu", "cuda")
}
"""By device and kind, the smallest first: layers of SDT-H, ViT-B, SDT-P and larger images; on cuda in real batches."""


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


def with_mask(case: Case, attend: Callable[..., Tensor], device: torch.device) -> Attend:
    """An attention that takes a mask: SDT Eq. 7-9, 6 or 11-12."""
    grid = case.grid
    axes = grid.positions(device=device, dtype=torch.float32)
    down, right = ((axis[:, None] - axis).abs() for axis in axes)  # (L, L)
    distance = down + right if case.kind == "full" else None

    def masks(gates: Gates) -> Sequence[Tensor]:
        if case.kind == "decomposed":
            of_columns, of_rows = gates
            return [path_mask(x.flatten(0, 1)) for x in (to_rows(of_rows, grid), to_columns(of_columns, grid))]
        if distance is None:
            return [path_mask(gates[0])]
        strength = gates[0] * (ALPHA / 2)
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
    COMPILED: lambda case, device: torch.compile(with_mask(case, sdpa, device), dynamic=False),
    "written-out softmax": lambda case, device: with_mask(case, written_out, device),
    FLEX_AUTOTUNED: lambda case, _device: flex_autotuned(case),
}
AUTOTUNED = ("triton_autotune", FLEX_AUTOTUNED)


def contenders(device: torch.device, *, autotune: bool = False) -> list[str]:
    """The floor, the backends of this package, the peers; those that time their tiles first only where asked for."""
    names = [*(PLAIN if device.type == "cuda" else [FLOOR]), "auto", *BACKENDS, *PEERS]
    return [name for name in names if autotune or name not in AUTOTUNED]


def attend_by(contender: str, case: Case, device: torch.device) -> Attend:
    """The attention of that name."""
    others = PLAIN | PEERS
    return others[contender](case, device) if contender in others else library(case, contender)


def make_call(case: Case, setting: Setting, contender: str, which: str, exact: bool = False) -> Call:
    """One pass of one contender on inputs of its own; exact: the same inputs in float64."""
    device, needs_grad = setting.device, which == PASSES[1]
    generator = torch.Generator().manual_seed(0)

    def heads() -> Tensor:
        shape = (case.batch_size, case.grid.num_tokens, case.num_heads, case.head_dim)
        x = torch.randn(shape, generator=generator).to(device, setting.dtype).transpose(1, 2)
        x = x if setting.memory == "tokens" else x.contiguous()
        return x.double() if exact else x

    def gate() -> Tensor:
        shape = (case.batch_size, case.num_heads, case.grid.num_tokens)
        x = F.logsigmoid(torch.randn(shape, generator=generator)).to(device)
        return x.double() if exact else x

    q, k, v, grad = (heads() for _ in range(4))
    gates = tuple(gate() for _ in range(2 if case.kind == "decomposed" else 1))
    inputs = [x.requires_grad_(needs_grad) for x in ((q, k, v) if contender in PLAIN else (q, k, v, *gates))]
    attend = attend_by(contender, case, device)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(q, k, v, gates),)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v, gates), inputs, grad)

    return forward_and_backward if needs_grad else forward


def measure(case: Case, setting: Setting, which: str, arguments: argparse.Namespace) -> list[Row]:
    """One pass of all contenders; one that cannot run has a note in place of numbers."""
    if not arguments.quick:
        torch.compiler.reset()  # a function is compiled for a few shapes only, then no more
    wanted = make_call(case, setting, "math", which, exact=True)()
    calls: dict[str, Call] = {}
    errors: dict[str, float | None] = {}
    repeats: dict[str, bool] = {}
    notes: dict[str, str] = {}
    names = contenders(setting.device, autotune=arguments.autotune)
    for name in names:
        if arguments.quick and name in (COMPILED, "flex"):  # compiled too
            notes[name] = "left out by --quick"
            continue
        call = make_call(case, setting, name, which)
        try:
            found = call()
        except Exception as error:  # a backend's reasons, out of memory, and whatever compilers raise
            notes[name] = reasons(error)
            continue
        try:
            calls[name] = call if arguments.eager else captured(call, setting.device)
        except Exception as error:  # what cannot be captured says so in many ways
            notes[name] = f"not captured, timed with its launches: {reasons(error)}"
            calls[name] = call
        errors[name] = None if name in PLAIN else relative_error(found, wanted)
        repeats[name] = all(torch.equal(a, b) for a, b in zip(found, call(), strict=True))
    del wanted
    timings = interleaved(
        calls,
        FLOOR,
        rounds=1 if arguments.quick else arguments.rounds,
        device=setting.device,
        warmup=0 if arguments.quick else 2,
        min_seconds=0 if arguments.quick else 0.02,
        cold_cache=arguments.cold_cache,
    )
    rows: list[Row] = []
    for name in names:
        measures_memory = name in calls and not (arguments.no_memory or arguments.quick)
        peak = peak_memory(make_call, case, setting, name, which, device=setting.device) if measures_memory else None
        row: Row = {"kind": case.kind, "B, N, grid, d": case.shape, "L": case.grid.num_tokens, "pass": which}
        row |= {"contender": name, **timing_columns(timings.get(name)), "peak MB": None if peak is None else peak / 1e6}
        row |= {"error": errors.get(name), "repeatable": {True: "yes", False: "no", None: ""}[repeats.get(name)]}
        rows.append(row | {"note": notes.get(name, "")})
    return rows


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line; the rows of results.csv."""
    from benchmarks.picture import plot_ratios  # not in the processes that measure memory

    parser = command_line(__doc__.splitlines()[0], "attention", rounds=15)
    parser.add_argument("--kinds", default="full,1d,decomposed", help="of decay, comma-separated")
    parser.add_argument("--memory", choices=("tokens", "heads"), default="tokens", help="order of q, k and v there")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument(
        "--autotune", action="store_true", help="also those that time their tiles first, on cuda: minutes a case"
    )
    parser.add_argument(
        "--eager", action="store_true", help="on cuda, with the time that Python takes to launch kernels"
    )
    parser.add_argument("--cold-cache", action="store_true", help="on cuda, empty the L2 cache before each timing")
    arguments = parser.parse_args(argv)
    kinds, cases = arguments.kinds.split(","), CASES[arguments.device]
    if unknown := set(kinds) - set(cases):
        parser.error(f"argument --kinds: choose from {', '.join(cases)}: got {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    setting = Setting(torch.device(arguments.device), DTYPES[arguments.dtype], arguments.memory)
    where = machine(setting.device, arguments.dtype) | {"memory": setting.memory}
    where |= {"cold_cache": arguments.cold_cache, "eager": arguments.eager}
    rows: list[Row] = []
    for case in (case for kind in kinds for case in cases[kind][: 1 if arguments.quick else None]):
        for which in PASSES:
            new = measure(case, setting, which, arguments)
            print(f"\n{format_table(new)}", flush=True)
            rows += new
        write_results(arguments.output, "Attention with decay", ABOUT, rows, where, by=["kind", "B, N, grid, d"])
        plot_ratios(rows, PASSES, FLOOR).savefig(arguments.output / "ratio.png", dpi=150)
    return rows


ABOUT = f"""`ratio` is to `{FLOOR}`, without decay and mask, in the same round: median (quartiles). The floor of
`decomposed` is two calls, over rows and columns, with the same permutes. On cuda it is the GPU's time, of CUDA graphs;
with --eager, which small cases are bound by, the time of the calls.
`peak MB` (10^6 bytes) is above the inputs: outputs, gradients and scratch, on the CPU to about 0.3; `-` where it was
left out (--no-memory, --quick) or the system does not say.
`error` is |x - x64| / |x64| against float64: of the output, or the worst of the gradients of q, k, v and the gates.
`repeatable`: a second call gave the same, bit for bit."""

if __name__ == "__main__":
    main()
