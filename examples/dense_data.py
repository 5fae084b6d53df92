"""Small images for dense prediction, with masks and boxes known by construction: composites.

Pieces of four classes of Fashion-MNIST and scikit-learn's scanned digits, each in a colour of its own, lie on crops of
photographs that come with scikit-image and scikit-learn. Training and test images share no piece and no photograph.
Nothing is downloaded but Fashion-MNIST: image_folder.py says where its four files may be. Needs the extra [dense].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import torch
from scipy.ndimage import binary_fill_holes
from sklearn.datasets import load_sample_image
from torch import Tensor

from digits import load_all, split_indices
from image_folder import DataError, checksum, load, resize

SIZE = 64  # pixels a side
SIDES = (22, 34)  # of a piece, in pixels
THRESHOLD = 0.15  # of the brightest: what is darker is not part of a piece
NUM_TRIES = 20  # to find room for a piece

FASHION = {1: "trouser", 2: "pullover", 7: "sneaker", 8: "bag"}
CLASSES = ("background", *FASHION.values(), "digit")

TRAIN_PHOTOS = ("china.jpg", "astronaut", "coffee", "rocket", "camera", "brick", "grass")
TEST_PHOTOS = ("flower.jpg", "chelsea", "moon", "gravel")
"""Names in scikit-learn (with .jpg) and scikit-image."""


@dataclass(frozen=True)
class Pieces:
    """What composites of one split are made of."""

    photos: list[Tensor]  # (3, height, width), uint8
    things: list[Tensor]  # (28, 28) or (8, 8), float32 in [0, 1]
    labels: list[int]  # 1 .. 5, in CLASSES


@dataclass(frozen=True)
class Composites:
    """Images with the class of each pixel, and a box around each piece."""

    images: Tensor  # (n, 3, 64, 64), uint8
    masks: Tensor  # (n, 64, 64), int64, in CLASSES
    boxes: list[Tensor]  # (pieces, 4) each: x0, y0, x1, y1, the last two exclusive; float32
    labels: list[Tensor]  # (pieces,) each, int64

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """Tells one set from another."""
        return f"{len(self)} images, {checksum(self.images, self.masks, *self.boxes)}"


def load_pieces(folder: Path) -> tuple[Pieces, Pieces]:
    """Of training and test.

    Args:
        folder: With the four files of Fashion-MNIST.

    Raises:
        DataError: it does not hold them, or what is there is broken; the message says which.
    """
    fashion = load(folder, 28)
    if fashion.num_classes != 10 or fashion.train.pixels.shape[1] != 1:
        raise DataError(
            f"{folder} must hold Fashion-MNIST, grey images of 10 classes: got {fashion.train.pixels.shape[1]} "
            f"channels and {fashion.num_classes} classes."
        )
    digits, _ = load_all()
    scans = [digits[part, 0] for part in split_indices(len(digits))]
    splits = []
    for part, part_scans, names in zip((fashion.train, fashion.test), scans, (TRAIN_PHOTOS, TEST_PHOTOS), strict=True):
        wanted = torch.isin(part.labels, torch.tensor([*FASHION]))
        if not set(FASHION) <= set(part.labels.tolist()):
            raise DataError(f"{folder} must hold images of all classes of Fashion-MNIST: some have none.")
        labels = [1 + [*FASHION].index(label) for label in part.labels[wanted].tolist()]
        things = [*(part.pixels[wanted, 0] / 255), *part_scans]
        labels += [len(CLASSES) - 1] * len(part_scans)
        splits.append(Pieces([_photo(name) for name in names], things, labels))
    return splits[0], splits[1]


def _photo(name: str) -> Tensor:
    """(3, height, width), uint8."""
    image = load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
    colours = np.broadcast_to(image[..., None], (*image.shape, 3)) if image.ndim == 2 else image
    return torch.from_numpy(colours.copy()).permute(2, 0, 1)


def compose(
    pieces: Pieces, count: int, *, seed: int, num_pieces: tuple[int, int] = (1, 3), sides: tuple[int, int] = SIDES
) -> Composites:
    """So many images, the same for the same seed.

    Args:
        pieces: Of one split.
        count: How many images.
        seed: Of all that is drawn.
        num_pieces: Fewest and most in an image. Boxes do not overlap: a piece that finds no room is left out.
        sides: Smallest and largest side of a piece, in pixels, before its empty border is cut off.
    """
    draw = np.random.default_rng(seed)
    by_label = {label: np.flatnonzero(np.array(pieces.labels) == label) for label in range(1, len(CLASSES))}
    images, masks, boxes, labels = [], [], [], []
    for _ in range(count):
        image = _background(pieces.photos, draw)
        mask = torch.zeros(SIZE, SIZE, dtype=torch.int64)
        placed: list[tuple[int, int, int, int]] = []
        names: list[int] = []
        for _ in range(draw.integers(num_pieces[0], num_pieces[1], endpoint=True)):
            label = int(draw.integers(1, len(CLASSES)))
            thing = pieces.things[draw.choice(by_label[label])]
            colours, inside = _cut_out(thing, sides, draw)
            box = _find_room(inside, placed, draw)
            if box is None:
                continue
            x0, y0, x1, y1 = box
            image[:, y0:y1, x0:x1] = torch.where(inside, colours, image[:, y0:y1, x0:x1])
            mask[y0:y1, x0:x1] = torch.where(inside, label, mask[y0:y1, x0:x1])
            placed.append(box)
            names.append(label)
        images.append(image.round().byte())
        masks.append(mask)
        boxes.append(torch.tensor(placed, dtype=torch.float32))
        labels.append(torch.tensor(names))
    return Composites(torch.stack(images), torch.stack(masks), boxes, labels)


def _background(photos: Sequence[Tensor], draw: np.random.Generator) -> Tensor:
    """A square of a photograph, between 64 pixels a side and 256, (3, 64, 64), float32 in [0, 255]."""
    photo = photos[int(draw.integers(len(photos)))]
    side = int(draw.integers(SIZE, 256, endpoint=True))
    top, left = (int(draw.integers(length - side, endpoint=True)) for length in photo.shape[1:])
    crop = resize(photo[None, :, top : top + side, left : left + side], (SIZE, SIZE))[0]
    return crop.flip(-1) if draw.random() < 0.5 else crop


def _cut_out(thing: Tensor, sides: tuple[int, int], draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A piece in a colour, (3, h, w) in [0, 255], and where it is, (h, w) bool: no empty row or column at its edge."""
    side = int(draw.integers(*sides, endpoint=True))
    values = resize(255 * thing[None, None], (side, side))[0, 0]
    inside = torch.from_numpy(binary_fill_holes((values > THRESHOLD * values.max()).numpy()))
    rows, columns = (inside.any(dim).nonzero().flatten() for dim in (1, 0))
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    tint = torch.from_numpy(draw.uniform(0.3, 1.0, 3)).float()
    return values[window].clamp(0, 255) * tint[:, None, None], inside[window]


def _find_room(
    inside: Tensor, placed: Sequence[tuple[int, int, int, int]], draw: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """A box for a piece that meets no other; None where none is found."""
    height, width = inside.shape
    for _ in range(NUM_TRIES):
        x, y = (int(draw.integers(SIZE - length, endpoint=True)) for length in (width, height))
        box = (x, y, x + width, y + height)
        if all(box[2] <= x0 or x1 <= box[0] or box[3] <= y0 or y1 <= box[1] for x0, y0, x1, y1 in placed):
            return box
    return None


def normalised(images: Tensor) -> Tensor:
    """(n, 3, 64, 64), uint8 -> float32, about -1 .. 1."""
    return images / 127.5 - 1
