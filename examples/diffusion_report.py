"""Table and picture of diffusion.py's log: means, standard deviations, and differences to no decay, seed by seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from diffusion_judge import Score
from image_folder import Images
from run_log import origin, require_finite
from seeds import mean_and_spread, paired_difference
from spatial_decay.layers.kinds import KINDS, KindName

COMPARED: tuple[KindName, ...] = ("none", "fixed", "full")
ROWS = list(dict.fromkeys((*COMPARED, *KINDS)))
TO_NONE = "difference to none [95 %]"
NUM_SHOWN = 10  # of each class in the picture


@dataclass(frozen=True)
class Key:
    """A run."""

    decay: str
    seed: int


@dataclass(frozen=True)
class Result:
    """What came of it."""

    accuracy: float  # percent, see Score
    distance: float  # see Score
    loss: float  # mean of the last tenth of the steps
    cpu_seconds: float  # of training
    judge: str  # its fingerprint, see Judge
    date: str
    torch: str
    diffusers: str
    machine: str

    def __post_init__(self) -> None:
        require_finite(accuracy=self.accuracy, distance=self.distance, loss=self.loss)


def format_table(results: Mapping[Key, Result], references: Mapping[str, Score]) -> str:
    """Mean ± standard deviation over the seeds, and differences seed by seed, as Markdown."""
    lines = [
        f"| decay | read as its class (%) | {TO_NONE} | Fréchet distance | {TO_NONE} | training (CPU s) |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {score.accuracy:.2f} | - | {score.distance:.2f} | - | - |"
            for name, score in references.items()
        ),
    ]
    for decay in ROWS:
        if not any(key.decay == decay for key in results):
            continue
        cells = [f"`{decay}`"]
        for name in ("accuracy", "distance"):
            ours, none = (
                {key.seed: getattr(result, name) for key, result in results.items() if key.decay == kind}
                for kind in (decay, "none")
            )
            difference = paired_difference(ours, none) if decay != "none" else None
            cells += [mean_and_spread([*ours.values()]), str(difference or "-")]
        seconds = [result.cpu_seconds for key, result in results.items() if key.decay == decay]
        lines.append(f"| {' | '.join(cells)} | {sum(seconds) / len(seconds):.0f} |")
    return "\n".join(lines)


def describe(results: Mapping[Key, Result], config: Mapping[str, Any], *, num_judged: int, num_references: int) -> str:
    """What the numbers stand on, in one paragraph."""
    references = (
        f"The rows above the decays come from no model: they are what the classifier says of {num_references} test "
        f"images, of worse and worse pictures made of them, and of noise. "
    )
    return (
        f"{num_judged} images for each run (DDIM, {config['SAMPLER_STEPS']} steps, guidance {config['guidance']:g}) "
        f"after {config['steps']} training steps of {config['BATCH_SIZE']} images. They are read by a classifier that "
        f"was trained here on the same training images. The Fréchet distance is between its features of the images "
        f"drawn and of the training images: the less, the better. It is no FID, which has Inception's features. "
        f"{references if num_references else ''}Mean ± standard deviation (number of seeds). Differences are taken "
        f"seed by seed, with their mean's 95 % interval (Student's t), where there are two seeds or more. "
        f"{origin(results.values(), 'diffusers')}."
    )


def plot_samples(images: Mapping[str, Images], *, num_classes: int) -> Figure:
    """A panel for each, with a row for each class: NUM_SHOWN images side by side."""
    figure = Figure((3.2 * len(images), 0.32 * num_classes + 0.4), layout="constrained")
    for ax, (title, shown) in zip(figure.subplots(1, len(images), squeeze=False)[0], images.items(), strict=True):
        tiles = torch.zeros(num_classes, NUM_SHOWN, *shown.pixels.shape[1:], dtype=torch.uint8)
        for label in range(num_classes):
            of_class = shown.pixels[shown.labels == label][:NUM_SHOWN]
            tiles[label, : len(of_class)] = of_class
        sheet = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (classes * SIZE, NUM_SHOWN * SIZE, C)
        ax.imshow(sheet.squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
        ax.set_title(title, fontsize=9)
        ax.set(xticks=[], yticks=[])
    return figure
