"""The picture of benchmarks.attention: how many times plain SDPA each contender takes, a line a shape.

python -m benchmarks.picture outputs/benchmarks/attention/results.csv picture.png
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.contenders import FLOOR, MASK_COMPILED, PASSES

__all__ = ["picture"]

_PAPER, _INK, _FAINT, _ACCENT = "#ffffff", "#24292f", "#8c959f", "#c2410c"
_FASTER = "#fff4ec"  # the half of a panel below 1
# The one that the picture is about, with its numbers; then what others stand for, as small marks.
_STYLES: dict[str, dict[str, Any]] = {
    "native": {"marker": "o", "color": _ACCENT, "s": 90, "zorder": 5},
    "triton": {"marker": "o", "color": _ACCENT, "s": 90, "zorder": 5},
    "tiled": {"marker": "D", "color": "#0969da", "s": 32},
    "lowrank": {"marker": "v", "color": "#bf8700", "s": 44},
    MASK_COMPILED: {"marker": "s", "color": "#1a7f37", "s": 36},
    "mask eager": {"marker": "s", "facecolor": "none", "edgecolor": "#1a7f37", "s": 36},
    "written-out softmax": {"marker": "X", "color": _FAINT, "s": 46},
    "flex": {"marker": "^", "color": "#8250df", "s": 44},
}
_LABELS = {
    "native": "native: decay, by this package's kernel",
    "triton": "triton: decay, by this package's kernel",
    "tiled": "tiled: this package without a compiler",
    "lowrank": "lowrank: SDPA without a mask",
    MASK_COMPILED: "mask by hand, SDPA, torch.compile",
    "mask eager": "mask by hand, SDPA",
    "flex": "FlexAttention",
}
_NUMBERED = ("native", "triton")
_NUMBER: dict[str, Any] = {"color": _ACCENT, "fontsize": 10, "fontweight": "bold", "zorder": 6}
_TICKS = (0.1, 0.2, 0.5, 1, 2, 3, 5, 8, 12, 20, 40, 80)


def picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel a pass, a line a shape, a mark a contender; the axis is logarithmic, and plain SDPA is the line at 1.

    Args:
        rows: Of results.csv: read again, or as benchmarks.attention has them.
    """
    shapes = list(dict.fromkeys((str(row["kind"]), str(row["B, N, grid, d"])) for row in rows))
    drawn = {row["contender"] for row in rows if row["ratio"] and row["contender"] in _STYLES}
    ratios = [float(row["ratio"]) for row in rows if row["contender"] in drawn and row["ratio"]]
    least, most = min([0.28, *(0.45 * ratio for ratio in ratios)]), max([3.0, *(1.15 * ratio for ratio in ratios)])
    # 900 pixels of a README are 9 inches here: a point is 1.4 of them. Drawn twice as fine.
    figure = Figure(figsize=(9.0, 1.7 + 0.36 * len(shapes)), layout="constrained", facecolor=_PAPER, dpi=200)
    panels = figure.subplots(1, len(PASSES), squeeze=False, sharey=True)[0]
    for which, ax in zip(PASSES, panels, strict=True):
        ax.axvspan(least, 1.0, color=_FASTER, linewidth=0, zorder=0)
        ax.axvline(1.0, color=_INK, linewidth=1.6, zorder=1)
        for name in (name for name in _STYLES if name in drawn):
            of_name = [row for row in rows if row["contender"] == name and row["pass"] == which and row["ratio"]]
            found = [float(row["ratio"]) for row in of_name]
            lines = [shapes.index((str(row["kind"]), str(row["B, N, grid, d"]))) for row in of_name]
            ax.scatter(found, lines, label=_LABELS.get(name, name), **_STYLES[name])
            for ratio, line in zip(found, lines, strict=True) if name in _NUMBERED else []:
                side = {"ha": "right", "xytext": (-8, 0)} if ratio < 1 else {"ha": "left", "xytext": (8, 0)}
                ax.annotate(f"{ratio:.2f}", (ratio, line), textcoords="offset points", va="center", **side, **_NUMBER)
        ax.set_title(which, fontsize=11, color=_INK)
        ax.set(xscale="log", xlim=(least, most), ylim=(len(shapes) - 0.5, -0.5), facecolor=_PAPER)
        ax.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if least < tick < most]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_yticks(range(len(shapes)), [_title(*shape) for shape in shapes])
        ax.tick_params(labelsize=10, colors=_INK, length=0)
        ax.grid(axis="y", color="#d0d7de", linewidth=0.8)
        ax.grid(axis="x", color="#eaeef2", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[:].set_visible(False)
    figure.supxlabel(f"time over {FLOOR} without any mask (the line at 1); less is faster", fontsize=10, color=_INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=10, labelcolor=_INK)
    return figure


def _title(kind: str, shape: str) -> str:
    """As `full 14x14, d 32`: batch and heads stand in the table."""
    _, _, size, dim = shape.split(", ")
    return f"{kind} {size}, d {dim}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a results.csv of benchmarks.attention")
    parser.add_argument("output", type=Path, help="the picture to write, such as ratio.png")
    arguments = parser.parse_args(argv)
    with arguments.results.open(encoding="utf-8", newline="") as file:
        picture(list(csv.DictReader(file))).savefig(arguments.output)


if __name__ == "__main__":
    main()
