"""Two checkouts of this project against each other: the same benchmark in each, in turn.

    git worktree add ../before HEAD~1
    python -m benchmarks.compare ../before . attention --rounds 5   # results in outputs/benchmarks/compare
    python -m benchmarks.compare ../before . models --models sdt_h_tiny

What is compared is the time over the floor of the same round, so that a machine that slows down slows both down.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from benchmarks.report import Row, format_table, write_results
from benchmarks.timing import summary

COLUMNS = ("model", "kind", "B, N, grid, d", "pass", "contender")
"""Those of a results.csv that say what was measured, as far as it has them."""

ALLOWED = 1.03
"""What a row may take of its time before, beyond the spread of the runs."""

Measured: TypeAlias = dict[tuple[str, ...], dict[str, str]]
"""The rows of a results.csv, by what was measured."""


def run(folder: Path, benchmark: str, options: Sequence[str]) -> Measured:
    """One run of a benchmark, with the package and the benchmark that lie in this folder."""
    with TemporaryDirectory() as output:
        subprocess.run(
            [sys.executable, "-m", f"benchmarks.{benchmark}", *options, "--output", output],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder.resolve())},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        with (Path(output) / "results.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    return {tuple(row.get(name, "") for name in COLUMNS): row for row in rows}


def compare(before: Sequence[Measured], after: Sequence[Measured]) -> list[Row]:
    """What has changed, from as many runs of each side; the two runs of a turn were beside each other."""
    return [_row(key, before, after) for key in before[0] | after[0]]


def _row(key: tuple[str, ...], before: Sequence[Measured], after: Sequence[Measured]) -> Row:
    turns = [(b[key], a[key]) for b, a in zip(before, after, strict=True) if key in b and key in a]
    timed = [(b, a) for b, a in turns if b["ms"] and a["ms"]]
    row: Row = {name: value for name, value in zip(COLUMNS, key, strict=True) if value}
    if not timed:
        notes = [("before", before[0].get(key)), ("after", after[0].get(key))]
        why = "; ".join(f"{side}: {found['note'] if found else 'not measured'}" for side, found in notes)
        return row | dict.fromkeys(("before ms", "after ms", "ratio", "ratio_low", "ratio_high")) | {"note": why}
    row["before ms"], row["after ms"] = (
        statistics.median(float(x["ms"]) for x in side) for side in zip(*timed, strict=True)
    )
    over_floor = [[float(x["ratio"]) for x in side] for side in zip(*timed, strict=True)]
    found = summary(over_floor[1], over_floor[0])
    row |= {"ratio": found.ratio, "ratio_low": found.low, "ratio_high": found.high}
    return row | {"note": "slower" if found.low > ALLOWED else ""}


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line; the rows of results.csv."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Further arguments are the benchmark's, in both checkouts."
    )
    parser.add_argument("before", type=_checkout, help="folder of one checkout")
    parser.add_argument("after", type=_checkout, help="folder of the other")
    parser.add_argument("benchmark", choices=("attention", "models"))
    parser.add_argument("--turns", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/compare"), help="folder for results")
    arguments, options = parser.parse_known_args(argv)
    if arguments.turns < 1:
        parser.error(f"argument --turns: must be >= 1: got {arguments.turns}")
    sides: dict[Path, list[Measured]] = {arguments.before: [], arguments.after: []}
    for turn in range(arguments.turns):
        for folder in list(sides)[:: -1 if turn % 2 else 1]:  # A B, B A, ...
            sides[folder].append(run(folder, arguments.benchmark, options))
            print(f"turn {turn + 1} of {arguments.turns}: {folder}", flush=True)
    rows = compare(*sides.values())
    where: Row = {"before": str(arguments.before), "after": str(arguments.after), "turns": arguments.turns}
    where |= {"options": " ".join([arguments.benchmark, *options])} | _machine(sides[arguments.after][0])
    write_results(arguments.output, "After against before", ABOUT, rows, where, by=[])
    print(format_table(rows))
    return rows


def _checkout(text: str) -> Path:
    folder = Path(text)
    if not (folder / "benchmarks" / "attention.py").exists():
        raise argparse.ArgumentTypeError(f"must be the root of a checkout, with benchmarks/attention.py: got {text!r}")
    return folder


def _machine(measured: Measured) -> Row:
    """As the benchmark itself has said it."""
    first = next(iter(measured.values()))
    return {name: first[name] for name in ("device", "cpu", "cores", "threads", "dtype", "torch", "date")}


ABOUT = f"""`ratio` is after / before of the time over the benchmark's floor, of the two runs of a turn: median
(quartiles) over the turns. `slower`: its lower quartile is above {ALLOWED}. The times are medians over the turns.
Contenders that are not of this package (`mask eager` and so on) have not changed: they show what chance does."""

if __name__ == "__main__":
    main()
