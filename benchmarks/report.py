"""What the benchmarks share at both ends: the command line, and results as CSV and Markdown with the machine."""

import argparse
import csv
import datetime
import itertools
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

import spatial_decay
from benchmarks.timing import Timing
from spatial_decay.ops.native import build, library

__all__ = ["DTYPES", "Row", "command_line", "format_table", "machine", "timing_columns", "write_results"]

Row: TypeAlias = dict[str, str | int | float | None]
"""One measurement: column -> value; None where there is none, and then `note` says why."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def command_line(description: str, folder: str, rounds: int) -> argparse.ArgumentParser:
    """The arguments that both benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--rounds", type=int, default=rounds, help="each times every contender once")
    parser.add_argument("--quick", action="store_true", help="one round of the smallest, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks") / folder, help="folder for results")
    return parser


def machine(device: torch.device, dtype: str) -> Row:
    """Where, when and by what this was measured; load: runnable tasks at the start, which an idle machine has not."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "dtype": dtype,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native": _native_kernel(),
        "spatial-decay": spatial_decay.__version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _native_kernel() -> str:
    """The variant of the native kernel that this process takes, and its compiler; or why there is none."""
    if (reason := library.reason()) is not None:
        return reason
    return f"{library.variants()[-1]}, by {json.loads((library.FOLDER / build.RECORD).read_bytes())['compiler']}"


def timing_columns(timing: Timing | None) -> Row:
    """The columns of a Timing; without one, the same columns without values."""
    if timing is None:
        return dict.fromkeys(("ms", "ratio", "ratio_low", "ratio_high"))
    return {"ms": timing.seconds * 1000, "ratio": timing.ratio, "ratio_low": timing.low, "ratio_high": timing.high}


def write_results(folder: Path, title: str, about: str, rows: Sequence[Row], where: Row, *, by: Sequence[str]) -> None:
    """results.csv, with the machine in each row, and results.md, with a table for each value of the columns `by`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        writer.writerows(row | where for row in rows)
    parts = [f"# {title}", about, "\n".join(f"- {name}: {value}" for name, value in where.items())]
    for values, group in itertools.groupby(rows, key=lambda row: [row[name] for name in by]):
        parts += ["## " + ", ".join(str(value) for value in values)] if by else []
        parts.append(format_table([{name: row[name] for name in row if name not in by} for row in group]))
    (folder / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def format_table(rows: Sequence[Row]) -> str:
    """A Markdown table; the quartiles stand behind their ratio."""
    columns = [name for name in rows[0] if name not in ("ratio_low", "ratio_high")]
    lines = [columns, ["---"] * len(columns), *([_cell(row, name) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(row: Mapping[str, str | int | float | None], name: str) -> str:
    value = row[name]
    if value is None:
        return "-"
    if name == "ratio":
        return f"{value:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
    if isinstance(value, float):
        return f"{value:.1e}" if name == "error" else f"{value:.2f}"
    return str(value).replace("|", "\\|")
