"""Tables and pictures of ablation.py's log: means, standard deviations, and differences to no decay, seed by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ablation_log import Key, Result
from ablation_models import STRUCTURE, Positions, Recipe, counts_steps
from ablation_plan import (
    DECAYS_AT_SIZES,
    GATES,
    LONGER,
    MECHANISMS,
    NORMS,
    REFERENCE,
    RELATIVES,
    RESIZED,
    SCALES,
    TRAINED_ALONE,
    TRAINING,
    TRANSFERS,
    TWICE,
)
from run_log import origin, write_whole
from seeds import Difference, mean_and_spread, paired_difference

TABLES: dict[str, dict[str, str]] = {
    "Table 3, gating": {"none": "No decay", "fixed": "Spatial Decay", "full": "Ours (full)"},
    "Table 4, spatial fusion": {
        "1d": "1D Decay",
        "bidirectional": "Bidirectional Decay",
        "decomposed": "Decomposed 2D Decay",
        "full": "Ours (full)",
    },
    "Table 5, alpha": {
        "full, alpha 0.05": "alpha = 0.05",
        "full": "alpha = 0.1",
        "full, alpha 0.15": "alpha = 0.15",
        "full, alpha 0.2": "alpha = 0.2",
    },
    "Relatives": {
        "alibi": "2-D ALiBi",
        "learned": "A trained rate a head",
        "squared": "Ours, squared distance",
        "gaussian": "LocAtViT's Gaussian",
    },
}
"""The paper's tables, and what it has not: decays -> their names there."""

MODELS = {("vit", "learned"): "plain ViT", ("sdt_h", ""): "SDT-H"}
POSITIONS = {"none": "no positions", "learned": "learned positions", "rope": "RoPE", "sincos": "sines and cosines"}
WAYS = {
    TRAINING: "as it is",
    REFERENCE: "in steps of the size trained on",
    GATES: "gates trained there",
    NORMS: "norms trained there",
    RESIZED: "images resized",
}
"""How a model, or the images, are made ready for another size."""
COUNTERPART = {GATES: NORMS}
"""Ways that the model without decay has not -> its own that they are compared with."""
ALONG_AXES = ("rows, columns: fixed", "decomposed")
ARMS = {
    TRAINING: "before",
    "further": "trained further without a swap",
    "swap, all weights": "`full` swapped in, all weights trained",
    "swap, paper's gates": "the same, with gates that begin as strong as in the paper",
    "swap, gates": "`full` swapped in, the gates alone trained",
    "swap, gates and LoRA": "`full` swapped in, gates and LoRA trained",
}
CURVES = {
    TRAINING: "as it is",
    REFERENCE: "positions and distances in\nsteps of the size trained on",
    "tuned": "one epoch of gates alone\n(without decay: of norms)",
}
"""Rows of the picture of sizes."""
SHORT: dict[Positions, tuple[str, ...]] = dict.fromkeys(("learned", "rope", "sincos"), DECAYS_AT_SIZES["learned"])
"""What of DECAYS_AT_SIZES the short picture shows."""


def accuracies(
    results: Mapping[Key, Result], model: str, positions: str, decay: str, after: str, size: int
) -> dict[int, float]:
    """In percent, by seed."""
    wanted = (model, positions, decay, after, size)
    return {
        key.seed: result.accuracy
        for key, result in results.items()
        if (key.model, key.positions, key.decay, key.after, key.size) == wanted
    }


def accuracies_at_size(
    results: Mapping[Key, Result], positions: str, decay: str, after: str, size: int
) -> dict[int, float]:
    """Of plain ViTs that have gone to a size in some way: one in which nothing counts steps, as it is."""
    is_as_it_is = after == REFERENCE and not counts_steps(positions, decay)
    return accuracies(results, "vit", positions, decay, TRAINING if is_as_it_is else after, size)


def difference(
    results: Mapping[Key, Result], positions: str, decay: str, other: str, after: str, size: int
) -> Difference | None:
    """Of plain ViTs with two decays that have gone to a size in the same way, or in the other's own."""
    theirs = accuracies_at_size(results, positions, other, COUNTERPART.get(after, after), size)
    return paired_difference(accuracies_at_size(results, positions, decay, after, size), theirs)


def _row(*cells: object) -> str:
    """Of a Markdown table; what is not there is a dash."""
    return f"| {' | '.join(str(cell or '-') for cell in cells)} |"


def format_tables(results: Mapping[Key, Result], *, size: int) -> str:
    """The paper's Tables 3, 4 and 5 as Markdown."""
    heads = " | ".join(f"{model} (%) | difference to none [95 %]" for model in MODELS.values())
    blocks = []
    for title, rows in TABLES.items():
        lines = [f"| {title} | decay | {heads} |", "|---|---|---|---|---|---|"]
        for decay, name in rows.items():
            cells: list[object] = [name, f"`{decay}`"]
            for model, positions in MODELS:
                none, ours = (accuracies(results, model, positions, kind, TRAINING, size) for kind in ("none", decay))
                found = paired_difference(ours, none) if decay != "none" else None
                cells += [mean_and_spread([*ours.values()]), found]
            lines.append(_row(*cells))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def format_longer(results: Mapping[Key, Result], *, size: int) -> str:
    """Whether the trainings are long enough to compare decays, as Markdown."""
    lines = ["| plain ViT | accuracy (%) | twice as long (%) | gained [95 %] |", "|---|---|---|---|"]
    for decay in LONGER:
        once, twice = (accuracies(results, "vit", "learned", decay, after, size) for after in (TRAINING, TWICE))
        cells = [mean_and_spread([*once.values()]), mean_and_spread([*twice.values()])]
        lines.append(_row(f"`{decay}`", *cells, paired_difference(twice, once)))
    return "\n".join(lines)


def format_sizes(results: Mapping[Key, Result], *, size: int) -> str:
    """By size as Markdown: accuracies, differences to no decay, and what of `decomposed` is its decay."""
    sizes = sorted({key.size for key in results})
    accuracy, to_none, to_structure = (
        [f"| positions | {title} | tested | {' | '.join(map(str, sizes))} |", "|---" * (3 + len(sizes)) + "|"]
        for title in ("decay", "decay, difference to none [95 %]", f"decay, difference to {STRUCTURE} [95 %]")
    )
    for positions, decays in DECAYS_AT_SIZES.items():
        for decay in decays:
            for after, way in WAYS.items():
                found = {other: accuracies(results, "vit", positions, decay, after, other) for other in sizes}
                if not any(values for other, values in found.items() if other != size):
                    continue
                cells = [POSITIONS[positions], f"`{decay}`", way]
                accuracy.append(_row(*cells, *(mean_and_spread([*values.values()]) for values in found.values())))
                if decay != "none":
                    to_none.append(
                        _row(*cells, *(difference(results, positions, decay, "none", after, other) for other in sizes))
                    )
                if decay in ALONG_AXES and any(
                    gained := [difference(results, positions, decay, STRUCTURE, after, other) for other in sizes]
                ):
                    to_structure.append(_row(*cells, *gained))
    return "\n\n".join("\n".join(lines) for lines in (accuracy, to_none, to_structure) if len(lines) > 2)


def format_transfer(results: Mapping[Key, Result], *, size: int) -> str:
    """What the swap added, as Markdown."""
    found = {arm: accuracies(results, "vit", "learned", "none", arm, size) for arm in ARMS}
    lines = [f"| a plain ViT | accuracy (%) | difference to {ARMS['further']} [95 %] |", "|---|---|---|"]
    for arm, name in ARMS.items():
        added = paired_difference(found[arm], found["further"]) if arm != "further" else None
        lines.append(_row(name, mean_and_spread([*found[arm].values()]), added))
    return "\n".join(lines)


def plot_differences(results: Mapping[Key, Result], *, size: int) -> Figure:
    """Of each decay to none: a dot for each seed, the mean, and its interval where there are two seeds or more."""
    rows = [decay for decay in (*MECHANISMS, *SCALES, *RELATIVES) if decay != "none"]
    figure = Figure((10, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(MODELS), sharey=True)
    for ax, ((model, positions), title) in zip(axes, MODELS.items(), strict=True):
        none = accuracies(results, model, positions, "none", TRAINING, size)
        for y, decay in enumerate(rows):
            ours = accuracies(results, model, positions, decay, TRAINING, size)
            if (found := paired_difference(ours, none)) is None:
                continue
            seeds = [ours[seed] - none[seed] for seed in ours if seed in none]
            ax.plot(seeds, [y] * len(seeds), ".", color="C0", alpha=0.5)
            margin = found.margin if math.isfinite(found.margin) else 0
            ax.errorbar(found.mean, y, xerr=margin, fmt="o", color="C0", capsize=4)
        ax.axvline(0, color="grey", linewidth=1)
        ax.set(title=title, xlabel="accuracy less that without decay (points)", yticks=range(len(rows)))
        ax.set_yticklabels(rows)
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    return figure


def plot_sizes(
    results: Mapping[Key, Result],
    *,
    size: int,
    spread: Mapping[Positions, Sequence[str]] = DECAYS_AT_SIZES,
    ways: Sequence[str] = tuple(CURVES),
) -> Figure:
    """Accuracy against size: a column for each kind of positions, a row for each way of going to another size."""
    decays = list(dict.fromkeys(decay for shown in spread.values() for decay in shown))
    colours = {decay: f"C{i}" for i, decay in enumerate(decays)}
    figure = Figure((2.9 * len(spread) + 2.6, 2.35 * len(ways) + 0.75), layout="constrained")
    axes = figure.subplots(len(ways), len(spread), sharex=True, sharey="row", squeeze=False)
    sizes = sorted({key.size for key in results})
    for column, (positions, shown) in enumerate(spread.items()):
        for ax, way in zip(axes[:, column], ways, strict=True):
            for decay in shown:
                if after := TRAINED_ALONE.get(decay) if way == "tuned" else way:
                    curve = _curve(results, positions, decay, after, size)
                    _plot_curve(ax, curve, color=colours[decay], label=decay)
            resized = _curve(results, positions, "none", RESIZED, size)
            _plot_curve(ax, resized, color="black", linestyle=":", label="none, images resized\nto the size trained on")
            ax.set(xticks=sizes)
            ax.grid(alpha=0.3)
        axes[0, column].set_title(POSITIONS[positions])
        axes[-1, column].set_xlabel("size of the test images (pixels)")
    for ax, way in zip(axes[:, 0], ways, strict=True):
        ax.set_ylabel(f"{CURVES[way]}\naccuracy (%)" if len(ways) > 1 else "accuracy (%)")
    if len(ways) == 1:
        figure.suptitle(CURVES[ways[0]].replace("\n", " "))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", title="decay")
    return figure


def _curve(results: Mapping[Key, Result], positions: str, decay: str, after: str, size: int) -> dict[int, list[float]]:
    """Accuracies of all seeds by size, from the size trained on."""
    curve = {size: [*accuracies(results, "vit", positions, decay, TRAINING, size).values()]}
    for other in sorted({key.size for key in results} - {size}):
        curve[other] = [*accuracies_at_size(results, positions, decay, after, other).values()]
    return {other: values for other, values in sorted(curve.items()) if values}


def _plot_curve(
    ax: Axes, curve: Mapping[int, Sequence[float]], *, color: str, label: str, linestyle: str = "-"
) -> None:
    """Means over the seeds, and a band of one standard deviation."""
    if len(curve) < 2:
        return
    means = [statistics.mean(values) for values in curve.values()]
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in curve.values()]
    ax.plot([*curve], means, marker=".", color=color, linestyle=linestyle, label=label)
    low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
    ax.fill_between([*curve], low, high, color=color, alpha=0.12, linewidth=0)


def describe(results: Mapping[Key, Result], recipe: Recipe) -> str:
    """What the numbers stand on, in two paragraphs."""
    hours = sum(result.seconds for result in results.values()) / 3600
    return (
        f"Plain ViTs: {recipe.vit_images:,} images x {recipe.vit_epochs} epochs; SDT-H: {recipe.sdt_h_images:,} x "
        f"{recipe.sdt_h_epochs}. Tested on {recipe.test_images:,} images, at other sizes on {recipe.size_images:,}; "
        f"gates or norms alone were trained on {recipe.gate_images:,} of the other size (or as many as there are). "
        f"{len(results)} results, whose times add up to {hours:.1f} hours, "
        f"{origin(results.values())}.\n\n"
        "Accuracy after the last epoch, in percent: mean ± standard deviation (number of seeds). Differences are taken "
        "seed by seed, from the same first weights, order and flips: their mean and its 95 % interval (Student's t), "
        "where there are two seeds or more. At other sizes both models went there in the same way (column `tested`); "
        "where nothing counts steps a model is as it is, and trained gates are compared with the trained norms of a "
        "model without a decay. Intervals cover the choice of the seed, not of the test images. One in twenty does not "
        "hold the true value, and those of two seeds are often far too wide and at times far too narrow."
    )


def format_all(results: Mapping[Key, Result], recipe: Recipe) -> str:
    """results.md, of what is there."""
    size = recipe.size
    parts = [describe(results, recipe), format_tables(results, size=size)]
    if any(key.after == TWICE for key in results):
        parts.append(format_longer(results, size=size))
    if any(key.size != size for key in results):
        parts.append(format_sizes(results, size=size))
    if any(key.after in TRANSFERS for key in results):
        parts.append(format_transfer(results, size=size))
    return "\n\n".join(parts) + "\n"


def write(results: Mapping[Key, Result], folder: Path, recipe: Recipe) -> list[Path]:
    """results.md and the pictures, of what is there."""
    if not results:
        return []
    text, size = format_all(results, recipe), recipe.size
    write_whole(folder / "results.md", lambda part: part.write_text(text, encoding="utf-8"))
    figures = {"tables.png": plot_differences(results, size=size)}
    if any(key.size != size for key in results):
        figures["sizes.png"] = plot_sizes(results, size=size)
        figures["sizes-short.png"] = plot_sizes(results, size=size, spread=SHORT, ways=(REFERENCE,))
    for name, figure in figures.items():
        write_whole(folder / name, partial(figure.savefig, dpi=150))
    print(text)
    return [folder / name for name in ("results.md", *figures)]
