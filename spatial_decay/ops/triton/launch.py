"""One launch of the Triton kernel: what it takes besides the tensors, and by which schedule it runs."""

import math
import time
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spatial_decay.layout import Layout
from spatial_decay.ops.formulas import FORMULAS, position_table
from spatial_decay.ops.triton import schedule as schedules
from spatial_decay.ops.triton.schedule import Schedule, Step, Work, power_of_two

__all__ = ["TOO_FAR", "Launch", "is_short", "positions_of", "reaches_too_far", "split_scale"]

TOO_FAR = "2**31 or more elements apart (needs fewer, for 32-bit offsets)"

_Strided: TypeAlias = tuple[torch.Size, tuple[int, ...]]  # shape and strides


class Launch:
    """One step on its tensors.

    Args:
        step: Which.
        features: The tensors (B, O, N, L, d) in its order, q first.
        rows: Those of one number or a few a token and head, contiguous, in its order.
        formula: Of the decay, a name in ops/formulas.py.
        numbers: (num_numbers, B*O|1, N, L).
        key_mask: (B*O|1, N|1, 1, L).
        positions: Of positions_of.
        num_prefix: P.
        scale: Of the scores.
        tunes: Whether the schedule is timed.
    """

    def __init__(
        self,
        step: Step,
        features: Sequence[Tensor],
        rows: Sequence[Tensor],
        formula: str,
        numbers: Tensor,
        key_mask: Tensor | None,
        positions: Tensor,
        num_prefix: int,
        scale: float,
        tunes: bool,
    ) -> None:
        q = features[0]
        self._step, self._device, self._tunes = step, q.device, tunes
        mask = numbers if key_mask is None else key_mask  # not read where there is none
        self._plan = _plan(
            step,
            _work(q, formula, num_prefix, key_mask is not None, positions.shape[1] == 3),
            q.shape,
            tuple([x.stride() for x in features]),
            (numbers.shape, numbers.stride()),
            (mask.shape, mask.stride()),
            0 if len(positions) == 1 else positions.stride(0),
            scale,
        )
        # A tensor goes with its strides. A tuple of none would have no type: None.
        plan = self._plan
        self._arguments = (
            tuple([(x, *strides) for x, strides in zip(features, plan.feature_strides, strict=True)]),
            tuple(rows) or None,
            (numbers, *plan.number_strides),
            (mask, *plan.key_mask_strides),
            (positions, plan.position_stride),
            *plan.sizes,
        )

    def schedule(self) -> Schedule:
        """How it is to run: from the table, or timed by running it."""
        work = self._plan.work
        first = schedules.from_table(self._step, work)
        if not self._tunes:
            return first
        key = (self._step, work, self._plan.shape, self._plan.strides, self._device)
        choices = schedules.candidates(self._step, first)
        return schedules.fastest(key, choices, lambda schedule: _seconds(self, schedule, self._device))

    def __call__(self, schedule: Schedule) -> None:
        """Launch it."""
        num_programs, options = self._plan.options(schedule, self._device)
        _kernels().attention[num_programs](*self._arguments, **options)


class _Plan:
    """What is the same in all calls with the same shapes: gathering it takes longer than a launch."""

    def __init__(
        self,
        step: Step,
        work: Work,
        shape: torch.Size,
        feature_strides: tuple[tuple[int, ...], ...],
        numbers: _Strided,
        key_mask: _Strided,
        position_stride: int,
        scale: float,
    ) -> None:
        self.work, self.shape, self._step = work, shape, step
        batch_size, num_outer, num_heads, self._length, head_dim = shape
        self._num_sequences = batch_size * num_outer * num_heads
        # Asked of the caller's tensors before, but while a compiler traces, which knows no sizes.
        if any(reaches_too_far(self._length, stride[3]) for stride in (*feature_strides, numbers[1])):
            raise NotImplementedError(f"backend='triton': the tokens of one sequence lie {TOO_FAR}.")
        strides = [_strides(shape, stride)[:-1] for stride in feature_strides]
        unit = 16 // work.dtype.itemsize
        unit = unit if all(stride % unit == 0 for one in strides for stride in one) else 1
        self.feature_strides = [tuple([stride // unit for stride in one]) for one in strides]
        self.number_strides = _strides(*numbers)
        of_mask = _strides(*key_mask)
        self.key_mask_strides = (*of_mask[:2], of_mask[3]) if work.has_key_mask else (0, 0, 0)
        self.position_stride = position_stride
        self.strides = (*self.feature_strides, self.number_strides, self.key_mask_strides, position_stride)
        self.sizes = (num_outer, num_heads, self._length, *split_scale(scale, work.dtype))
        first, rest = _parts(head_dim)
        self._constants: dict[str, Any] = {
            "STEP": step,
            "FORMULA": work.formula,
            "NUM_NUMBERS": work.num_numbers,
            "READS_KEYS": FORMULAS[work.formula].reads_keys,
            "HAS_KEY_MASK": work.has_key_mask,
            "HAS_FLAGS": work.has_flags,
            "NUM_PREFIX": work.num_prefix,
            "D": head_dim,
            "D1": first,
            "D2": rest,
            "UNIT": unit,
            "UPCAST": _kernels().are_interpreted and work.dtype == torch.bfloat16,
            "enable_fp_fusion": True,  # a product and a sum in one instruction
        }
        self._options: dict[tuple[Schedule, torch.device], tuple[tuple[int], dict[str, Any]]] = {}

    def options(self, schedule: Schedule, device: torch.device) -> tuple[tuple[int], dict[str, Any]]:
        """The number of programs, and what they are compiled for."""
        key = (schedule, device)
        if (known := self._options.get(key)) is None:
            _refuse_while_capturing(device, "run")  # the first launch compiles and loads the kernel
            known = self._options[key] = self._new_options(schedule)
        return known

    def _new_options(self, schedule: Schedule) -> tuple[tuple[int], dict[str, Any]]:
        owned, walked = schedule.queries, schedule.keys
        if self._step == "backward columns":
            owned, walked = walked, owned
        rest = 0 if self._step.startswith("short") else self.work.num_prefix + self.work.num_patches % walked
        return (self._num_sequences * -(-self._length // owned),), self._constants | {
            "BLOCK_Q": schedule.queries,
            "BLOCK_K": schedule.keys,
            "REST_BLOCK": 0 if rest == 0 else min(walked, max(16, power_of_two(rest))),  # as small as can be
            "num_warps": schedule.num_warps,
            "num_stages": schedule.num_stages,
            "maxnreg": schedule.max_registers or None,
        }


_plan = lru_cache(maxsize=1024)(_Plan)


def is_short(q: Tensor, formula: str, layout: Layout) -> bool:
    """Whether a program can hold a whole sequence of q, (B, O, N, L, d)."""
    if not layout.is_grid or layout.num_prefix_tokens or FORMULAS[formula].num_numbers > 1:
        return False
    return schedules.num_warps_of_short(_work(q, formula, num_prefix=0, has_key_mask=False, has_flags=False)) > 0


def _work(q: Tensor, formula: str, num_prefix: int, has_key_mask: bool, has_flags: bool) -> Work:
    num_numbers, num_patches = FORMULAS[formula].num_numbers, q.shape[3] - num_prefix
    groups = _has_warp_groups(q.device)
    return Work(formula, num_numbers, q.dtype, q.shape[4], num_patches, num_prefix, has_key_mask, has_flags, groups)


def _has_warp_groups(device: torch.device) -> bool:
    """The interpreter does as compute capability 9 would."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major in (9, 10)


def _seconds(run: Callable[[Schedule], None], schedule: Schedule, device: torch.device) -> float | None:
    """Of the kernel by this schedule; None where it does not fit into the GPU."""
    import triton
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    _refuse_while_capturing(device, "timed")
    start = time.perf_counter()
    try:
        run(schedule)
    except (OutOfResources, PTXASError, CompileTimeAssertionFailure):  # as Triton's own tuner
        return None
    if device.type != "cuda":
        return time.perf_counter() - start
    return triton.testing.do_bench(lambda: run(schedule), warmup=5, rep=20, return_mode="median") / 1000


def _refuse_while_capturing(device: torch.device, done: str) -> None:
    if _is_capturing(device):
        raise RuntimeError(
            f"backend='triton' has not {done} its kernels for such inputs yet, and cannot while a CUDA graph is "
            "captured. Call it once before, forward and backward, with the same shapes."
        )


def _is_capturing(device: torch.device) -> bool:
    """Whether the stream in use on this device, which need not be the current one, records a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@cache
def _kernels() -> SimpleNamespace:
    """The kernel, imported at the first use because Triton is large, and whether it runs in Triton's interpreter."""
    import triton

    from spatial_decay.ops.triton.kernels import attention

    return SimpleNamespace(attention=attention, are_interpreted=not isinstance(attention, triton.runtime.JITFunction))


def positions_of(layout: Layout, formula: str, q: Tensor) -> Tensor:
    """The position_table of tokens, kept: reading a table is cheaper than dividing by W for each score."""
    # What is a part of a graph, or not real, or belongs to one batch, is not kept.
    if not layout.is_grid or torch.compiler.is_compiling() or type(q) is not Tensor:
        return position_table(layout, formula, q.device)
    key = (layout, FORMULAS[formula].is_path, q.device)
    if (kept := _KEPT.get(key)) is not None:
        return kept
    if len(_KEPT) >= _MOST_KEPT or _is_capturing(q.device):
        return position_table(layout, formula, q.device)  # of this call, or of the graph, whose replay fills it
    with torch.inference_mode(mode=False):  # whatever the first call is for, a later one may train
        positions = position_table(layout, formula, q.device)
    if q.is_cuda:
        torch.cuda.current_stream(q.device).synchronize()  # other streams will read it too
    _KEPT[key] = positions
    return positions


_MOST_KEPT = 256  # grids; who has more pays for a table at each call
_KEPT: dict[tuple[Layout, bool, torch.device], Tensor] = {}  # for good: CUDA graphs may hold their addresses


def reaches_too_far(length: int, token_stride: int) -> bool:
    """Whether the tokens of a sequence lie too far apart for the kernels, which count elements within it in 32 bits."""
    return token_stride * length >= 2**31


def split_scale(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """As a power of two and a factor from 1 on, of which a program multiplies its own queries or keys.

    The numbers of a decay are divided by the first, which rounds them not: sums along a path are large, and near tokens
    have small differences of them. Half precision would round the queries, and has no digits that this would save.
    """
    if dtype != torch.float32:
        return scale, 1.0
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(1.0, exponent - 1), 2 * mantissa


def _parts(head_dim: int) -> tuple[int, int]:
    """head_dim as a power of two and a rest of 16 or more, 72 = 64 + 16; or as one where that is no larger."""
    whole = max(16, power_of_two(head_dim))
    rest = max(16, power_of_two(head_dim - whole // 2))
    return (whole, 0) if head_dim <= 16 or whole // 2 + rest >= whole else (whole // 2, rest)


def _strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    """0 where there is only one: then all share it, and Triton compiles no kernel of its own for a stride of 1."""
    return tuple([0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)])
