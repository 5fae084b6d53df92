"""The table of backends, and which one "auto" takes."""

from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from spatial_decay.ops import flex, lowrank, native, sdpa, tiled, triton
from spatial_decay.ops import math as written_out
from spatial_decay.ops.inputs import Inputs
from spatial_decay.ops.triton import autotune

__all__ = ["BACKENDS", "Backend", "Room", "check_backend", "choose", "explain"]

Backend: TypeAlias = Literal["auto", "triton", "native", "lowrank", "tiled", "sdpa", "math", "flex", "triton_autotune"]
"""What `backend=` takes."""


class Room(Protocol):
    """What the room of a backend offers."""

    def unsupported_reasons(self, inputs: Inputs) -> list[str]:
        """Why these inputs cannot run there; empty where they can."""

    def avoid_reasons(self, inputs: Inputs) -> list[str]:
        """Why "auto" had better take another one, though these can run there; empty where it is the right one."""

    def attention(self, inputs: Inputs) -> Tensor:
        """softmax(scale * Q K^T + M) V in the dtype of v, as q is or as `Inputs.sequences` are, (S, N, L, d)."""


BACKENDS: dict[str, Room] = {
    "triton": triton,
    "native": native,
    "lowrank": lowrank,
    "tiled": tiled,
    "sdpa": sdpa,
    "math": written_out,
    "flex": flex,
    "triton_autotune": autotune,
}
"""In order of preference: "auto" takes the first that can run the inputs and has nothing to avoid. `math` runs
everything and avoids nothing, so what stands behind it is taken by name only."""


def check_backend(backend: str) -> None:
    """Raise ValueError where no backend has this name."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}: got {backend!r}.")


def choose(inputs: Inputs, backend: str) -> str:
    """The name of the backend that runs these inputs; a named one can run them or says all its reasons."""
    if backend == "auto":
        for name, candidate in BACKENDS.items():
            # What is avoided is not asked for more: to a compiler, a question about a size that varies is a condition.
            if not candidate.avoid_reasons(inputs) and not candidate.unsupported_reasons(inputs):
                return name
    reasons = BACKENDS[backend].unsupported_reasons(inputs)
    if reasons:
        able = [name for name, other in BACKENDS.items() if not other.unsupported_reasons(inputs)]
        raise NotImplementedError(
            f"backend={backend!r} cannot run these inputs:\n"
            + "".join(f"  - {reason}\n" for reason in reasons)
            + f"Use backend='auto' or one of: {', '.join(able)}."
        )
    return backend


def explain(inputs: Inputs) -> str:
    """The choice of "auto", then a line for each of the others."""
    chosen = choose(inputs, "auto")
    lines = [chosen]
    for name, backend in BACKENDS.items():
        if name == chosen:
            continue
        if reasons := backend.unsupported_reasons(inputs):
            lines.append(f"  {name} cannot: {'; '.join(reasons)}")
        else:
            lines.append(f"  {name} could: {'; '.join(backend.avoid_reasons(inputs)) or f'{chosen} comes first'}")
    return "\n".join(lines)
