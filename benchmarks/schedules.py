"""Every schedule of the Triton kernels, timed on a GPU: what the table in ops/triton/schedule.py rests on.

    python -m benchmarks.schedules --dtype bfloat16     # results in outputs/benchmarks/schedules

The schedules of one step are compiled by several processes first, and then timed by one, alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks.contenders import CASES, PASSES, Case, Setting, make_call
from benchmarks.report import DTYPES, Row, command_line, format_table, machine, write_results
from benchmarks.timing import run_in_processes
from spatial_decay.ops.triton import schedule as schedules
from spatial_decay.ops.triton.schedule import Schedule

_SLICES = 8
"""Into which the schedules of a case are cut for the processes that compile them."""


@contextmanager
def _asked(answer: Callable[[str, Sequence[Schedule], Callable[[Schedule], float | None]], None]) -> Iterator[None]:
    """While it lasts, `triton_autotune` hands the step and its schedules, the table's own first, to answer."""

    def fastest(key: Any, choices: Sequence[Schedule], seconds: Callable[[Schedule], float | None]) -> Schedule:
        answer(key[0], choices, seconds)
        return choices[0]

    with mock.patch.object(schedules, "fastest", fastest):
        yield


def _compile(case: Case, setting: Setting, part: int) -> None:
    """Every _SLICES-th schedule, into Triton's cache on the disk."""

    def answer(_: str, choices: Sequence[Schedule], seconds: Callable[[Schedule], float | None]) -> None:
        for schedule in choices[part::_SLICES]:
            seconds(schedule)

    with _asked(answer):
        make_call(case, setting, "triton_autotune", PASSES[1])()


def measure(case: Case, setting: Setting) -> list[Row]:
    """All steps of a case, each schedule's time over that of the table's."""
    rows: list[Row] = []

    def answer(step: str, choices: Sequence[Schedule], seconds: Callable[[Schedule], float | None]) -> None:
        times = {schedule: seconds(schedule) for schedule in choices}
        own = times[choices[0]]
        fitting = sorted((time, schedule) for schedule, time in times.items() if time is not None)
        for time, schedule in fitting:
            row: Row = {"kind": case.kind, "B, N, grid, d": case.shape, "step": step, **schedule._asdict()}
            row |= {"us": time * 1e6, "over the table's": time / own if own else None}
            rows.append(row | {"table": "yes" if schedule == choices[0] else ""})

    with _asked(answer):
        make_call(case, setting, "triton_autotune", PASSES[1])()
    return rows


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line; the rows of results.csv."""
    parser = command_line(__doc__.splitlines()[0], "schedules", rounds=1)
    parser.add_argument("--memory", choices=("tokens", "heads"), default="tokens", help="order of q, k and v there")
    parser.add_argument("--cases", help="such as 'full 8,' or '1d', separated by semicolons; all where it is not given")
    parser.set_defaults(device="cuda", dtype="bfloat16")
    arguments = parser.parse_args(argv)
    setting = Setting(torch.device(arguments.device), DTYPES[arguments.dtype], arguments.memory)
    wanted = tuple(arguments.cases.split(";")) if arguments.cases else ("",)
    cases = [case for case in CASES["cuda"] if f"{case.kind} {case.shape}".startswith(wanted)]
    cases = cases[:1] if arguments.quick else cases
    run_in_processes(_compile, [(case, setting, part) for case in cases for part in range(_SLICES)])
    where = machine(setting.device, arguments.dtype)
    rows: list[Row] = []
    for case in cases:
        new = measure(case, setting)
        rows += new
        print(f"\n{format_table(new)}", flush=True)
        write_results(arguments.output, "Schedules", ABOUT, rows, where, by=["kind", "B, N, grid, d", "step"])
    return rows


ABOUT = """`queries` and `keys` a program takes at a time, by `num_warps`, loading `num_stages` steps ahead; the fastest
first. `table`: what the backend takes. The L2 cache is emptied before each timing; those that do not fit into the GPU
are left out."""

if __name__ == "__main__":
    main()
