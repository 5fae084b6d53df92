"""Spatial decay in models that someone already has."""

from spatial_decay.swap.hosts.register import register_attention
from spatial_decay.swap.report import SwapReport
from spatial_decay.swap.saved import load_swapped, save_swapped
from spatial_decay.swap.stand_in import StandIn
from spatial_decay.swap.swap import restore_attention, swap_attention

__all__ = [
    "StandIn",
    "SwapReport",
    "load_swapped",
    "register_attention",
    "restore_attention",
    "save_swapped",
    "swap_attention",
]
