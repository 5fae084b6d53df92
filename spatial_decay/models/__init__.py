"""The assembled backbones."""

from spatial_decay.models.sdt_h import SDTH, SDTHOptions, sdt_h_base, sdt_h_small, sdt_h_tiny

__all__ = ["SDTH", "SDTHOptions", "sdt_h_base", "sdt_h_small", "sdt_h_tiny"]
