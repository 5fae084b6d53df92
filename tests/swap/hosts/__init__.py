"""One table of other people's models, a file a library. A new one adds a row there and inherits every check."""

from tests.swap.hosts import diffusers, open_clip, timm, torchvision, transformers, vit_pytorch
from tests.swap.hosts.model import STRONG, HostModel, InFloat64, full_masks, pickled, traces
from tests.swap.hosts.open_clip import open_clip_model
from tests.swap.hosts.timm import SMALL
from tests.swap.hosts.transformers import HF

__all__ = [
    "HF",
    "HOSTS",
    "SMALL",
    "STRONG",
    "HostModel",
    "InFloat64",
    "full_masks",
    "open_clip_model",
    "pickled",
    "traces",
]

HOSTS = [
    *timm.HOSTS,
    *transformers.HOSTS,
    *diffusers.HOSTS,
    *torchvision.HOSTS,
    *open_clip.HOSTS,
    *vit_pytorch.HOSTS,
]
