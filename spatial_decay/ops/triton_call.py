"""One launch of the Triton kernels: what they take besides the tensors, and by which schedule they run."""

import time
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.layout import Grid, Layout, Positions
from spatial_decay.ops import triton_schedule
from spatial_decay.ops.triton_schedule import Schedule, Step, Work, power_of_two

__all__ = ["Launch", "dense", "is_short", "positions_of"]


class Launch:
    """One kernel on its tensors.

    Args:
        step: Which kernel.
        features: The tensors (B, O, N, L, d) in its order, q first.
        numbers: Those of one number a token and head, in its order.
        kind: Of the decay.
        tokens: (numbers, B*O|1, N, L).
        key_bias: (B*O|1, N|1, 1, L).
        positions: Of positions_of.
        num_prefix: P.
        scale: Of the scores.
        tunes: Whether the schedule is timed.
    """

    def __init__(
        self,
        step: Step,
        features: Sequence[Tensor],
        numbers: Sequence[Tensor],
        kind: str,
        tokens: Tensor,
        key_bias: Tensor | None,
        positions: Tensor,
        num_prefix: int,
        scale: float,
        tunes: bool,
    ) -> None:
        q = features[0]
        self._step, self._device, self._tunes = step, q.device, tunes
        bias = tokens if key_bias is None else key_bias  # not read where there is none
        self._tensors = (*features, *numbers, tokens, bias, positions)
        self._plan = _plan(
            step,
            _work(q, kind, num_prefix, key_bias is not None, positions.shape[1] == 3),
            q.shape,
            tuple([x.stride() for x in features]),
            (tokens.shape, tokens.stride()),
            (bias.shape, bias.stride()),
            0 if len(positions) == 1 else positions.stride(0),
            scale,
        )

    def schedule(self) -> Schedule:
        """How it is to run: from the table, or timed by running it."""
        work = self._plan.work
        first = triton_schedule.from_table(self._step, work)
        if not self._tunes:
            return first
        key = (self._step, work, self._plan.shape, self._plan.sizes, self._device)
        choices = triton_schedule.candidates(self._step, first)
        return triton_schedule.fastest(key, choices, lambda schedule: _seconds(self, schedule, self._device))

    def __call__(self, schedule: Schedule) -> None:
        """Launch it."""
        kernel, num_programs, options = self._plan.options(schedule)
        kernel[num_programs](*self._tensors, *self._plan.sizes, **options)


class _Plan:
    """What is the same in all calls with the same shapes: gathering it takes longer than a launch."""

    def __init__(
        self,
        step: Step,
        work: Work,
        shape: torch.Size,
        strides: tuple[tuple[int, ...], ...],
        tokens: tuple[torch.Size, tuple[int, ...]],
        bias: tuple[torch.Size, tuple[int, ...]],
        position_stride: int,
        scale: float,
    ) -> None:
        self.work, self.shape, self._step = work, shape, step
        batch_size, num_outer, num_heads, self._length, head_dim = shape
        self._num_sequences = batch_size * num_outer * num_heads
        features = [_strides(shape, stride)[:-1] for stride in strides]
        unit = 16 // work.dtype.itemsize
        unit = unit if all(stride % unit == 0 for one in features for stride in one) else 1
        bias_strides = (0, *_strides(*bias)[:2], _strides(*bias)[3]) if work.has_key_mask else (0, 0, 0, 0)
        self.sizes = (
            *(tuple([stride // unit for stride in one]) for one in features),
            *(_strides(*tokens), bias_strides),
            *(() if step.startswith("short") else (position_stride,)),
            *(num_outer, num_heads, self._length, scale),
        )
        first, rest = _parts(head_dim)
        self._constants: dict[str, Any] = {
            "KIND": ("none", "manhattan", "path", "gaussian").index(work.kind),
            "HAS_KEY_BIAS": work.has_key_mask,
            "D": head_dim,
            "UNIT": unit,
            "D1": first,
            "D2": rest,
            "UPCAST": _kernels().are_interpreted and work.dtype == torch.bfloat16,
            "enable_fp_fusion": True,  # a product and a sum in one instruction
        }
        self._options: dict[Schedule, tuple[Any, tuple[int], dict[str, Any]]] = {}

    def options(self, schedule: Schedule) -> tuple[Any, tuple[int], dict[str, Any]]:
        """The kernel, the number of its programs, and what they are compiled for."""
        if schedule not in self._options:
            self._options[schedule] = self._new_options(schedule)
        return self._options[schedule]

    def _new_options(self, schedule: Schedule) -> tuple[Any, tuple[int], dict[str, Any]]:
        kernel = _kernels().by_step[self._step]
        options = self._constants | {"num_warps": schedule.num_warps}
        if self._step.startswith("short"):
            return kernel, (self._num_sequences,), options | {"BLOCK": schedule.keys}
        owned, walked = schedule.queries, schedule.keys
        if self._step == "columns":
            owned, walked = walked, owned
        rest = self.work.num_patches % walked  # the last step of the walk is as small as can be
        options |= {
            "NUM_PREFIX": self.work.num_prefix,
            "HAS_FLAGS": self.work.has_flags,
            "PREFIX_BLOCK": min(64, max(16, power_of_two(self.work.num_prefix))),
            "BLOCK_Q": schedule.queries,
            "BLOCK_K": schedule.keys,
            "TAIL_BLOCK": 0 if rest == 0 else max(16, power_of_two(rest)),
            "num_stages": schedule.num_stages,
        }
        return kernel, (self._num_sequences * -(-self._length // owned),), options


_plan = lru_cache(maxsize=1024)(_Plan)


def is_short(q: Tensor, kind: str, layout: Layout) -> bool:
    """Whether a program can hold a whole sequence of q, (B, O, N, L, d)."""
    if isinstance(layout, Positions) or layout.num_prefix_tokens or kind == "gaussian":
        return False
    return triton_schedule.num_warps_of_short(_work(q, kind, 0, False, False)) > 0


def _work(q: Tensor, kind: str, num_prefix: int, has_key_mask: bool, has_flags: bool) -> Work:
    groups = _has_warp_groups(q.device)
    return Work(kind, q.dtype, q.shape[4], q.shape[3] - num_prefix, num_prefix, has_key_mask, has_flags, groups)


def _has_warp_groups(device: torch.device) -> bool:
    """The interpreter does as compute capability 9 would."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major in (9, 10)


def _seconds(run: Callable[[Schedule], None], schedule: Schedule, device: torch.device) -> float | None:
    """Of the kernel by this schedule; None where it does not fit into the GPU."""
    import triton
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend='triton_autotune' has not timed its kernels for these inputs yet, and cannot while a CUDA graph "
            "is captured. Call it once before, forward and backward, with the same shapes."
        )
    start = time.perf_counter()
    try:
        run(schedule)
    except (OutOfResources, PTXASError, CompileTimeAssertionFailure):  # as Triton's own tuner
        return None
    if device.type != "cuda":
        return time.perf_counter() - start
    return triton.testing.do_bench(lambda: run(schedule), warmup=5, rep=20, return_mode="median") / 1000


@cache
def _kernels() -> SimpleNamespace:
    """The kernels, imported at the first use because Triton is large, and whether they run in its interpreter."""
    import triton

    from spatial_decay.ops import triton_kernels, triton_short

    by_step = {
        "forward": triton_kernels.forward,
        "rows": triton_kernels.backward_rows,
        "columns": triton_kernels.backward_columns,
        "short forward": triton_short.forward,
        "short backward": triton_short.backward,
    }
    are_interpreted = not isinstance(triton_kernels.forward, triton.runtime.JITFunction)
    return SimpleNamespace(by_step=by_step, are_interpreted=are_interpreted)


def dense(x: Tensor) -> Tensor:
    """x with neighbouring features beside each other in memory; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def positions_of(layout: Layout, kind: str, q: Tensor) -> Tensor:
    """Where each token lies, for the kernels: reading a table is cheaper than dividing by W for each score.

    Returns:
        (1, 2, L) float32: row and column; for a path 0 and the number along it. Of Positions (B|1, 3, L): also a flag,
        1.0 for tokens that lie somewhere.
    """
    if isinstance(layout, Positions):
        return _placed(layout, kind, q.device)
    assert isinstance(layout, Grid)
    height, width = (1, layout.height * layout.width) if kind == "path" else layout.size
    if torch.compiler.is_compiling() or type(q) is not Tensor:  # a part of the graph, or nothing real
        return _on_grid(height, width, layout.num_prefix_tokens, q.device)
    key = (height, width, layout.num_prefix_tokens, q.device)
    if (kept := _KEPT.get(key)) is not None:
        return kept
    positions = _on_grid(*key)
    if q.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return positions  # empty until the graph is replayed: its own
        torch.cuda.current_stream(q.device).synchronize()  # other streams will read it too
    _KEPT[key] = positions
    return positions


_KEPT: dict[tuple[int, int, int, torch.device], Tensor] = {}  # for good: CUDA graphs may hold their addresses


def _on_grid(height: int, width: int, num_prefix: int, device: torch.device) -> Tensor:
    positions = Grid(height, width).positions(device=device, dtype=torch.float32)
    return F.pad(torch.stack(positions)[None], (num_prefix, 0))


def _placed(layout: Positions, kind: str, device: torch.device) -> Tensor:
    h, w = layout.positions(device=device, dtype=torch.float32)
    if kind == "path":
        w = layout.raster_order().argsort(-1)[:, None].to(device, torch.float32)
    known = torch.ones_like(h) if layout.has_position is None else layout.has_position[:, None].to(h).expand_as(h)
    return torch.cat([h, w, known], 1)


def _parts(head_dim: int) -> tuple[int, int]:
    """head_dim as a power of two and a rest of 16 or more, 72 = 64 + 16; or as one where that is no larger."""
    whole = max(16, power_of_two(head_dim))
    rest = max(16, power_of_two(head_dim - whole // 2))
    return (whole, 0) if head_dim <= 16 or whole // 2 + rest >= whole else (whole // 2, rest)


def _strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    """0 where there is only one: then all share it, and Triton compiles no kernel of its own for a stride of 1."""
    return tuple([0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)])
