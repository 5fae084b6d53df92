"""What the emulator would see: kernels with a barrier, a wait, a fence or a mask removed from their PTX."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.ops.test_triton import pytestmark as needs_triton
from tests.ptx.launch import Emulation
from tests.ptx.runs import Run, checked

pytestmark = needs_triton

REMOVED = {
    "barrier": r"\s*bar\.sync",
    "barrier of a warp": r"\s*bar\.warp\.sync",
    "wait for copies": r"\s*cp\.async\.wait_group",
    "wait for products": r"\s*wgmma\.wait_group",
    "fence": r"\s*fence\.proxy",
    "mask": r"\s*@!?%p\d+ (ld|st)\.global",
}
LONG = Run("full", (8, 12), 1, 32, mask="keys", batch_size=2)
SHORT = Run("decomposed", (3, 5), 0, 16, torch.float16)


def mutants(ptx: str, what: str) -> Iterator[str]:
    """The PTX without one of them, each in turn."""
    lines = ptx.splitlines()
    for index, line in enumerate(lines):
        if re.match(REMOVED[what], line):
            kept = [re.sub(r"@!?%p\d+ ", "", line)] if what == "mask" else []
            yield "\n".join([*lines[:index], *kept, *lines[index + 1 :]])


def kernels_of(run: Run, emulation: Emulation) -> dict[str, str]:
    """PTX by the name of the kernel; nothing is wrong with any of them."""
    kernels: dict[str, str] = {}

    def kept(ptx: str) -> str:
        return kernels.setdefault(re.search(r"\.entry (\w+)", ptx).group(1), ptx)

    emulation.change = kept
    torch.manual_seed(0)
    checked(run)
    return kernels


def is_noticed(run: Run, emulation: Emulation, original: str, mutant: str) -> bool:
    """By what is checked while it runs, or of the results."""
    emulation.change = lambda ptx: mutant if ptx == original else ptx
    torch.manual_seed(0)
    try:
        checked(run)
    except AssertionError:
        return True
    return False


def test_what_is_removed_is_noticed(emulated: Callable[[int], Emulation]):
    """One of each, at 8.0."""
    for run, name, places in [
        (LONG, "attention_forward", {"barrier": 0, "wait for copies": 0, "mask": -1}),
        (SHORT, "attention_short_forward", {"barrier": 0, "barrier of a warp": 0, "mask": 0}),
    ]:
        emulation = emulated(80)
        original = kernels_of(run, emulation)[name]
        for what, place in places.items():
            assert is_noticed(run, emulation, original, list(mutants(original, what))[place]), (name, what)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "run", "name", "what"),
    [
        *[(80, LONG, "attention_forward", what) for what in ("barrier", "wait for copies")],
        *[(80, LONG, "attention_backward_columns", what) for what in ("barrier", "wait for copies")],
        *[(80, SHORT, "attention_short_backward", what) for what in ("barrier", "barrier of a warp", "mask")],
        *[(90, LONG, "attention_forward", what) for what in ("barrier", "wait for copies", "wait for products")],
        (90, LONG, "attention_forward", "fence"),
    ],
    ids=str,
)
def test_whatever_is_removed_is_noticed(emulated, capability, run, name, what):
    emulation = emulated(capability)
    original = kernels_of(run, emulation)[name]
    found = [is_noticed(run, emulation, original, mutant) for mutant in mutants(original, what)]
    assert found
    # Some barriers and fences stand beside others that do the same, or in loops that this call goes through once.
    num_redundant = len(found) // 2 if what in ("barrier", "fence") or capability == 90 else 0
    assert found.count(False) <= num_redundant, found
