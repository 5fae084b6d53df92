"""Executes a kernel: all threads of many CTAs in lockstep, a register being an array of one value a thread."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.ptx.kernel import Kernel
from tests.ptx.memory import Array, Memory, Note
from tests.ptx.shared import Shared

__all__ = ["Machine"]


class Machine:
    """CTAs of a one-dimensional grid.

    Branches on which threads differ are supported forwards: those that took it wait at its label. Loops must be the
    same for all CTAs that run together.

    Args:
        kernel: What they execute.
        params: Its parameters by name, as bits.
        memory: Global memory.
        num_shared: Bytes of shared memory of a CTA.
        ctas: The first, and how many.
        num_ctas: Of the whole grid.
        note: Takes what is wrong.
    """

    def __init__(
        self,
        kernel: Kernel,
        params: Mapping[str, Any],
        memory: Memory,
        num_shared: int,
        ctas: tuple[int, int],
        num_ctas: int,
        note: Note,
    ) -> None:
        first, num = ctas
        self.kernel, self.params, self.memory, self.note = kernel, params, memory, note
        self.num_threads = num * kernel.num_threads
        self.thread = np.tile(np.arange(kernel.num_threads, dtype=np.int32), num)  # within its CTA
        self.cta = np.repeat(np.arange(num), kernel.num_threads)
        self.special = {
            "%tid.x": self.thread,
            "%laneid": self.thread & np.int32(31),
            "%ctaid.x": (self.cta + first).astype(np.int32),
            "%ntid.x": np.full(self.num_threads, kernel.num_threads, np.int32),
            "%nctaid.x": np.full(self.num_threads, num_ctas, np.int32),
        }
        self.shared = Shared(num, num_shared, note)
        self.registers: list[Array] = [None] * len(kernel.registers.numbers)
        self.unfinished: list[list[tuple[list[int], Array]]] = [[]]  # of wgmma: registers and what they will hold
        self._active: Array = None  # None: all
        self._waiting: dict[int, Array] = {}  # by the place of the label
        self._place = 0

    def run(self) -> int:
        """How many instructions a warp executed."""
        steps, num = self.kernel.steps, 0
        with np.errstate(all="ignore"):
            while self._place < len(steps):
                if self._place in self._waiting:
                    self._set_active(self._active | self._waiting.pop(self._place))
                text, step = steps[self._place]
                num += 1
                try:
                    target = step(self)
                except Exception as error:
                    raise RuntimeError(f"at {text}") from error
                self._place = self._place + 1 if target is None else target
        if self.shared.has_open_copies:
            self.note("cp.async is not waited for", "the end", 1)
        return num

    # Which threads execute an instruction.

    def full(self, value: Array) -> Array:
        """A value for each thread."""
        return np.broadcast_to(value, (self.num_threads,))

    def active(self, predicate: Array = None) -> Array:
        """Those whose predicate is true, bool; None: all."""
        active = self._active
        if predicate is not None:
            active = self.full(predicate) if active is None else active & predicate
        return None if active is None or active.all() else active

    def check_whole(self, text: str) -> None:
        """What a warp or a CTA does as one may not be behind a branch that some threads took."""
        if self._active is not None:
            self.note("instruction of a whole warp in a part of it", text, 1)

    def branch(self, target: int, predicate: Array = None) -> int | None:
        """The next place; None: as without a branch."""
        here = np.ones(self.num_threads, bool) if self._active is None else self._active
        taken = here if predicate is None else here & predicate
        if not taken.any():
            return None
        if taken.all() or (not self._waiting and (taken == here).all()):
            return target
        if target <= self._place:
            raise NotImplementedError("a loop that threads leave at different times")
        self._waiting[target] = self._waiting.get(target, False) | taken
        self._set_active(here & ~taken)
        return None if self._active is None or self._active.any() else min(self._waiting)

    def _set_active(self, active: Array) -> None:
        self._active = None if active.all() else active

    # Registers.

    def read(self, number: int, name: str, dtype: type) -> Array:
        """As of the given type."""
        value = self.registers[number]
        if value is None:
            self.note("register read before it is written", name, 1)
            return np.zeros(self.num_threads, dtype)
        return value if value.dtype == dtype else value.view(dtype)

    def write(self, number: int, value: Array, active: Array = None) -> None:
        """By the threads of active."""
        value, old = self.full(value), self.registers[number]
        if active is not None:
            old = np.zeros(self.num_threads, value.dtype) if old is None else old.view(value.dtype)
            value = np.where(active, value, old)
        self.registers[number] = value

    def write_later(self, numbers: list[int], values: Array) -> None:
        """At the wait for the group of this wgmma; until then the registers hold nothing."""
        self.unfinished[-1].append((numbers, values))
        for number in numbers:
            self.registers[number] = None

    def accumulator(self, numbers: list[int], name: str) -> Array:
        """What a wgmma adds to: the result of one before it, also of an unfinished one."""
        for group in reversed(self.unfinished):
            for others, values in reversed(group):
                if others == numbers:
                    return values
        return np.stack([self.full(self.read(number, name, np.float32)) for number in numbers])

    def wait_for_results(self, num_left: int) -> None:
        """Of all groups of wgmma but the last ones."""
        while len(self.unfinished) - 1 > num_left:
            for numbers, values in self.unfinished.pop(0):
                for number, value in zip(numbers, values, strict=True):
                    self.registers[number] = value
