"""Shared memory of all CTAs, with who last wrote and read each word, and when: races, missing waits and fences."""

from collections.abc import Sequence

import numpy as np

from tests.ptx.memory import Array, Note

__all__ = ["BASE", "UNFENCED_COPY", "Shared"]

BASE = 1024
"""The address at which it starts."""

UNFENCED_COPY = "wgmma reads what cp.async wrote without a fence"
_POISON, _POISON_OF_COPY = 0x7FC0BAD0, 0x7FC0BAD1  # NaN in float32 and in half precision
_NOBODY = 1 << 30
_GROUP_OF_WARPS = 1 << 20  # stands for a thread where wgmma reads


class Shared:
    """(CTAs, bytes).

    Between two barriers of a CTA what one warp wrote may not be read or written by another, nor what it read be
    written; the same between two threads of a warp without a barrier of warps. An epoch is the time between two.

    Args:
        num_ctas: How many.
        num_bytes: Of one CTA.
        note: Takes what is wrong.
    """

    def __init__(self, num_ctas: int, num_bytes: int, note: Note) -> None:
        self._num_bytes, self._note = num_bytes, note
        self.num_words = -(-max(num_bytes, 4) // 16) * 4  # of one CTA
        n = num_ctas * self.num_words
        self.words = np.full(n, _POISON, np.uint32)
        self.halves = self.words.view(np.uint16)
        self._has_value, self._is_pending = np.zeros(n, bool), np.zeros(n, bool)
        self._writer, self._written, self._written_by_warp = (np.full(n, -1, np.int32) for _ in range(3))
        # Of the readers of an epoch the first and the last: whether there is another than a given one.
        self._first_reader, self._last_reader = np.full(n, _NOBODY, np.int32), np.full(n, -1, np.int32)
        self._read, self._read_by_warp = np.full(n, -1, np.int32), np.full(n, -1, np.int32)
        self._epoch = self._warp_epoch = 0
        self._copies: list[list[tuple[Array, Array, Array]]] = [[]]  # groups of cp.async, the last one open
        # What wgmma does not see yet: written by stores and by copies.
        self._is_unfenced, self._is_unfenced_copy = np.zeros(n, bool), np.zeros(n, bool)
        self._num_reading = np.zeros(n, np.int32)  # how many wgmma may still read it
        self._reading: list[list[Array]] = [[]]  # groups of wgmma, the last one open

    # Barriers.

    def barrier(self) -> None:
        """Of all threads of a CTA."""
        self._epoch += 1
        self._warp_epoch += 1

    def warp_barrier(self, *, is_whole: bool) -> None:
        """Of the threads of a warp; is_whole: a CTA has one."""
        self._epoch += is_whole
        self._warp_epoch += 1

    def fence_proxy(self) -> None:
        """From here on wgmma sees what was written before."""
        self._is_unfenced[:] = self._is_unfenced_copy[:] = False

    # Loads and stores of threads.

    def load(self, cta: Array, thread: Array, address: Array, unit: int, count: int, text: str) -> Array:
        """(count, threads) of units of 2 or 4 bytes."""
        offset = self._checked_offset(address, unit * count, text)
        self._check_read(self._words_at(cta, offset, unit * count), thread, text)
        data = self.words if unit == 4 else self.halves
        return data[(cta * (self.num_words * 4 // unit) + offset // unit) + np.arange(count)[:, None]]

    def store(self, cta: Array, thread: Array, address: Array, unit: int, values: Sequence[Array], text: str) -> None:
        """The inverse of load."""
        offset = self._checked_offset(address, unit * len(values), text)
        index = self._words_at(cta, offset, unit * len(values))
        self._check_write(index, thread, text)
        data = self.words if unit == 4 else self.halves
        place = cta * (self.num_words * 4 // unit) + offset // unit
        for count, value in enumerate(values):
            data[place + count] = value
        self._mark_written(index, thread)
        self._is_unfenced[index] = True
        lost = [data[place + count] != value for count, value in enumerate(values)]
        if np.any(lost):
            self._note("shared: threads store different values at one place", text, int(np.sum(lost)))

    def load_halves(self, cta: Array, thread: Array, row: Array, offset: Array, text: str) -> Array:
        """A unit of 2 bytes at an offset within each row of 16 bytes."""
        place = self._checked_offset(row, 16, text) + offset
        self._check_read(cta * self.num_words + place // 4, thread, text)
        return self.halves[cta * (self.num_words * 2) + place // 2]

    # cp.async.

    def copy(self, cta: Array, thread: Array, address: Array, data: Array, text: str) -> None:
        """Of data (words, threads), some time before the wait for its group."""
        index = self._words_at(cta, self._checked_offset(address, 4 * len(data), text), 4 * len(data))
        self._check_write(index, thread, text)
        self._is_pending[index] = True
        self.words[index] = _POISON_OF_COPY
        self._copies[-1].append((index, thread, data))

    def commit_copies(self) -> None:
        """Closes a group."""
        self._copies.append([])

    def wait_for_copies(self, num_left: int) -> None:
        """Until at most so many groups are on their way."""
        while len(self._copies) - 1 > num_left:
            for index, thread, data in self._copies.pop(0):
                self.words[index] = data
                self._is_pending[index] = False
                self._mark_written(index, thread)
                self._is_unfenced_copy[index] = True

    @property
    def has_open_copies(self) -> bool:
        """Whether some were never waited for."""
        return any(self._copies)

    # wgmma.

    def read_by_group(self, cta: Array, offset: Array, text: str) -> Array:
        """Units of 2 bytes that a wgmma reads, until the wait for its group."""
        if (offset < 0).any() or (offset >= self._num_bytes).any():
            self._note("shared access out of bounds", text, 1)
            offset = np.clip(offset, 0, self._num_bytes - 2)
        index = np.unique(cta * self.num_words + offset // 4)
        self._check_read(index, np.int32(_GROUP_OF_WARPS), text)
        wrong = {
            "wgmma reads what was stored without a fence": self._is_unfenced[index],
            UNFENCED_COPY: self._is_unfenced_copy[index],
        }
        self._report(wrong, text)
        self._num_reading[index] += 1
        self._reading[-1].append(index)
        return self.halves[cta * (self.num_words * 2) + offset // 2]

    def commit_groups(self) -> None:
        """Closes a group."""
        self._reading.append([])

    def wait_for_groups(self, num_left: int) -> None:
        """Until at most so many groups still read."""
        while len(self._reading) - 1 > num_left:
            for index in self._reading.pop(0):
                self._num_reading[index] -= 1
                self._mark_read(index, np.int32(_GROUP_OF_WARPS))  # other warps' parts may be read as late as now

    # Checks.

    def _checked_offset(self, address: Array, size: int, text: str) -> Array:
        """In bytes within a CTA's part."""
        offset = address.astype(np.int64) - BASE
        if (offset % size).any():
            self._note("shared access misaligned", text, int((offset % size != 0).sum()))
        outside = (offset < 0) | (offset + size > self._num_bytes)
        if outside.any():
            self._note("shared access out of bounds", text, int(outside.sum()))
            offset = np.clip(offset, 0, self.num_words * 4 - size) // size * size
        return offset

    def _words_at(self, cta: Array, offset: Array, size: int) -> Array:
        """Numbers of the words, (words, threads)."""
        return (cta * self.num_words + offset // 4) + np.arange(max(1, size // 4))[:, None]

    def _report(self, wrong: dict[str, Array], text: str) -> None:
        for kind, threads in wrong.items():
            if threads.any():
                self._note(kind, text, int(threads.sum()))

    def _check_read(self, index: Array, thread: Array, text: str) -> None:
        writer, warp = self._writer[index], thread >> 5
        same_warp = writer >> 5 == warp
        wrong = {
            "shared read of what nobody wrote": ~self._has_value[index],
            "shared read of what cp.async may still write": self._is_pending[index],
            "shared race: read after another warp's write": (self._written[index] == self._epoch) & ~same_warp,
            "shared race within a warp: read after write": (self._written_by_warp[index] == self._warp_epoch)
            & (same_warp & (writer != thread)),
        }
        self._report(wrong, text)
        self._mark_read(index, thread)

    def _mark_read(self, index: Array, thread: Array) -> None:
        of_before = index[self._read[index] != self._epoch]
        self._first_reader[of_before], self._last_reader[of_before] = _NOBODY, -1
        thread = np.broadcast_to(thread, index.shape)
        np.minimum.at(self._first_reader, index, thread)
        np.maximum.at(self._last_reader, index, thread)
        self._read[index], self._read_by_warp[index] = self._epoch, self._warp_epoch

    def _check_write(self, index: Array, thread: Array, text: str) -> None:
        first, last, warp = self._first_reader[index], self._last_reader[index], thread >> 5
        same_warp = (first >> 5 == warp) & (last >> 5 == warp)
        wrong = {
            "shared write of what wgmma may still read": self._num_reading[index] > 0,
            "shared write of what cp.async may still write": self._is_pending[index],
            "shared race: write after another warp's read": (self._read[index] == self._epoch) & ~same_warp,
            "shared race within a warp: write after read": (self._read_by_warp[index] == self._warp_epoch)
            & (same_warp & ((first != thread) | (last != thread))),
            "shared race: two warps write": (self._written[index] == self._epoch) & (self._writer[index] >> 5 != warp),
        }
        self._report(wrong, text)

    def _mark_written(self, index: Array, thread: Array) -> None:
        self._has_value[index] = True
        self._writer[index] = thread
        self._written[index], self._written_by_warp[index] = self._epoch, self._warp_epoch
