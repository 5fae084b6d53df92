"""open_clip's image towers."""

from typing import Any

import open_clip
from torch import nn

from tests.swap.hosts.model import HostModel


def open_clip_model(cls: type[nn.Module] = open_clip.CLIP, text: Any = None, **vision: Any) -> nn.Module:
    """Of two towers."""
    given = {"image_size": (64, 96), "patch_size": 16, "width": 48, "head_width": 16, "layers": 2}
    given_text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2}
    return cls(24, vision_cfg=given | vision, text_cfg=given_text | (text or {}))


def _open_clip(name: str, **vision: Any) -> HostModel:
    return HostModel(
        f"open_clip {name}",
        lambda: open_clip_model(**vision),
        lambda model, x: model.encode_image(x),
        1,
        sizes=(vision.get("image_size", (64, 96)),),  # it takes no other
        left=("transformer.resblocks.0.attn", "transformer.resblocks.1.attn"),
        has_checkpointing="qk_norm" not in vision,  # open_clip hands its custom blocks too many arguments
    )


HOSTS = [
    _open_clip("CLIP"),
    _open_clip("CLIP with custom blocks", image_size=(64, 64), qk_norm=True, scale_heads=True, scale_attn_inner=True),
]
