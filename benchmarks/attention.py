"""Attention with decay against plain F.scaled_dot_product_attention, and against the ways in which others add a decay.

    python -m benchmarks.attention                               # CPU, float32; results in outputs/benchmarks/attention
    python -m benchmarks.attention --dtype bfloat16 --kinds full,gaussian
    python -m benchmarks.attention --device cuda --dtype bfloat16 --cold-cache

On two idle cores the first takes some 5 minutes. This holds both sides, PyTorch and the native kernel, to the
instruction set of older processors:

    ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.attention

Contenders start at the gate: forward is gate -> output without autograd, forward+backward ends at the gradients of
q, k, v and the gate. The floor has no gate and no mask; on cuda, in half precision, it is PyTorch's flash kernel. Needs
the extra [viz] for the picture.
"""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.contenders import CASES, COMPILED, FLOOR, PASSES, PLAIN, Case, Setting, contenders, make_call
from benchmarks.report import DTYPES, Row, command_line, format_table, machine, timing_columns, write_results
from benchmarks.timing import Call, captured, interleaved, reasons, relative_error, run_in_processes
from spatial_decay.ops import BACKENDS

SLOW, ROUNDS_OF_SLOW = 3.0, 3
"""What takes so many times the floor's time is timed in the first rounds only: its last digit is not worth minutes."""


def measure(case: Case, setting: Setting, which: str, arguments: argparse.Namespace) -> list[Row]:
    """One pass of all contenders; one that cannot run has a note in place of numbers."""
    if not arguments.quick:
        torch.compiler.reset()  # a function is compiled for a few shapes only, then no more
    wanted = make_call(case, setting, "math", which, exact=True)()
    calls: dict[str, Call] = {}
    errors: dict[str, float | None] = {}
    repeats: dict[str, bool] = {}
    notes: dict[str, str] = {}
    names = contenders(setting.device, autotune=arguments.autotune)
    for name in names:
        if name in COMPILED and (arguments.quick or arguments.no_compile or not case.compiles):
            notes[name] = "left out here: it is compiled for each shape"
            continue
        call = make_call(case, setting, name, which)
        try:
            found = call()
        except Exception as error:  # a backend's reasons, out of memory, and whatever compilers raise
            notes[name] = reasons(error)
            continue
        try:
            calls[name] = call if arguments.eager else captured(call, setting.device)
        except Exception as error:  # what cannot be captured says so in many ways
            notes[name] = f"not captured, timed with its launches: {reasons(error)}"
            calls[name] = call
        errors[name] = None if name in PLAIN else relative_error(found, wanted)
        repeats[name] = all(torch.equal(a, b) for a, b in zip(found, call(), strict=True))
    del wanted
    timings = interleaved(
        calls,
        FLOOR,
        rounds=1 if arguments.quick else arguments.rounds,
        device=setting.device,
        warmup=0 if arguments.quick else 2,
        min_seconds=0 if arguments.quick else 0.02,
        cold_cache=arguments.cold_cache,
        slow=SLOW,
        rounds_of_slow=ROUNDS_OF_SLOW,
    )
    rows: list[Row] = []
    for name in names:
        row: Row = {"kind": case.kind, "B, N, grid, d": case.shape, "L": case.grid.num_tokens, "pass": which}
        row |= {"contender": name, **timing_columns(timings.get(name))}
        row |= {"error": errors.get(name), "repeatable": {True: "yes", False: "no", None: ""}[repeats.get(name)]}
        rows.append(row | {"note": notes.get(name, "")})
    return rows


def _call_once(case: Case, setting: Setting, name: str, which: str) -> None:
    with contextlib.suppress(Exception):  # measure says why it cannot
        make_call(case, setting, name, which)()


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table for a page: a line a shape, a column a contender, the ratios of both passes."""
    shapes = list(dict.fromkeys((row["kind"], row["B, N, grid, d"]) for row in rows))
    names = [name for name in dict.fromkeys(row["contender"] for row in rows) if name != FLOOR]
    ratios = {(row["kind"], row["B, N, grid, d"], row["contender"], row["pass"]): row["ratio"] for row in rows}
    names = [name for name in names if any(ratios.get((*shape, name, which)) for shape in shapes for which in PASSES)]
    lines = [["B, N, grid, head_dim", *(f"`{name}`" if name in BACKENDS else name for name in names)]]
    lines.append(["---"] * len(lines[0]))
    for kind, shape in shapes:
        found = [[ratios.get((kind, shape, name, which)) for which in PASSES] for name in names]
        lines.append([f"{kind} {shape}", *(" / ".join(f"{x:.2f}" if x else "-" for x in both) for both in found)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line; the rows of results.csv."""
    from benchmarks.picture import picture

    parser = command_line(__doc__.splitlines()[0], "attention", rounds=9)
    parser.add_argument("--kinds", help="of decay, comma-separated; all where it is not given")
    parser.add_argument("--no-compile", action="store_true", help="without what torch.compile makes")
    parser.add_argument("--memory", choices=("tokens", "heads"), default="tokens", help="order of q, k and v there")
    parser.add_argument(
        "--autotune", action="store_true", help="also those that time their tiles first, on cuda: minutes a case"
    )
    parser.add_argument(
        "--eager", action="store_true", help="on cuda, with the time that Python takes to launch kernels"
    )
    parser.add_argument("--cold-cache", action="store_true", help="on cuda, empty the L2 cache before each timing")
    arguments = parser.parse_args(argv)
    cases = CASES[arguments.device]
    known = list(dict.fromkeys(case.kind for case in cases))
    kinds = arguments.kinds.split(",") if arguments.kinds else known
    if unknown := set(kinds) - set(known):
        parser.error(f"argument --kinds: choose from {', '.join(known)}: got {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    setting = Setting(torch.device(arguments.device), DTYPES[arguments.dtype], arguments.memory)
    where = machine(setting.device, arguments.dtype) | {"memory": setting.memory}
    where |= {"cold_cache": arguments.cold_cache, "eager": arguments.eager}
    print("\n".join(f"{name}: {value}" for name, value in where.items()), flush=True)
    if setting.device.type == "cuda" and not arguments.quick:
        compiled = [name for name in COMPILED if not arguments.no_compile]
        names = [
            x
            for x in contenders(setting.device, autotune=arguments.autotune)
            if x.startswith("triton") or x in compiled
        ]
        of_kinds = [case for case in cases if case.kind in kinds]
        run_in_processes(
            _call_once, [(case, setting, name, which) for case in of_kinds for name in names for which in PASSES]
        )
    rows: list[Row] = []
    for kind in kinds:
        of_kind = [case for case in cases if case.kind == kind]
        for case in [replace(of_kind[0], batch_size=1)] if arguments.quick else of_kind:
            for which in PASSES:
                new = measure(case, setting, which, arguments)
                print(f"\n{format_table(new)}", flush=True)
                rows += new
            about = f"{ABOUT}\n\nAll ratios, {' / '.join(PASSES)}:\n\n{summary_table(rows)}"
            write_results(arguments.output, "Attention with decay", about, rows, where, by=["kind", "B, N, grid, d"])
    picture(rows).savefig(arguments.output / "ratio.png")
    return rows


ABOUT = f"""`ratio` is to `{FLOOR}`, without decay and mask, in the same round: median (quartiles). The floor of
`decomposed` is two calls, over rows and columns, with the same permutes. On cuda it is the GPU's time, of CUDA graphs;
with --eager, which small cases are bound by, the time of the calls.
What takes more than {SLOW:g} times the floor's time is timed in {ROUNDS_OF_SLOW} rounds.
`14x14+1`: one token besides that has no position.
`error` is |x - x64| / |x64| against float64: of the output, or the worst of the gradients of q, k, v and the gates.
`repeatable`: a second call gave the same, bit for bit."""

if __name__ == "__main__":
    main()
