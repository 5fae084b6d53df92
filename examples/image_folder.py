"""Small labelled images for the examples: the four files of Fashion-MNIST, or folders of images, all checked when read.

train-images-idx3-ubyte  train-labels-idx1-ubyte  t10k-images-idx3-ubyte  t10k-labels-idx1-ubyte

each with or without .gz, in the folder itself or in FashionMNIST/raw below it, where
torchvision.datasets.FashionMNIST(folder, download=True) puts them; the Debian package dataset-fashion-mnist has them
too. Or one folder for each class, as torchvision's ImageFolder reads it:

train/CLASS/NAME.png  test/CLASS/NAME.png    (val/ does for test/; an image may lie in a folder below CLASS)

What is transparent becomes white. Images of more than 8 bits a channel are refused: nothing says which value is white.
"""

import gzip
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")  # Pillow's, of 8 bits a channel or less
NUM_NAMED = 5  # files in an error


class DataError(ValueError):
    """A folder that cannot be trained on."""


@dataclass(frozen=True)
class Images:
    """Part of a data set."""

    pixels: Tensor  # (n, C, size, size), uint8
    labels: Tensor  # (n,), int64

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Images":
        """The first so many, or all: they are in a random order that is always the same."""
        return Images(self.pixels[:count], self.labels[:count])

    def to(self, device: torch.device) -> "Images":
        """On another device."""
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class LabelledImages:
    """Training and test images, and how many classes there are."""

    train: Images
    test: Images
    num_classes: int

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.train.pixels.device

    def to(self, device: torch.device) -> "LabelledImages":
        """On another device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    @cached_property
    def mean_std(self) -> tuple[float, float]:
        """Of the training images' values in [0, 1], over all pixels and channels."""
        counts = torch.bincount(self.train.pixels.flatten(), minlength=256).double().cpu()
        values = torch.arange(256).double() / 255
        mean = (counts @ values / counts.sum()).item()
        return mean, (counts @ (values - mean).square() / counts.sum()).sqrt().item()

    @cached_property
    def fingerprint(self) -> str:
        """Tells one data set from another."""
        crc = checksum(self.train.pixels, self.train.labels, self.test.pixels, self.test.labels)
        return f"{len(self.train)}+{len(self.test)} images, {crc}"


def checksum(*tensors: Tensor) -> str:
    """Of their values, one after the other."""
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.cpu().numpy().tobytes(), crc)
    return f"CRC {crc:08x}"


def load(folder: Path, size: int) -> LabelledImages:
    """Read a folder; images of another size are resized by their shorter side, and cut to the square in their middle.

    Args:
        folder: As this file says at its top.
        size: Side of the images, in pixels.

    Raises:
        DataError: no images, broken ones, labels that do not fit; the message names them.
    """
    for place in (folder, folder / "FashionMNIST" / "raw"):
        if any(place.glob("train-images-idx3-ubyte*")):
            parts = [_read_idx_pair(place, name, size) for name in ("train", "t10k")]
            return _finish(parts[0], parts[1], num_classes=int(parts[0].labels.max()) + 1)
    if (folder / "train").is_dir():
        return _read_class_folders(folder, size)
    raise DataError(
        f"{folder} must hold Fashion-MNIST (train-images-idx3-ubyte.gz and three more) or train/CLASS/NAME.png: got "
        f"{'none of these' if folder.is_dir() else 'no such folder'}. "
        'Get them by torchvision.datasets.FashionMNIST("data", download=True), and pass --data data.'
    )


def _finish(train: Images, test: Images, *, num_classes: int) -> LabelledImages:
    """In an order that mixes the classes, the same for every run."""
    if beyond := int((test.labels >= num_classes).sum()):
        raise DataError(f"test labels must be below {num_classes}, as those for training are: {beyond} are not.")
    if train.pixels.min() == train.pixels.max():
        raise DataError(
            f"training images must show something: got {int(train.pixels.min())} in every pixel of all {len(train)}. "
            "Look at the files."
        )
    mixed = []
    for part in (train, test):
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
        mixed.append(Images(part.pixels[order].contiguous(), part.labels[order]))
    return LabelledImages(mixed[0], mixed[1], num_classes)


def _read_idx_pair(folder: Path, name: str, size: int) -> Images:
    images = _read_idx(folder, f"{name}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{name}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or not len(labels):
        raise DataError(
            f"{folder} must hold as many labels as images, at least one: got {len(images)} images and {len(labels)} "
            f"labels in {name}-*."
        )
    return Images(_to_square(images[:, None], size), labels.long())


def _read_idx(folder: Path, name: str, num_dims: int) -> Tensor:
    """The IDX format: 0, 0, 8 (bytes), dimensions, the size of each (big endian), the bytes."""
    paths = [path for path in (folder / f"{name}.gz", folder / name) if path.is_file()]
    if not paths:
        raise DataError(f"{folder} must hold all four files of Fashion-MNIST: {name}, with or without .gz, is missing.")
    path = paths[0]
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:4] != bytes([0, 0, 8, num_dims]):
            raise ValueError(f"it begins with {content[:4].hex(' ')}, not with 00 00 08 {num_dims:02x}")
        start = 4 + 4 * num_dims
        shape = np.frombuffer(content[4:start], ">i4").tolist()
        if len(content) - start != np.prod(shape):
            raise ValueError(f"{len(content) - start} bytes for shape {tuple(shape)}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} must be a whole IDX file of bytes: {error}. Get it anew.") from error
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).view(shape)


def _read_class_folders(folder: Path, size: int) -> LabelledImages:
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if test is None:
        raise DataError(f"{folder} must hold test/CLASS/NAME.png (or val/) beside train/: got neither.")
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if others := sorted({path.name for path in test.iterdir() if path.is_dir()} ^ set(classes)):
        raise DataError(f"{test} must have the classes of train/: {', '.join(others[:NUM_NAMED])} are in one only.")
    if len(classes) < 2:
        raise DataError(f"{folder / 'train'} must have a folder for each of two classes or more: got {len(classes)}.")
    files = {part: [_image_files(part / name) for name in classes] for part in (folder / "train", test)}
    broken, is_grey = _look(path for lists in files.values() for paths in lists for path in paths)
    if broken:
        rest = f" and {len(broken) - NUM_NAMED} more" if len(broken) > NUM_NAMED else ""
        raise DataError(
            f"images must be whole, and of mode {', '.join(MODES)}: got {'; '.join(broken[:NUM_NAMED])}{rest}. "
            "Convert or remove them."
        )
    parts = []
    for lists in files.values():
        pixels = torch.cat([_read_image(path, size, is_grey=is_grey) for paths in lists for path in paths])
        parts.append(Images(pixels, torch.arange(len(classes)).repeat_interleave(torch.tensor(list(map(len, lists))))))
    return _finish(parts[0], parts[1], num_classes=len(classes))


def _image_files(folder: Path) -> list[Path]:
    paths = (Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    files = sorted(path for path in paths if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{folder} must hold images ({', '.join(SUFFIXES)}): got none.")
    return files


def _look(paths: Iterable[Path]) -> tuple[list[str], bool]:
    """Names of images that cannot be taken, with the reason, and whether all others are grey."""
    modes: set[str] = set()
    faults = [_fault(path, modes) for path in paths]
    return [fault for fault in faults if fault], modes <= {"1", "L", "LA"}


def _fault(path: Path, modes: set[str]) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode not in MODES:
                raise ValueError(f"mode {image.mode}")
            modes.add(image.mode)
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:  # Pillow's
        return f"{path} ({error})"
    return None


def _read_image(path: Path, size: int, *, is_grey: bool) -> Tensor:
    """(1, C, size, size)."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(_on_white(image).convert("L" if is_grey else "RGB")))
    return _to_square(pixels.view(*pixels.shape[:2], -1).permute(2, 0, 1)[None], size)


def _on_white(image: Image.Image) -> Image.Image:
    """Pillow's convert would leave what lies under the transparency, black as a rule."""
    if not image.mode.endswith("A") and "transparency" not in image.info:
        return image
    drawn = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn)


def _to_square(pixels: Tensor, size: int) -> Tensor:
    """(n, C, H, W) -> (n, C, size, size), uint8."""
    height, width = pixels.shape[2:]
    if (height, width) == (size, size):
        return pixels
    scale = size / min(height, width)
    height, width = max(size, round(height * scale)), max(size, round(width * scale))
    resized = resize(pixels, (height, width)).round().clamp(0, 255).byte()
    top, left = (height - size) // 2, (width - size) // 2
    return resized[:, :, top : top + size, left : left + size]


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, C, H, W) -> (n, C, *size), float32: bilinear, antialiased, corners not aligned."""
    return F.interpolate(pixels.float(), size, mode="bilinear", antialias=True, align_corners=False)
