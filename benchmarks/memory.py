"""How much memory a training pass of attention takes beyond its inputs, outputs and gradients.

    python -m benchmarks.memory               # CPU, float32, some 2 minutes; results in outputs/benchmarks/memory

Each is measured in a process of its own (CUDA's allocator counts for itself), one after the other.
"""

from collections.abc import Sequence

import torch

from benchmarks.contenders import FLOOR, PASSES, Case, Setting, make_call
from benchmarks.report import DTYPES, Row, command_line, format_table, machine, write_results
from benchmarks.timing import peak_memory, reasons
from spatial_decay import Grid

CONTENDERS = (FLOOR, "triton", "native", "tiled", "sdpa", "math")
IN_MEMORY = ("sdpa", "math")
"""Those with L x L matrices, several of them."""
CASES = [
    Case("full", 8, 8, Grid(14, 14), 32),
    Case("full", 1, 8, Grid(32, 32), 64),
    Case("full", 1, 4, Grid(56, 56), 32),
    Case("full", 1, 2, Grid(128, 128), 32),
    Case("decomposed", 8, 4, Grid(56, 56), 16),
]
LARGEST = 10**9
"""Bytes of one L x L matrix of all heads; with a larger one nothing is measured."""


def measure(case: Case, setting: Setting, contender: str) -> Row:
    """One pass forward and backward; a note in place of numbers where there are none."""
    row: Row = {"kind": case.kind, "B, N, grid, d": case.shape, "contender": contender}
    nothing: Row = {"peak MB": None, "scratch MB": None}
    length = case.grid.num_tokens
    tokens = case.batch_size * case.num_heads * length
    if contender in IN_MEMORY and case.kind != "decomposed" and (pairs := tokens * length * 4) > LARGEST:
        return row | nothing | {"note": f"left out: one L x L matrix of its heads is {pairs / 1e9:.1f} GB"}
    try:
        peak = peak_memory(make_call, case, setting, contender, PASSES[1], device=setting.device)
    except Exception as error:  # a backend's reasons, out of memory
        return row | nothing | {"note": reasons(error)}
    if peak is None:
        return row | nothing | {"note": "this system does not say"}
    gates = 0 if contender == FLOOR else case.num_gates
    returned = tokens * (4 * case.head_dim * setting.dtype.itemsize + 4 * gates)  # O, dQ, dK, dV, and the gates'
    return row | {"peak MB": peak / 1e6, "scratch MB": (peak - returned) / 1e6, "note": ""}


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line; the rows of results.csv."""
    parser = command_line(__doc__.splitlines()[0], "memory", rounds=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    setting = Setting(torch.device(arguments.device), DTYPES[arguments.dtype], "tokens")
    where = machine(setting.device, arguments.dtype)
    rows: list[Row] = []
    for case in CASES[: 1 if arguments.quick else None]:
        rows += [measure(case, setting, contender) for contender in CONTENDERS]
        print(f"\n{format_table(rows[-len(CONTENDERS) :])}", flush=True)
    write_results(arguments.output, "Memory of a training pass", ABOUT, rows, where, by=["kind", "B, N, grid, d"])
    return rows


ABOUT = """`peak MB` (10^6 bytes) is above the inputs: outputs, gradients and scratch, on the CPU to about 0.3.
`scratch MB`: the same without the output and the gradients of q, k, v and the gates."""

if __name__ == "__main__":
    main()
