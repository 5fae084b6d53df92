"""The one list of backbones: a builder registers itself by a decorator; list_models, timm and the Hub read it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from spatial_decay.models.common import Model

__all__ = ["ENTRIES", "IMAGENET", "Entry", "ImageSettings", "list_models", "register"]

Build = TypeVar("Build", bound=Callable[..., Model])


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """What is to be known of a classifier of images, beside what its model says of itself.

    Args:
        first_conv: Name of the convolution that reads the image.
        crop_pct: Side of the image over that to which it is resized first, in evaluation.
        mean: Of the channels.
        std: Of the channels.
        pool_size: (H, W) of the last map for images of 224 x 224; None: it gives tokens.
        num_maps: So many feature maps, the last ones, where nobody says how many (timm's features_only); None: all.
    """

    first_conv: str
    crop_pct: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pool_size: tuple[int, int] | None = None
    num_maps: int | None = None


@dataclass(frozen=True)
class Entry:
    """A backbone.

    Args:
        build: Its builder.
        model: The class that it builds.
        images: None where it is no classifier of images.
    """

    build: Callable[..., Model]
    model: type[Model]
    images: ImageSettings | None

    @property
    def name(self) -> str:
        """Of the builder."""
        return self.build.__name__


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's channels."""

_ENTRIES: dict[str, Entry] = {}

ENTRIES: Mapping[str, Entry] = MappingProxyType(_ENTRIES)
"""All backbones, by the name of their builder."""


def register(model: type[Model], images: ImageSettings | None = None) -> Callable[[Build], Build]:
    """Decorator for the builder of a backbone: see Entry for the arguments."""

    def add(build: Build) -> Build:
        assert build.__name__ not in _ENTRIES, f"two backbones have the name {build.__name__}"
        _ENTRIES[build.__name__] = Entry(build, model, images)
        return build

    return add


def list_models() -> list[str]:
    """Names of the backbones' builders, sorted; each is a function of spatial_decay.models.

    Returns:
        For instance "sdt_h_tiny".
    """
    return sorted(_ENTRIES)
