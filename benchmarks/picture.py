"""The picture of benchmarks.attention: how many times plain SDPA each contender takes, against L."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

__all__ = ["plot_ratios"]

_TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)


def plot_ratios(rows: Sequence[Mapping[str, Any]], passes: Sequence[str], floor: str) -> Figure:
    """A row of panels a kind, a panel a pass, a line a contender; both axes logarithmic, the floor at 1."""
    kinds = list(dict.fromkeys(str(row["kind"]) for row in rows))
    names = [name for name in dict.fromkeys(str(row["contender"]) for row in rows) if name != floor]
    figure = Figure(figsize=(10.0, 0.8 + 3.2 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), len(passes), squeeze=False, sharey=True, sharex="row")
    for kind, line_of_panels in zip(kinds, panels, strict=True):
        for which, ax in zip(passes, line_of_panels, strict=True):
            here = [row for row in rows if row["kind"] == kind and row["pass"] == which]
            ax.axhline(1.0, color="black", linewidth=1.2)
            for number, name in enumerate(names):
                points = sorted((row["L"], row["ratio"]) for row in here if row["contender"] == name and row["ratio"])
                style = {"linestyle": "--"} if name == "auto" else {"marker": "osDv^P"[number % 6]}
                ax.plot([x for x, _ in points], [y for _, y in points], color=f"C{number}", label=name, **style)
            ax.set(xscale="log", yscale="log", title=f"{kind}, {which}")
            for axis, ticks in ((ax.xaxis, {row["L"] for row in here}), (ax.yaxis, _TICKS)):
                axis.set_major_locator(FixedLocator(sorted(ticks)))
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.grid(alpha=0.3)
        line_of_panels[0].set_ylabel(f"time over {floor}")
    for ax in panels[-1]:
        ax.set_xlabel("tokens L")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    return figure
