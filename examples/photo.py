"""The README's picture: what a patch attends to with plain attention, with a fixed decay and with a learned one.

    python examples/photo.py    # a minute on two CPU cores, into outputs/photo-{light,dark}.png
    python examples/photo.py --output docs/pictures    # the README's own, anew

Three small blocks learn to fill in masked patches of the two photographs that come with scikit-learn: nothing is
downloaded. Nothing tells their gates (SDT Eq. 5) what a sky, a temple or a flower is. Needs the extra [demo].
"""

import argparse
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from tqdm import trange

import spatial_decay as sd
from command_line import at_least
from spatial_decay import viz

SIZE = (240, 360)  # pixels
PATCH = 8  # pixels
ALPHA = 0.1  # Eq. 8
CROP = 14  # patches on a side, in training
BATCH_SIZE = 8
LEARNING_RATE = 2e-3
GATES_RATE = 1e-2  # gates are a few hundred weights, and a minute is short


@dataclass(frozen=True)
class Query:
    """One photograph of scikit-learn's, and the patch (row, column) on the grid of 30 x 45 that is ringed."""

    photo: str
    patch: tuple[int, int]


QUERIES = (Query("china.jpg", (14, 8)), Query("flower.jpg", (14, 6)))


@dataclass(frozen=True)
class Theme:
    """Colours of the page that the picture stands on."""

    page: str
    ink: str


THEMES = {"light": Theme("#ffffff", "#1f2328"), "dark": Theme("#0d1117", "#e6edf3")}


class FillIn(nn.Module):
    """Patches in, patches out; what attention alone can tell is which patches are near, and which are alike."""

    mean: Tensor

    def __init__(self, mean: Tensor, dim: int = 96, num_heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.register_buffer("mean", mean)  # (1, 3, 1, 1)
        self.patch_embed = nn.Conv2d(3, dim, PATCH, PATCH)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        # Without the convolutions, which see neighbours too, so that the decay has to say what is near.
        self.blocks = nn.ModuleList(
            sd.SDTBlock(
                dim,
                num_heads,
                decay=sd.kinds.Full(alpha=ALPHA),
                lpe_kernel_size=0,
                pos_kernel_size=0,
                mlp_kernel_size=0,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 3 * PATCH**2)

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """Images (B, 3, height, width), masked (B, H, W) -> colours less the mean, (B, H, W, 3 * 8 * 8)."""
        x: Tensor = self.patch_embed(images - self.mean).permute(0, 2, 3, 1)  # (B, H, W, D)
        if masked is not None:
            x = torch.where(masked[..., None], self.mask_token, x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def load_photos() -> Tensor:
    """(2, 3, 240, 360) in [0, 1]."""
    photos = [torch.from_numpy(load_sample_image(query.photo).copy()) for query in QUERIES]
    large = torch.stack(photos).permute(0, 3, 1, 2) / 255
    return F.interpolate(large, SIZE, mode="bilinear", antialias=True).clamp(0, 1)


def patches(images: Tensor) -> Tensor:
    """(B, 3, height, width) -> (B, H, W, 3 * 8 * 8)."""
    return images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3)


def train(photos: Tensor, *, steps: int, seed: int = 0) -> FillIn:
    """AdamW on random crops of both photographs, with half of the patches masked."""
    torch.manual_seed(seed)
    model = FillIn(photos.mean((0, 2, 3), keepdim=True))
    gates = [weight for name, weight in model.named_parameters() if ".decay." in name]
    others = [weight for name, weight in model.named_parameters() if ".decay." not in name]
    optimizer = torch.optim.AdamW([{"params": gates, "lr": GATES_RATE}, {"params": others, "lr": LEARNING_RATE}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [GATES_RATE, LEARNING_RATE], total_steps=steps)
    side = CROP * PATCH
    for _ in (progress := trange(steps, desc="filling in")):
        corners = torch.stack([torch.randint(high, (BATCH_SIZE,)) for high in (2, SIZE[0] - side, SIZE[1] - side)], 1)
        crops = torch.stack([photos[i, :, y : y + side, x : x + side] for i, y, x in corners.tolist()])
        masked = torch.rand(BATCH_SIZE, CROP, CROP) < 0.5
        loss = (model(crops, masked) - patches(crops - model.mean))[masked].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    return model.eval()


@dataclass(frozen=True)
class View:
    """What one head makes of one photograph: maps (H, W) over its patches."""

    photo: Tensor  # (3, height, width)
    query: tuple[int, int]
    fixed: Tensor  # factors in [0, 1] on the attention of the query
    learned: Tensor
    half: Tensor  # grid steps after which the decay between two patches of this kind has halved the attention


def look(model: FillIn, photos: Tensor) -> list[View]:
    """One view a photograph, all of the head whose patches differ most in how fast they fade."""
    calls = [viz.record(model, photos[i : i + 1]) for i in range(len(photos))]
    gates = torch.stack([torch.stack([layer.gates()["gate"][0] for layer in call]) for call in calls])
    # (photos, layers, N, H, W). Beyond the photograph's width nothing is left to halve.
    half = (math.log(2) / (ALPHA * gates.abs())).clamp(max=gates.shape[-1])
    number, head = divmod(int(half.log().std((0, 3, 4)).argmax()), half.shape[2])
    # A fixed decay has one rate for all photographs: here the mean of what was learned, of its logarithm.
    rates = math.log(2) / half[:, number].log().mean((0, 2, 3)).exp()
    views = []
    for i, query in enumerate(QUERIES):
        learned = calls[i][number]
        fixed = replace(learned, added=sd.decay.ManhattanDecay.constant(rates, learned.layout))
        near, akin = (layer.decay(query.patch)[0, head] for layer in (fixed, learned))
        views.append(View(photos[i], query.patch, near, akin, half[i, number, head]))
    return views


TITLES = (
    "one patch asks",
    "plain attention:\nall patches alike",
    "fixed decay:\nby distance",
    "learned decay:\nby distance and content",
    "what was learned:\nhow far each patch looks",
)


def draw(views: Sequence[View], theme: Theme) -> Figure:
    """A row for each photograph: the patch, three kinds of attention, and how far each patch looks."""
    figure = Figure((12.5, 3.75), dpi=100, facecolor=theme.page, layout="constrained")
    cells = figure.add_gridspec(len(views), 6, width_ratios=(*[1.0] * 5, 0.035))
    for row, view in enumerate(views):
        attentions = (None, torch.ones(1, 1), view.fixed, view.learned)
        axes = [figure.add_subplot(cells[row, column]) for column in range(5)]
        for ax, factor in zip(axes, attentions, strict=False):
            ax.imshow(_fade(view.photo, factor, theme).numpy())
        norm = LogNorm(1, view.half.shape[1], clip=True)
        heat = axes[4].imshow(_enlarge(view.half, view.photo).numpy(), cmap="viridis", norm=norm)
        bar = figure.colorbar(heat, figure.add_subplot(cells[row, 5]))
        bar.set_ticks([1, 3, 10, 30])
        bar.ax.minorticks_off()
        bar.ax.yaxis.set_major_formatter("{x:.0f}")
        bar.ax.tick_params(colors=theme.ink, labelsize=12)
        bar.set_label("grid steps to half", color=theme.ink, fontsize=12)
        bar.outline.set_visible(False)
        for ax, title in zip(axes, TITLES, strict=True):
            ax.set_title("" if row else title, color=theme.ink, fontsize=13)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set(color=theme.ink, alpha=0.35)
            _ring(ax, view.query)
    return figure


def _enlarge(over_patches: Tensor, photo: Tensor) -> Tensor:
    """(H, W) -> (height, width) of the photograph."""
    return F.interpolate(over_patches[None, None], photo.shape[-2:], mode="bilinear")[0, 0]


def _fade(photo: Tensor, factor: Tensor | None, theme: Theme) -> Tensor:
    """The photograph, in the page's colour where the factor is 0: (height, width, 3)."""
    weight = torch.ones(()) if factor is None else _enlarge(factor, photo)
    page = torch.tensor(to_rgb(theme.page))[:, None, None]
    return (weight * photo + (1 - weight) * page).permute(1, 2, 0)


def _ring(ax: Axes, patch: tuple[int, int]) -> None:
    y, x = (PATCH * (number + 0.5) - 0.5 for number in patch)
    for colour, width in (("#000000", 4.5), ("#ffffff", 2.0)):
        ax.plot(x, y, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=width)


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 256 colours, which takes half of the bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn)
    picture = Image.open(drawn).convert("RGB")
    # With a palette that is given it is dithered, and only then.
    small = picture.quantize(palette=picture.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
    # Where the page is, its own colour and not the next one, so that no edge shows.
    red, green, blue = (round(255 * part) for part in to_rgb(figure.get_facecolor()))
    is_page = (np.asarray(picture) == (red, green, blue)).all(-1)
    number = int(np.asarray(small)[is_page][0])
    palette = small.getpalette() or []
    palette[3 * number : 3 * number + 3] = red, green, blue
    small.putpalette(palette)
    small.paste(number, mask=Image.fromarray(is_page))
    small.save(path, optimize=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=at_least(1), default=300, help="of training (default: 300)")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder (default: outputs)")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    photos = load_photos()
    views = look(train(photos, steps=options.steps), photos)
    for name, theme in THEMES.items():
        path = options.output / f"photo-{name}.png"
        save(draw(views, theme), path)
        print(path)


if __name__ == "__main__":
    main()
