"""Damage on purpose: broken copies of files, and processes that are killed while they write."""

import itertools
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["damaged", "killed"]

_WRITING = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree"}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A copy that differs: cut off, with other bits or bytes, or with a piece too many, too few or from elsewhere."""
    start, stop = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    stop = min(stop, start + 64)
    while True:
        how = rng.randrange(6)
        if how == 0:
            new = content[: rng.randrange(len(content))]
        elif how == 1:
            at = rng.randrange(len(content))
            new = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        elif how == 2:
            new = content[:start] + rng.randbytes(stop - start) + content[stop:]
        elif how == 3:
            new = content[:start] + bytes(stop - start) + content[stop:]
        elif how == 4:
            new = content[:start] + content[stop:]
        else:
            new = content[:start] + rng.randbytes(rng.randrange(1, 65)) + content[start:]
        if new != content:
            return new
        start, stop = 0, min(64, len(content))


def killed(work: Callable[[], Any], *, at: int | None = None, after: float | None = None) -> bool:
    """Run work in a copy of this process that is killed, and say whether that was before its end.

    Args:
        work: It must write to files only.
        at: Die before the file system is asked for something the so many-th time, from 0: opening, renaming, removing.
            Counted up until the answer is False, this goes through all moments that Python sees.
        after: Die after so many seconds of work, wherever that is, by SIGALRM, of which Python sees no more.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads, and the copy uses none
        child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            if at is not None:
                _die_at(at)
            if after is not None:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, max(after, 1e-6))  # 0 is never
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise AssertionError("the work that was to be killed failed by itself; its error is above.")
    return os.WIFSIGNALED(status)


def _die_at(moment: int) -> None:
    count = itertools.count()

    def hook(event: str, _: Any) -> None:
        if event in _WRITING and next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
