"""Draw the pictures of docs/gallery.md: every plot of spatial_decay.viz on two real photographs.

    python examples/gallery.py    # outputs/gallery-*, light and dark, some minutes on two CPU cores
    python examples/gallery.py --output docs/pictures    # the page's own, anew

A block for each kind of decay and a model of three blocks are trained to fill in masked patches of scikit-learn's two
photographs: nothing is downloaded. Needs the extra [demo].
"""

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from tqdm import tqdm

from spatial_decay import SDTBlock, viz
from spatial_decay.layers.kinds import DecayLike, KindName

PATCH_SIZE = 8  # pixels
PHOTO_SIZE = (448, 640)  # pixels: 56 x 80 patches
CROP = 14  # patches along a side of what is trained on
LEARNING_RATE = 2e-3
DARK, LIGHT = "#1e2129", "#e2e4e9"  # of the site's dark scheme
MAX_COLOURS = 255  # of a picture

FLOWER, TEMPLE = 1, 0
PETAL, ROOF = (FLOWER, 30, 38), (TEMPLE, 18, 22)
KINDS: tuple[KindName, ...] = (
    "full",
    "fixed",
    "1d",
    "bidirectional",
    "decomposed",
    "fixed_decomposed",
    "gaussian",
    "none",
)  # the paper's and its peers'
HEADS = (0, 5, 10, 15)


class FillIn(nn.Module):
    """Patches in, the pixels of masked ones out: blocks with decay between two linear maps."""

    def __init__(self, decays: Sequence[DecayLike], *, dim: int, num_heads: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, PATCH_SIZE, PATCH_SIZE)
        self.mask = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList(SDTBlock(dim, num_heads, decay=decay) for decay in decays)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 3 * PATCH_SIZE**2)

    def forward(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(B, 3, 8 * H, 8 * W), and bool (B, H, W), True where a patch is masked -> (B, H, W, 192)."""
        x: Tensor = self.patch(images).permute(0, 2, 3, 1)  # (B, H, W, D)
        if hidden is not None:
            x = torch.where(hidden[..., None], self.mask, x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def load_photos() -> Tensor:
    """Temple and flower, (2, 3, 448, 640), less their mean."""
    photos = [torch.from_numpy(load_sample_image(name).copy()) for name in ("china.jpg", "flower.jpg")]
    images = torch.stack(photos).permute(0, 3, 1, 2).float() / 255
    images = F.interpolate(images, size=PHOTO_SIZE, mode="bilinear", antialias=True)
    return images - images.mean((0, 2, 3), keepdim=True)


def train(
    decays: Sequence[DecayLike], photos: Tensor, *, dim: int, num_heads: int, steps: int, seed: int = 0
) -> FillIn:
    """Fill in half of the patches of random crops, four at a time, by the mean squared error."""
    torch.manual_seed(seed)
    model = FillIn(decays, dim=dim, num_heads=num_heads)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    side = CROP * PATCH_SIZE
    for _ in tqdm(range(steps), desc="train"):
        places = [[int(torch.randint(n - side + 1, ())) for n in PHOTO_SIZE] for _ in range(4)]
        crops = torch.stack([photos[i % 2, :, y : y + side, x : x + side] for i, (y, x) in enumerate(places)])
        hidden = torch.rand(len(crops), CROP, CROP) < 0.5
        target = F.pixel_unshuffle(crops, PATCH_SIZE).permute(0, 2, 3, 1)  # (B, H, W, 192)
        loss = (model(crops, hidden) - target)[hidden].pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def loop(num_frames: int) -> list[tuple[int, int]]:
    """Places on an ellipse over the 56 x 80 patches."""
    angles = torch.linspace(0, 2 * torch.pi, num_frames + 1)[:-1]
    rows, columns = 28 + 16 * angles.sin(), 40 + 26 * angles.cos()
    return [(int(h), int(w)) for h, w in zip(rows.tolist(), columns.tolist(), strict=True)]


def save(draw: Callable[[], Figure], name: str, output: Path) -> None:
    """Light and dark, in few colours: gallery-NAME-light.png and gallery-NAME-dark.png."""
    figure = draw()
    for style in ("light", "dark"):
        if style == "dark":
            darken(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150)
        picture = in_few_colours(Image.open(buffer).convert("RGB"))
        picture.save(output / f"gallery-{name}-{style}.png", optimize=True)


def save_animation(draw: Callable[[], FuncAnimation], name: str, output: Path) -> None:
    """Light and dark: gallery-NAME-light.gif and gallery-NAME-dark.gif."""
    for style, page, ink in (("light", "white", "black"), ("dark", DARK, LIGHT)):
        with rc_context({"figure.facecolor": page, "text.color": ink, "axes.edgecolor": ink}):
            draw().save(output / f"gallery-{name}-{style}.gif", writer="pillow", dpi=72)


def in_few_colours(picture: Image.Image) -> Image.Image:
    """A third of the bytes; dithered, so that a sky has no steps, on exactly the background that it had."""
    colours = picture.quantize(MAX_COLOURS, kmeans=3)
    result = picture.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG)
    palette: Any = result.getpalette()
    background: Any = result.getpixel((0, 0))  # its number in the palette
    palette[3 * background : 3 * background + 3] = picture.getpixel((0, 0))
    result.putpalette(palette)
    return result


def darken(figure: Figure) -> None:
    """Light text and lines on the site's dark background: quicker than to compute and draw all of it anew."""
    figure.set_facecolor(DARK)
    for text in figure.findobj(Text):
        text.set_color(LIGHT)
    for ax in figure.axes:
        ax.set_facecolor(DARK)
        ax.tick_params(colors=LIGHT)
        for spine in ax.spines.values():
            spine.set_edgecolor(LIGHT)
        if (legend := ax.get_legend()) is not None:
            legend.get_frame().set(facecolor=DARK, edgecolor=LIGHT)


def draw_distances(layers: Sequence[viz.LayerRecord]) -> Figure:
    """Attention distance with and without the decay, in one picture."""
    figure = Figure((7.0, 3.6), layout="constrained")
    ax = figure.subplots()
    viz.plot_attention_distance(layers, label="with decay", ax=ax)
    viz.plot_attention_distance([layer.without_decay() for layer in layers], label="without decay", ax=ax)
    return figure


def draw_all(output: Path, *, steps: int, steps_of_kinds: int, num_frames: int) -> None:
    """Train and draw."""
    photos = load_photos()
    model = train(("full", "full", "full"), photos, dim=128, num_heads=16, steps=steps)
    layers = viz.record(model, photos)
    last = layers[-1]
    save(lambda: viz.plot_reach(layers, photos, image=FLOWER, heads=HEADS), "reach", output)
    alone = [layer.decay_alone() for layer in layers]
    save(lambda: viz.plot_reach(alone, photos, image=TEMPLE, heads=HEADS), "reach-decay", output)
    save(lambda: viz.plot_decay_maps(last, photos, [PETAL]), "maps", output)
    save(lambda: viz.plot_with_and_without_decay(last, photos, [ROOF], heads=HEADS), "effect", output)
    of_one = [layer.select([FLOWER], range(0, 16, 2)) for layer in layers]
    save(lambda: draw_distances(of_one), "distance", output)
    models = [train([kind], photos, dim=64, num_heads=4, steps=steps_of_kinds) for kind in KINDS]
    records = [viz.record(model, photos)[0] for model in models]
    save(lambda: viz.plot_kinds(records, photos, PETAL), "kinds", output)
    path = loop(num_frames)
    save_animation(lambda: viz.animate_query(last, photos, path, image=TEMPLE, head=HEADS[1]), "query", output)
    for name, value in viz.gate_statistics(layers).items():
        print(f"{name:32} {value:8.4f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/gallery.md.")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder (default: outputs)")
    parser.add_argument("--steps", type=int, default=120, help="of training the model (default: 120)")
    parser.add_argument("--steps-of-kinds", type=int, default=120, help="of training each kind (default: 120)")
    parser.add_argument("--frames", type=int, default=16, help="of the animation (default: 16)")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw_all(
        arguments.output,
        steps=arguments.steps,
        steps_of_kinds=arguments.steps_of_kinds,
        num_frames=arguments.frames,
    )


if __name__ == "__main__":
    main()
