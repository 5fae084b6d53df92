"""Global memory: the tensors' own, with what a kernel may touch, what holds a value and what it has written."""

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Array", "Memory", "Note", "Segment"]

Array: TypeAlias = Any  # a numpy array of one value a thread, or of one for all
Note: TypeAlias = Callable[[str, str, int], None]  # what is wrong, in which instruction, in how many threads


class Segment:
    """The bytes of one storage, in units of two: no element is smaller.

    Args:
        base: Its address.
        buffer: The bytes.
        may: Which units the kernel may touch, bool.
        has_value: Which hold a value, bool.

    Attributes:
        written: How many times each was written.
    """

    def __init__(self, base: int, buffer: Array, may: Array, has_value: Array) -> None:
        self.base, self.size = base, len(may) * 2
        self.by_size = {2: buffer.view(np.uint16), 4: buffer.view(np.uint32)}
        self.num_may = np.concatenate([[0], np.cumsum(may, dtype=np.int64)])
        self.num_values = np.concatenate([[0], np.cumsum(has_value, dtype=np.int64)])
        self.written = np.zeros(len(may), np.int32)


class Memory:
    """Loads and stores of many threads at once."""

    def __init__(self, segments: Sequence[Segment], note: Note) -> None:
        self._segments = sorted(segments, key=lambda segment: segment.base)
        self._bases = [segment.base for segment in self._segments]
        self._note = note

    def load(self, address: Array, unit: int, count: int, text: str) -> Array:
        """(count, threads) of units of 2 or 4 bytes."""
        dtype = np.uint32 if unit == 4 else np.uint16
        out = np.full((count, len(address)), 0xBAD0, dtype)
        for segment, threads, offset in self._found(address, unit * count, text):
            self._check(segment, offset, unit * count, text, is_read=True)
            for index in range(count):
                out[index, threads] = segment.by_size[unit][offset // unit + index]
        return out

    def store(self, address: Array, unit: int, values: Sequence[Array], text: str) -> None:
        """The inverse of load."""
        size = unit * len(values)
        for segment, threads, offset in self._found(address, size, text):
            self._check(segment, offset, size, text, is_read=False)
            for index, value in enumerate(values):
                segment.by_size[unit][offset // unit + index] = value[threads]
            for half in range(size // 2):
                np.add.at(segment.written, offset // 2 + half, 1)

    def _found(self, address: Array, size: int, text: str) -> Iterator[tuple[Segment, Any, Array]]:
        """(segment, threads, offsets) of those that hit one."""
        segment = self._segments[max(0, bisect.bisect_right(self._bases, int(address.min())) - 1)]
        if address.min() >= segment.base and address.max() + size <= segment.base + segment.size:
            yield segment, slice(None), address - segment.base
            return
        num_found = 0
        for segment in self._segments:
            hit = np.flatnonzero((address >= segment.base) & (address + size <= segment.base + segment.size))
            if len(hit):
                num_found += len(hit)
                yield segment, hit, address[hit] - segment.base
        if num_found < len(address):
            self._note("global access out of bounds", text, len(address) - num_found)

    def _check(self, segment: Segment, offset: Array, size: int, text: str, *, is_read: bool) -> None:
        first, last = offset // 2, (offset + size) // 2
        wrong = {
            "global access misaligned": offset % size != 0,
            "global access outside of the tensors": segment.num_may[last] - segment.num_may[first] != last - first,
        }
        if is_read:
            values = segment.num_values[last] - segment.num_values[first]
            wrong["global read of what nobody wrote"] = values != last - first
        for kind, threads in wrong.items():
            if threads.any():
                self._note(kind, text, int(threads.sum()))
