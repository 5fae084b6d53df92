"""Measures of attention: reach and distance against loops and by hand; statistics of gates as plain numbers."""

import math

import pytest
import torch
from torch import nn

from spatial_decay import SpatialDecayAttention, viz
from spatial_decay.viz import measures
from tests.viz.backbone import DIM, HEADS, SIZE, make


def by_distance(attention, h, w):
    """What a query at (h, w) gives to patches at each distance, by loops."""
    given = [0.0] * sum(SIZE)
    for g in range(SIZE[0]):
        for u in range(SIZE[1]):
            given[abs(g - h) + abs(u - w)] += attention[g][u]
    total = sum(given)
    return [part / total for part in given]


def reach_of(given, share):
    within = 0.0
    for distance, part in enumerate(given):
        if within + part >= share:
            return max(0.0, distance - 1 + (share - within) / part) if distance else 0.0
        within += part
    raise AssertionError


@pytest.mark.parametrize(("kind", "num_prefix"), [("full", 0), ("full", 2), ("1d", 1), ("decomposed", 0), ("none", 0)])
def test_reach_and_distance_are_those_of_loops(kind, num_prefix, monkeypatch):
    monkeypatch.setattr(measures, "_NUM_WEIGHTS", 5 * 2 * HEADS * 14)  # parts that do not come out even
    model, images = make(kind, num_prefix)
    layer = viz.record(model, images)[1]
    half, most, distance = viz.reach(layer), viz.reach(layer, 0.9), viz.attention_distance(layer)
    assert half.shape == most.shape == (2, HEADS, *SIZE)
    assert distance.shape == (2, HEADS)
    mean = torch.zeros(2, HEADS, dtype=torch.float64)
    for h in range(SIZE[0]):
        for w in range(SIZE[1]):
            attention = layer.attention((h, w)).tolist()
            for b in range(2):
                for n in range(HEADS):
                    given = by_distance(attention[b][n], h, w)
                    assert half[b, n, h, w].item() == pytest.approx(reach_of(given, 0.5))
                    assert most[b, n, h, w].item() == pytest.approx(reach_of(given, 0.9))
                    mean[b, n] += sum(d * part for d, part in enumerate(given)) / 12
    torch.testing.assert_close(distance, mean)


def test_reach_by_hand():
    layer = viz.record(SpatialDecayAttention(DIM, 1, decay="none"), torch.randn(1, 1, 3, DIM))[0].decay_alone()
    # A third of the attention to each of three patches: half of it is one sixth behind the first third.
    torch.testing.assert_close(viz.reach(layer)[0, 0, 0], torch.tensor([0.5, 0.25, 0.5]))
    torch.testing.assert_close(viz.reach(layer, 0.2)[0, 0, 0], torch.zeros(3))  # it lies on the patch itself
    torch.testing.assert_close(viz.attention_distance(layer), torch.tensor([[8 / 9]]))


def test_a_query_that_attends_to_nothing():
    model, images = make("full")
    may_attend = torch.ones(12, 12, dtype=torch.bool)
    may_attend[3] = False
    layer = viz.record(model, images, attn_mask=may_attend)[1]
    assert viz.reach(layer).isnan().flatten(2).any((0, 1)).tolist() == [i == 3 for i in range(12)]
    assert viz.attention_distance(layer).isfinite().all()


@pytest.mark.parametrize("share", [0.0, 1.0, -1, 50])
def test_a_share_that_is_none(share):
    model, images = make("full")
    with pytest.raises(ValueError, match="0 < share < 1"):
        viz.reach(viz.record(model, images)[0], share)


def test_statistics_of_gates():
    model, images = make("decomposed")
    layers = viz.record(model, images)
    statistics = viz.gate_statistics(layers)
    assert len(statistics) == 2 * 2 * 5
    assert all(type(value) is float and math.isfinite(value) for value in statistics.values())
    gate = layers[1].gates()["gate_h"]
    assert statistics["second/gate_h/mean"] == pytest.approx(gate.mean().item())
    assert statistics["second/gate_h/min"] == gate.min().item()
    assert statistics["second/gate_h/max"] == gate.max().item()
    of_tokens = gate.flatten(2).std(-1, correction=0).mean()
    assert statistics["second/gate_h/std_tokens"] == pytest.approx(of_tokens.item())
    assert statistics["second/gate_h/std_heads"] == pytest.approx(gate.mean((0, 2, 3)).std(correction=0).item())


def test_statistics_of_a_layer_that_is_called_twice_and_of_none():
    attn = SpatialDecayAttention(DIM, HEADS)
    names = list(viz.gate_statistics(viz.record(nn.Sequential(attn, attn), torch.randn(1, 4, DIM))))
    assert [names[0], names[5]] == ["0/gate/mean", "0#2/gate/mean"]
    assert (
        viz.gate_statistics(viz.record(SpatialDecayAttention(DIM, HEADS, decay="none"), torch.randn(1, 4, DIM))) == {}
    )
