"""One launch of the Triton kernels: what they take besides the tensors, and by which schedule they run."""

import time
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.grid import Grid
from spatial_decay.ops import triton_schedule
from spatial_decay.ops.triton_schedule import Schedule, Step, Work

__all__ = ["Call", "dense", "is_short", "kernels"]


class Call:
    """What the kernels of one call have in common.

    Args:
        features: All tensors (B, O, N, L, d), q first.
        tokens: (numbers, B*O|1, N, L).
        key_bias: (B*O|1, N|1, 1, L).
        grid: H, W and P.
        kind: Of the decay.
        scale: Of the scores.
        tunes: Whether schedules are timed.
    """

    def __init__(
        self,
        features: Sequence[Tensor],
        tokens: Tensor,
        key_bias: Tensor | None,
        grid: list[int],
        kind: str,
        scale: float,
        tunes: bool,
    ) -> None:
        q = features[0]
        batch_size, num_outer, num_heads, self.length, head_dim = q.shape
        self.num_sequences, self.num_prefix = batch_size * num_outer * num_heads, grid[2]
        self.positions = _positions(grid, q.device)
        self.key_bias = tokens if key_bias is None else key_bias  # not read where there is none
        key_bias_strides = (0, 0, 0, 0) if key_bias is None else (0, *_strides(key_bias[:, :, 0]))
        self._others = (_strides(tokens), key_bias_strides, num_outer, num_heads, self.length, scale)
        unit = 16 // q.element_size()
        self._unit = unit if all(stride % unit == 0 for x in features for stride in _strides(x)[:-1]) else 1
        self._device, self._tunes = q.device, tunes
        self._work = _work(q, kind, self.num_prefix, key_bias is not None)
        first, rest = _parts(head_dim)
        self._constants: dict[str, Any] = {
            "KIND": ("none", "manhattan", "path", "gaussian").index(kind),
            "HAS_KEY_BIAS": key_bias is not None,
            "D": head_dim,
            "UNIT": self._unit,
            "D1": first,
            "D2": rest,
            "UPCAST": kernels().are_interpreted and q.dtype == torch.bfloat16,
            "enable_fp_fusion": True,  # a product and a sum in one instruction
        }

    def schedule(self, step: Step, run: Callable[[Schedule], None]) -> Schedule:
        """How a kernel is to run; run is called only to time it."""
        if step in ("short forward", "short backward"):
            block = max(16, _power_of_two(self.length))
            first = Schedule(block, block, triton_schedule.num_warps_of_short(self.length, self._work), 1)
        else:
            first = triton_schedule.from_table(step, self._work)
        if not self._tunes:
            return first
        key = (step, self._work, self._unit, self.num_sequences, self._device)
        choices = triton_schedule.candidates(step, first)
        return triton_schedule.fastest(key, choices, lambda schedule: _seconds(run, schedule, self._device))

    def sizes(self, *features: Tensor) -> tuple[Any, ...]:
        """What the kernels take behind the tensors: the strides of these, whose features are dense, and all others."""
        strides = (tuple(stride // self._unit for stride in _strides(x)[:-1]) for x in features)
        return *strides, *self._others

    def num_programs(self, block: int) -> tuple[int]:
        """One for each block of each sequence."""
        return (self.num_sequences * -(-self.length // block),)

    def options(self, schedule: Schedule, step_size: int) -> dict[str, Any]:
        """For the kernels that walk over a long sequence, so many tokens a step; the last one is as small as can be."""
        rest = (self.length - self.num_prefix) % step_size
        return self._constants | {
            "NUM_PREFIX": self.num_prefix,
            "PREFIX_BLOCK": min(64, max(16, _power_of_two(self.num_prefix))),
            "BLOCK_Q": schedule.queries,
            "BLOCK_K": schedule.keys,
            "TAIL_BLOCK": 0 if rest == 0 else max(16, _power_of_two(rest)),
            "num_warps": schedule.num_warps,
            "num_stages": schedule.num_stages,
        }

    def short_options(self, schedule: Schedule) -> dict[str, Any]:
        """For the kernels that hold a whole sequence."""
        return self._constants | {"BLOCK": schedule.keys, "num_warps": schedule.num_warps}


def is_short(q: Tensor, kind: str, num_prefix: int) -> bool:
    """Whether a program can hold a whole sequence of q, (B, O, N, L, d)."""
    if num_prefix or kind == "gaussian":
        return False
    return triton_schedule.num_warps_of_short(q.shape[3], _work(q, kind, num_prefix, False)) > 0


def _work(q: Tensor, kind: str, num_prefix: int, has_key_mask: bool) -> Work:
    return Work(
        kind, q.dtype, q.shape[4], q.shape[3] - num_prefix, num_prefix, has_key_mask, _has_warp_groups(q.device)
    )


def _has_warp_groups(device: torch.device) -> bool:
    """The interpreter does as compute capability 9 would."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major in (9, 10)


def _seconds(run: Callable[[Schedule], None], schedule: Schedule, device: torch.device) -> float | None:
    """Of the kernel by this schedule; None where the GPU has not the shared memory for it."""
    import triton
    from triton.runtime.errors import OutOfResources

    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend='triton_autotune' has not timed its kernels for these inputs yet, and cannot while a CUDA graph "
            "is captured. Call it once before, forward and backward, with the same shapes."
        )
    start = time.perf_counter()
    try:
        run(schedule)
    except OutOfResources:
        return None
    if device.type != "cuda":
        return time.perf_counter() - start
    return triton.testing.do_bench(lambda: run(schedule), warmup=5, rep=20, return_mode="median") / 1000


@cache
def kernels() -> SimpleNamespace:
    """The kernels, imported at the first use because Triton is large, and whether they run in its interpreter."""
    import triton

    from spatial_decay.ops import triton_kernels, triton_short

    are_interpreted = not isinstance(triton_kernels.forward, triton.runtime.JITFunction)
    return SimpleNamespace(long=triton_kernels, short=triton_short, are_interpreted=are_interpreted)


def dense(x: Tensor) -> Tensor:
    """x with neighbouring features beside each other in memory; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _positions(grid: list[int], device: torch.device) -> Tensor:
    """h and w of each token, (2, L) float32. What is made while a CUDA graph is captured is empty yet, and not kept."""
    height, width, num_prefix = grid
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _new_positions(height, width, num_prefix, device)
    return _kept_positions(height, width, num_prefix, device)


@lru_cache(maxsize=64)
def _kept_positions(height: int, width: int, num_prefix: int, device: torch.device) -> Tensor:
    """Kept, because reading a table is cheaper than dividing by W for each score, and making one is five launches."""
    positions = _new_positions(height, width, num_prefix, device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams will read it too
    return positions


def _new_positions(height: int, width: int, num_prefix: int, device: torch.device) -> Tensor:
    positions = Grid(height, width).positions(device=device, dtype=torch.float32)
    return F.pad(torch.stack(positions), (num_prefix, 0))


def _parts(head_dim: int) -> tuple[int, int]:
    """head_dim as a power of two and a rest of 16 or more, 72 = 64 + 16; or as one where that is no larger."""
    whole = max(16, _power_of_two(head_dim))
    rest = max(16, _power_of_two(head_dim - whole // 2))
    return (whole, 0) if head_dim <= 16 or whole // 2 + rest >= whole else (whole // 2, rest)


def _power_of_two(n: int) -> int:
    """The smallest that is n or more."""
    return 1 << max(0, n - 1).bit_length()


def _strides(x: Tensor) -> tuple[int, ...]:
    """0 where there is only one: then all share it, and Triton compiles no kernel of its own for a stride of 1."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
