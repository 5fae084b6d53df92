"""RMT (Fan et al. 2024) as settings of SDTH: constant decay, rotary embedding along the raster, no output gate."""

from typing_extensions import Unpack

from spatial_decay.layers import kinds
from spatial_decay.models.registry import register
from spatial_decay.models.sdt_h import IMAGES, SDTH, SIZES, SDTHOptions

__all__ = ["rmt_base", "rmt_large", "rmt_small", "rmt_tiny"]


def _rmt(*heads_ranges: float, num_decomposed: int = 3) -> SDTHOptions:
    """Rows and columns in the first stages, the whole grid in the others."""
    decay = [
        (kinds.FixedDecomposed if i < num_decomposed else kinds.Fixed)(heads_range=heads_range)
        for i, heads_range in enumerate(heads_ranges)
    ]
    return {"decay": decay, "rope": "flat", "gate_rank": 0}


@register(SDTH, IMAGES)
def rmt_tiny(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[SDTHOptions]) -> SDTH:
    """RMT-T (the authors' RMT_T3): 14.33 million parameters.

    Args:
        num_classes: Of the classifier; 0 for none.
        in_chans: Channels of the images.
        overrides: Other arguments of SDTH.

    Returns:
        An SDTH, with its first weights.
    """
    return SDTH(num_classes, in_chans, **(SIZES["tiny"] | _rmt(4, 4, 6, 6, num_decomposed=2) | overrides))


@register(SDTH, IMAGES)
def rmt_small(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[SDTHOptions]) -> SDTH:
    """RMT-S: 26.97 million parameters.

    Args:
        num_classes: Of the classifier; 0 for none.
        in_chans: Channels of the images.
        overrides: Other arguments of SDTH.

    Returns:
        An SDTH, with its first weights.
    """
    return SDTH(num_classes, in_chans, **(SIZES["small"] | _rmt(4, 4, 6, 6) | overrides))


@register(SDTH, IMAGES)
def rmt_base(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[SDTHOptions]) -> SDTH:
    """RMT-B (the authors' RMT_M2): 54.15 million parameters.

    Args:
        num_classes: Of the classifier; 0 for none.
        in_chans: Channels of the images.
        overrides: Other arguments of SDTH.

    Returns:
        An SDTH, with its first weights.
    """
    return SDTH(num_classes, in_chans, **(SIZES["base"] | _rmt(5, 5, 6, 6) | overrides))


@register(SDTH, IMAGES)
def rmt_large(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[SDTHOptions]) -> SDTH:
    """RMT-L (the authors' RMT_L6): 95.46 million parameters.

    Args:
        num_classes: Of the classifier; 0 for none.
        in_chans: Channels of the images.
        overrides: Other arguments of SDTH.

    Returns:
        An SDTH, with its first weights.
    """
    return SDTH(num_classes, in_chans, **(SIZES["large"] | _rmt(6, 6, 6, 6) | overrides))
