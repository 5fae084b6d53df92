"""RMT (Fan et al. 2024) as settings of SDTH: constant decay, rotary embedding along the raster, no output gate."""

from typing_extensions import Unpack

from spatial_decay.layers import kinds
from spatial_decay.models.sdt_h import SDTH, SDTHOptions

__all__ = ["rmt_base", "rmt_large", "rmt_small", "rmt_tiny"]


def _decay(*heads_ranges: float, whole_from: int = 3) -> tuple[kinds.Kind, ...]:
    """Rows and columns in the first stages, the whole grid from one on."""
    return tuple(
        (kinds.Fixed if i >= whole_from else kinds.FixedDecomposed)(heads_range=heads_range)
        for i, heads_range in enumerate(heads_ranges)
    )


_RMT: SDTHOptions = {
    "decay": _decay(4, 4, 6, 6),
    "rope": "flat",
    "gate_rank": 0,
}
_TINY: SDTHOptions = _RMT | {
    "embed_dims": (64, 128, 256, 512),
    "depths": (2, 2, 8, 2),
    "num_heads": (4, 4, 8, 16),
    "mlp_ratios": (3, 3, 3, 3),
    "decay": _decay(4, 4, 6, 6, whole_from=2),
    "drop_path_rate": 0.1,
}
_SMALL: SDTHOptions = _RMT | {
    "embed_dims": (64, 128, 256, 512),
    "depths": (3, 4, 18, 4),
    "num_heads": (4, 4, 8, 16),
    "mlp_ratios": (4, 4, 3, 3),
    "drop_path_rate": 0.15,
}
_BASE: SDTHOptions = _RMT | {
    "embed_dims": (80, 160, 320, 512),
    "depths": (4, 8, 25, 8),
    "num_heads": (5, 5, 10, 16),
    "mlp_ratios": (4, 4, 3, 3),
    "decay": _decay(5, 5, 6, 6),
    "init_values": (None, None, 1e-6, 1e-6),
    "drop_path_rate": 0.4,
}
_LARGE: SDTHOptions = _BASE | {
    "embed_dims": (112, 224, 448, 640),
    "num_heads": (7, 7, 14, 20),
    "decay": _decay(6, 6, 6, 6),
    "drop_path_rate": 0.5,
}


def rmt_tiny(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[SDTHOptions]) -> SDTH:
    """RMT-T (the authors' RMT_T3): 14.33 million parameters; overrides are SDTH's keywords."""
    return SDTH(num_classes, in_chans, **(_TINY | overrides))


def rmt_small(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[SDTHOptions]) -> SDTH:
    """RMT-S: 26.97 million parameters; overrides are SDTH's keywords."""
    return SDTH(num_classes, in_chans, **(_SMALL | overrides))


def rmt_base(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[SDTHOptions]) -> SDTH:
    """RMT-B (the authors' RMT_M2): 54.15 million parameters; overrides are SDTH's keywords."""
    return SDTH(num_classes, in_chans, **(_BASE | overrides))


def rmt_large(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[SDTHOptions]) -> SDTH:
    """RMT-L (the authors' RMT_L6): 95.46 million parameters; overrides are SDTH's keywords."""
    return SDTH(num_classes, in_chans, **(_LARGE | overrides))
