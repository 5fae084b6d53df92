"""The assembled backbones."""

from spatial_decay.models.registry import list_models
from spatial_decay.models.rmt import rmt_base, rmt_large, rmt_small, rmt_tiny
from spatial_decay.models.sdt_h import SDTH, sdt_h_base, sdt_h_small, sdt_h_tiny
from spatial_decay.models.sdt_p import SDTP, sdt_p_base, sdt_p_large, sdt_p_small, sdt_p_xlarge
from spatial_decay.models.vit import ViT, locatvit_base, locatvit_small, locatvit_tiny

__all__ = [
    "SDTH",
    "SDTP",
    "ViT",
    "list_models",
    "locatvit_base",
    "locatvit_small",
    "locatvit_tiny",
    "rmt_base",
    "rmt_large",
    "rmt_small",
    "rmt_tiny",
    "sdt_h_base",
    "sdt_h_small",
    "sdt_h_tiny",
    "sdt_p_base",
    "sdt_p_large",
    "sdt_p_small",
    "sdt_p_xlarge",
]
