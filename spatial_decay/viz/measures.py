"""Numbers of recorded attention: how far it reaches (d_M of SDT Eq. 7), and what its gates say (Eq. 4-5)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spatial_decay.decay import AxialDecay
from spatial_decay.precision import at_least_float32
from spatial_decay.viz.records import LayerRecord

__all__ = ["attention_distance", "gate_statistics", "reach"]


def reach(layer: LayerRecord, share: float = 0.5) -> Tensor:
    """Within how many grid steps a share of each query's attention lies.

    Distances are those of the decay, d_M = |h_i - h_j| + |w_i - w_j| (SDT Eq. 7). What a query gives to prefix tokens
    does not count. Between two whole steps the share is taken to grow evenly, so that the map is smooth.

    Args:
        layer: From record. Of `layer.without_decay()` it is the reach of the scores, of `layer.decay_alone()` that of
            the decay.
        share: 0 < share < 1. 0.5: half of the attention lies nearer, half farther.

    Returns:
        (B, N, H, W), grid steps; nan for a query that attends to no patch.

    Raises:
        ValueError: share is out of range.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share must satisfy 0 < share < 1: got {share}. Half of the attention is share=0.5.")
    steps = [_steps_to(weights, distances, share) for weights, distances in _of_all_queries(layer)]
    return torch.cat(steps, 2).unflatten(2, layer.layout.size)


def _steps_to(weights: Tensor, distances: Tensor, share: float) -> Tensor:
    """Of queries (B, N, Q, H*W), and of the distances (Q, H*W), whole numbers."""
    counts = weights.new_zeros(*weights.shape[:-1], int(distances.max()) + 1)
    given = counts.scatter_add_(-1, distances.long().expand_as(weights), weights)
    nearer = given.cumsum(-1)  # what lies within 0, 1, ... steps
    last = nearer.shape[-1] - 1
    step = (nearer < share).sum(-1, keepdim=True).clamp(max=last)
    within = nearer.gather(-1, step)
    before = torch.where(step > 0, nearer.gather(-1, (step - 1).clamp(min=0)), 0.0)
    part = torch.where(step > 0, (share - before) / (within - before), 1.0)
    return (step - 1 + part).clamp(0, last).masked_fill(within.isnan(), float("nan")).squeeze(-1)


def attention_distance(layer: LayerRecord) -> Tensor:
    """How far the patches are that attention takes from, weighted by what it takes, as a mean over all queries.

    Args:
        layer: From record. Distances and prefix tokens as in reach.

    Returns:
        (B, N), grid steps.
    """
    means = [(weights * distances).sum(-1) for weights, distances in _of_all_queries(layer)]
    return torch.cat(means, -1).nanmean(-1)


def gate_statistics(layers: Sequence[LayerRecord]) -> dict[str, float]:
    """Scalars of every gate, for a logger that takes a name and a number: TensorBoard, a table, a line of text.

    Args:
        layers: From record.

    Returns:
        "layer/gate/statistic" -> value, in nats per grid step. `mean`, `min` and `max` are over images, heads and
        tokens. `std_tokens` says how much the tokens of an image differ, which is what content decides; `std_heads`
        says how much the means of the heads differ. Empty for kinds without gates. Where a layer was called more than
        once, its name has the number of the call behind it, as in "blocks.0.attn#2".

    Examples:
        >>> from spatial_decay.viz import record
        >>> attn = SpatialDecayAttention(64, 2)
        >>> [name for name in gate_statistics(record(attn, torch.randn(1, 9, 64)))][:2]
        ['SpatialDecayAttention/gate/mean', 'SpatialDecayAttention/gate/min']
    """
    statistics: dict[str, float] = {}
    calls = dict.fromkeys((layer.name for layer in layers), 0)
    for layer in layers:
        calls[layer.name] += 1
        name = layer.name if calls[layer.name] == 1 else f"{layer.name}#{calls[layer.name]}"
        for gate_name, gate in layer.gates().items():
            tokens = at_least_float32(gate).flatten(2)  # (B, N, H * W)
            values = {
                "mean": tokens.mean(),
                "min": tokens.min(),
                "max": tokens.max(),
                "std_tokens": tokens.std(-1, correction=0).mean(),
                "std_heads": tokens.mean((0, 2)).std(correction=0),
            }
            statistics |= {f"{name}/{gate_name}/{key}": value.item() for key, value in values.items()}
    return statistics


_NUM_WEIGHTS = 1 << 22
"""So many weights are computed together: they stay near the cache, and fit into memory for any grid."""


def _of_all_queries(layer: LayerRecord) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries in turn: their weights as parts of what they give to patches, (B, N, Q, H*W), and distances, (Q, H*W)."""
    grid, (num_images, num_heads) = layer.layout, layer.q.shape[:2]
    down, along = grid.steps(device=layer.q.device, dtype=torch.float32)  # (H*W, H, 1), (H*W, 1, W)
    count = grid.num_patches
    if not isinstance(layer.added, AxialDecay):  # which computes all of them anyhow
        count = max(1, _NUM_WEIGHTS // (num_images * num_heads * grid.num_tokens))
    for numbers in torch.arange(grid.num_patches).split(count):
        weights = layer.weights(numbers + grid.num_prefix_tokens)[..., grid.num_prefix_tokens :]
        yield weights / weights.sum(-1, keepdim=True), (down[numbers].abs() + along[numbers].abs()).flatten(1)
