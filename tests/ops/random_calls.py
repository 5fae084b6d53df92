"""Random calls of decay_attention against the equations as loops: python -m tests.ops.random_calls --calls 10000

Each call draws a kind, a layout, a backend, a dtype, a mask and what requires a gradient from the seed and its own
number, so that `--seed 0 --first 1234 --calls 1` is that call again. Outputs are held against loops in float64, which
read the mask's values as DESIGN has them; gradients against autograd through the same loops' masks in float64.
"""

import argparse
import os
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spatial_decay.decay import AxialDecay, Decay, dense
from spatial_decay.decay.base import STRONGEST
from spatial_decay.layout import Grid, Positions
from spatial_decay.ops import decay_attention
from tests import references
from tests.cases import CASES, Case, make_gates, reference_mask, reference_mask_of_positions, reference_of_head

# Largest difference over the largest value, and at least over 1 for gradients. float32 adds up some hundred products;
# half precision has 8 or 11 bits, in which masks, weights and outputs are rounded one after the other; beside a mask of
# -90000 the reference itself, in float64, keeps 1.5e-11.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 4e-2}

LOWEST = {dtype: torch.finfo(dtype).min for dtype in TOLERANCE}


@dataclass
class Call:
    """One call of decay_attention."""

    case: Case | None
    backend: str
    dtype: torch.dtype
    layout: Grid | Positions
    size: tuple[int, int]
    q: Tensor
    k: Tensor
    v: Tensor
    gates: list[Tensor]
    attn_mask: Tensor | None
    scale: float | None
    needs_grad: bool
    about: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        mask = "no mask"
        if self.attn_mask is not None:
            mask = f"mask {tuple(self.attn_mask.shape)} {self.attn_mask.dtype}, {self.about}"
            mask += " with a gradient" if self.attn_mask.requires_grad else ""
        return (
            f"{self.case}, {self.backend}, {self.dtype}, {self.layout}, q {tuple(self.q.shape)}, {mask}, "
            f"scale={self.scale}, grad={self.needs_grad}"
        )

    def decay(self, gates: list[Tensor]) -> Decay | None:
        return None if self.case is None else self.case.build(gates, self.q.shape[1], self.layout)


def draw(seed: int, number: int, backends: list[str]) -> Call:
    """Call so-and-so many of a seed."""
    rng = np.random.default_rng([seed, number])
    torch.manual_seed(int(rng.integers(2**31)))

    def pick(choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    backend = pick(backends)
    case = None if rng.random() < 0.07 else pick(CASES)
    if backend == "flex":
        case = pick([None, *(case for case in CASES if case.name in ("full", "1d", "gaussian"))])
    dtypes = list(TOLERANCE)
    if backend == "lowrank":
        case = next(case for case in CASES if case.kind == "squared")
        dtypes = [torch.float64, torch.float32]
    if backend in ("native", "flex"):  # without float64; flex is compiled for each
        dtypes = dtypes[1:] if backend == "native" else [torch.float32]
    dtype = pick(dtypes)
    size = (int(rng.integers(1, 7)), int(rng.integers(1, 6)))
    num_prefix = 0 if case is not None and case.is_axial else pick([0, 0, 1, 3])
    batch_size, num_heads, head_dim = int(rng.integers(1, 4)), int(rng.integers(1, 4)), pick([1, 2, 4, 8, 16])
    if backend == "flex":  # compiled for each shape: few of them
        size, num_prefix, batch_size, num_heads, head_dim = (3, 4), 0, 2, 2, 8
    elif backend == "triton":
        head_dim = 16
    elif backend == "native" and rng.random() < 0.2:  # vectors, and tiles of them, that are full or not
        size, head_dim = (int(rng.integers(1, 13)), int(rng.integers(1, 13))), int(rng.integers(1, 257))
        batch_size, num_heads = 1, pick([1, 2])  # the loops take long
    elif rng.random() < 0.01 and backend not in ("lowrank", "native"):  # where `tiled` goes by other ways
        size, batch_size, num_heads, head_dim = pick([(18, 18), (1, 330), (23, 23)]), 1, 1, 2
    layout: Grid | Positions = Grid(*size, num_prefix)
    takes_positions = case is not None and not case.is_axial and case.kind != "gaussian" and not case.options
    if takes_positions and size[0] * size[1] <= 30 and rng.random() < 0.15 and backend != "flex":
        kept = torch.stack([torch.randperm(size[0] * size[1]) for _ in range(batch_size)])
        kept = kept[:, : int(rng.integers(1, size[0] * size[1] + 1))]
        coordinates = torch.stack([kept // size[1], kept % size[1]], -1)
        layout = Positions.of_coordinates(coordinates, num_prefix_tokens=num_prefix, num_suffix_tokens=pick([0, 2]))
    length = layout.num_tokens
    q, k, v = (torch.randn(batch_size, num_heads, length, head_dim).to(dtype) for _ in range(3))
    gates, is_strong = [], False
    if case is not None:
        of_gates = batch_size if case.is_axial or backend == "flex" else pick([1, batch_size])
        gates = make_gates(case, of_gates, num_heads, length, torch.promote_types(dtype, torch.float32))
        if case.kind != "gaussian":
            strength = pick([0.0, 0.1, 1.0, 1.0, 1.0, 10.0])
            gates = [gate * strength for gate in gates]
            # Of lowrank, terms as large as that do not cancel.
            is_strong = bool(gates) and backend != "lowrank" and rng.random() < 0.05
            if is_strong:
                gates[0][..., int(rng.integers(length))] = pick([-1e3, -1e8, -3e38])
        if isinstance(layout, Positions):
            gates = [gate.expand(batch_size, -1, -1).contiguous() for gate in gates]
    attn_mask, about = None, {}
    if rng.random() < 0.7:
        rows = 1 if backend == "triton" or (backend != "flex" and rng.random() < 0.4) else length
        shape = (batch_size, 1, length, length)
        if backend != "flex":
            shape = (pick([1, batch_size]), pick([1, num_heads]), rows, length)
        own = dtype if backend == "flex" else pick([dtype, dtype, *TOLERANCE, torch.bool])
        attn_mask, about = draw_mask(rng, pick, shape, own, only_forbids=is_strong)
    scale = pick([None, None, None, 0.3, 1.0, -0.5])
    scale = scale if head_dim <= 16 else None  # so that one key has not all the weight
    needs_grad = backend != "flex" and rng.random() < 0.6
    if attn_mask is not None and backend != "flex":
        if rng.random() < 0.3:  # keys that nobody may attend to may be anything
            hidden = (added_values(attn_mask).expand(-1, -1, -1, length) == -float("inf")).all(2)
            k = torch.where(hidden[..., None], (1e3 if dtype == torch.float16 else 1e6) * k, k)
            about["far"] = int(hidden.sum())
        if attn_mask.is_floating_point() and needs_grad and rng.random() < 0.3:
            attn_mask.requires_grad_()
        if rng.random() < 0.3:  # shared memory, or rows that are columns there
            attn_mask = (
                attn_mask.expand(batch_size, num_heads, -1, -1) if rng.random() < 0.5 else other_strides(attn_mask)
            )
    if rng.random() < 0.3:
        q, k, v = (other_strides(x) for x in (q, k, v))
        gates = [other_strides(gate) for gate in gates]
    return Call(case, backend, dtype, layout, size, q, k, v, gates, attn_mask, scale, needs_grad, about)


def other_strides(x: Tensor) -> Tensor:
    """The same numbers, otherwise in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def draw_mask(
    rng: Any, pick: Any, shape: tuple[int, ...], own: torch.dtype, *, only_forbids: bool
) -> tuple[Tensor, dict[str, Any]]:
    """A mask in its own dtype, and what was done to it.

    only_forbids: No finite values that push keys far away: a step that costs more than 256 would show beside them.
    """
    hidden = torch.zeros(shape, dtype=torch.bool)
    patterns = [name for name in ("pairs", "rows", "keys", "all", "one row") if rng.random() < 0.3]
    if "pairs" in patterns:
        hidden |= torch.rand(shape) < 0.4
    if "rows" in patterns:
        hidden |= torch.rand(shape[:3])[..., None] < 0.3
    if "keys" in patterns:
        hidden |= torch.rand(shape[3:]) < 0.3
    if "all" in patterns and rng.random() < 0.2:
        hidden[:] = True
    if own == torch.bool:
        return ~hidden, {"patterns": patterns}
    base = pick(["zeros", "zeros", "random", "random" if only_forbids else "far"])
    mask = torch.zeros(shape) if base == "zeros" else torch.randn(shape)
    mask = (mask - 9000.0 if base == "far" else mask).to(own)
    low = LOWEST[own]
    forbids = [-float("inf"), low, low / 2, *([] if own == torch.float16 else [-1e5, -1e6, -65504.0 * 2])]
    allows = [-1.0] if only_forbids else [-1.0, -100.0, -1e4, -3e4, *([] if own == torch.float16 else [-9e4])]
    if own == torch.float64:
        forbids.append(torch.finfo(torch.float32).min)
    value = pick(forbids + allows)
    mask = mask.masked_fill(hidden, value)
    if "one row" in patterns:  # wholly at one value
        mask[..., 0, :] = pick(forbids + allows)
    return mask, {"patterns": patterns, "base": base, "value": value}


def added_values(attn_mask: Tensor) -> Tensor:
    """What each value of a mask adds, float64."""
    if attn_mask.dtype == torch.bool:
        return torch.zeros(attn_mask.shape, dtype=torch.float64).masked_fill(~attn_mask, -float("inf"))
    limit = torch.tensor(-1e5 if attn_mask.dtype != torch.float16 else -float("inf"), dtype=attn_mask.dtype).item()
    values = attn_mask.detach().double().flatten().tolist()
    added = [references.added_value(x, limit, LOWEST[attn_mask.dtype]) for x in values]
    return torch.tensor(added, dtype=torch.float64).view(attn_mask.shape)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Eq. 10 for gradients, float64: rows that are all -inf give zero."""
    scores = scale * q @ k.transpose(-2, -1) + mask
    is_empty = scores.detach().amax(-1, keepdim=True) == -float("inf")
    return torch.softmax(scores.masked_fill(is_empty, 0.0), -1).masked_fill(is_empty, 0.0) @ v


def attend_axially(q: Tensor, k: Tensor, v: Tensor, decay: AxialDecay, extra: Tensor, scale: float) -> Tensor:
    """Eq. 12 for gradients, one line of the grid after the other."""
    height, width = decay.layout.size
    batch_size, tokens = len(q), torch.arange(height * width).view(height, width)
    masks = [
        dense(one).expand(batch_size * count, -1, -1, -1).unflatten(0, (batch_size, count))
        for one, count in ((decay.rows, height), (decay.columns, width))
    ]
    for lines, mask in zip((tokens, tokens.T), masks, strict=True):
        out = torch.zeros_like(v)
        for number, line in enumerate(lines):
            total = mask[:, number] + extra[:, :, line][..., line]
            new = attend(q[:, :, line], k[:, :, line], v[:, :, line], total, scale)
            out = out.index_copy(2, line, new)
        v = out
    return v


def expected(call: Call, gates: list[Tensor], extra: Tensor) -> Tensor:
    """By loops, (B, N, L, d)."""
    batch_size, num_heads, length, head_dim = call.q.shape
    scale = head_dim**-0.5 if call.scale is None else call.scale
    if call.case is None:
        masks = torch.zeros(1, num_heads, length, length, dtype=torch.float64)
    elif isinstance(call.layout, Positions):
        masks = reference_mask_of_positions(call.case, gates, num_heads, call.layout, call.size)
    elif not call.case.is_axial:
        masks = reference_mask(call.case, gates, num_heads, call.layout)
    out = torch.empty(call.q.shape, dtype=torch.float64)
    for b in range(batch_size):
        for n in range(num_heads):
            head = [x[b, n].double().tolist() for x in (call.q, call.k, call.v)]
            if call.case is not None and call.case.is_axial:
                number = b % len(gates[0]) if gates else 0
                lines = reference_of_head(call.case, gates, number, n, num_heads, call.layout)
                result = references.axial_attention(*head, *lines, *call.size, scale, extra[b, n].tolist())
            else:
                result = references.attention(*head, (masks[b % len(masks), n] + extra[b, n]).tolist(), scale)
            out[b, n] = torch.tensor(result, dtype=torch.float64).view(length, head_dim)
    return out


def difference(actual: Tensor, wanted: Tensor, *, at_least: float = 0.0) -> float:
    """Largest, over the largest value; infinite where either is not finite."""
    actual, wanted = actual.detach().double(), wanted.detach().double()
    if not actual.isfinite().all():
        return float("inf")
    largest = max(wanted.abs().max().item(), at_least, 1e-30)
    return (actual - wanted).abs().max().item() / largest


def rounding_of_paths(call: Call) -> float:
    """Two sums along a path differ by a multiple of what the last bit of the longer one says."""
    if call.case is None or not call.case.along_path:
        return 0.0
    longest = max(gate.abs().clamp(max=STRONGEST).sum(-1).max().item() for gate in call.gates)
    return longest * torch.finfo(torch.promote_types(call.dtype, torch.float32)).eps


def check(call: Call) -> str:
    """What is wrong; empty where nothing is. Raises NotImplementedError where the backend says that it cannot."""
    batch_size, num_heads, length, head_dim = call.q.shape
    leaves = [x.detach().clone().requires_grad_(call.needs_grad) for x in (call.q, call.k, call.v, *call.gates)]
    q, k, v, *gates = leaves
    out = decay_attention(q, k, v, call.decay(gates), attn_mask=call.attn_mask, scale=call.scale, backend=call.backend)
    if out.dtype != call.dtype:
        return f"the output is {out.dtype}"
    added = torch.zeros((), dtype=torch.float64) if call.attn_mask is None else added_values(call.attn_mask)
    extra = added.expand(batch_size, num_heads, length, length)
    doubles = [gate.double() for gate in call.gates]
    if call.case is not None and call.case.kind not in (
        "full",
        "squared",
    ):  # beside 3e38 float64 has no digits left either
        doubles = [gate.clamp(min=-STRONGEST) for gate in doubles]
    wanted = expected(call, doubles, extra)
    tolerance = TOLERANCE[call.dtype] + rounding_of_paths(call)
    if (error := difference(out, wanted)) > tolerance:
        return f"the output is off by {error:.2g} (at most {tolerance:.0e})"
    is_empty = (extra.amax(-1) == -float("inf")) if not isinstance(call.decay(gates), AxialDecay) else None
    if is_empty is not None and out[is_empty].abs().sum() != 0:
        return "the output of queries that may attend to nothing is not 0"
    if not call.needs_grad:
        return ""
    weight = torch.randn(out.shape, dtype=torch.float64)
    mask_needs_grad = call.attn_mask is not None and call.attn_mask.requires_grad
    leaves += [call.attn_mask] * mask_needs_grad
    gradients = torch.autograd.grad((out.double() * weight).sum(), leaves, allow_unused=True)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, *gates)]
    q, k, v, *gates = exact
    if mask_needs_grad:
        exact.append(added.requires_grad_())
        extra = added.expand(batch_size, num_heads, length, length)
    decay, scale = call.decay(gates), head_dim**-0.5 if call.scale is None else call.scale
    if isinstance(decay, AxialDecay):
        out = attend_axially(q, k, v, decay, extra, scale)
    else:
        out = attend(q, k, v, extra if decay is None else dense(decay) + extra, scale)
    if (error := difference(out, wanted)) > 1e-11:
        return f"the two references differ by {error:.2g}"
    exact_gradients = torch.autograd.grad((out * weight).sum(), exact, allow_unused=True)
    names = ["q", "k", "v", *(f"gate {n}" for n in range(len(gates)))]
    names += ["the mask"] * mask_needs_grad
    for name, got, right in zip(names, gradients, exact_gradients, strict=True):
        if got is None or right is None:
            if got is not right:
                return f"the gradient of {name} is {'none' if got is None else 'there'}"
        elif (error := difference(got, right, at_least=1.0)) > (most := max(tolerance, TOLERANCE[got.dtype])):
            return f"the gradient of {name} is off by {error:.2g} (at most {most:.0e})"
    if is_empty is not None and gradients[0] is not None and gradients[0][is_empty].abs().sum() != 0:
        return "the gradient of queries that may attend to nothing is not 0"
    return ""


BACKENDS = ["auto", "math", "sdpa", "tiled", "native", "lowrank"] * 20 + ["triton"] * 3 + ["flex"]


def main() -> int:
    """Count what agrees, what is refused with a reason, and what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    torch._dynamo.config.recompile_limit = 64  # of flex
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(arguments.first, arguments.first + arguments.calls):
        call = draw(arguments.seed, number, arguments.backends)
        try:
            found = check(call)
        except NotImplementedError:
            counts[f"{call.backend} refused"] += 1
            continue
        except Exception:
            found = traceback.format_exc()
        counts[f"{call.backend} {'wrong' if found else 'right'}"] += 1
        if found:
            wrong.append(f"call {number}: {call}\n    {found}")
            print(wrong[-1], flush=True)
    print("\n".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    print(f"{arguments.calls} calls of seed {arguments.seed}: {len(wrong)} wrong, torch {torch.__version__}")
    return 1 if wrong else 0


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    sys.exit(main())
