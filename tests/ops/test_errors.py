"""Bad input to decay_attention gets an error that says what must hold, what came, and what to do."""

import pytest
import torch

from spatial_decay.decay import AxialDecay, ManhattanDecay
from spatial_decay.layout import Grid
from spatial_decay.ops import attention_weights, decay_attention


def good():
    q, k, v = torch.randn(3, 2, 4, 12, 8)
    return {"q": q, "k": k, "v": v, "decay": ManhattanDecay(-torch.rand(2, 4, 12), Grid(3, 4))}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            lambda a: {"q": a["q"].int(), "k": a["k"].int(), "v": a["v"].int()},
            TypeError,
            "floating point: got torch.int32",
        ),
        (lambda a: {"q": a["q"][0]}, ValueError, r"q must be \(B, N, L, d\): got shape \(4, 12, 8\)"),
        (lambda a: {"k": a["k"][:, :, :6]}, ValueError, r"same shape: got q \(2, 4, 12, 8\) and k \(2, 4, 6, 8\)"),
        (lambda a: {"v": a["v"].double()}, ValueError, "same dtype: got q torch.float32 and v torch.float64"),
        (lambda a: {"v": a["v"].to("meta")}, ValueError, "same device: got q cpu and v meta"),
        (
            lambda a: {"decay": torch.zeros(12, 12)},
            TypeError,
            "decay must be a description, .*: got Tensor. .* as attn_mask",
        ),
        (
            lambda a: {"backend": "cuda"},
            ValueError,
            "backend must be 'auto' or one of triton, .*: got 'cuda'",
        ),
        (lambda a: {"dropout_p": 1.0}, ValueError, r"0 <= dropout_p < 1: got 1.0"),
        (
            lambda a: {"decay": ManhattanDecay(-torch.rand(2, 4, 9), Grid(3, 3))},
            ValueError,
            "must have the L = 12 tokens of q: got a grid of 3 x 3 patches behind 0 prefix tokens, 9 tokens",
        ),
        (
            lambda a: {"decay": ManhattanDecay(-torch.rand(2, 3, 12), Grid(3, 4))},
            ValueError,
            r"must have shape \(2, 4, 12\), or 1 in place of 2: got \(2, 3, 12\)",
        ),
        (
            lambda a: {"decay": AxialDecay.constant(*-torch.rand(2, 3), Grid(3, 4))},
            ValueError,
            r"decay.rows must have shape \(6, 4, 4\), or 1 in place of 6: got \(1, 3, 4\)",
        ),
        (
            lambda a: {"decay": ManhattanDecay(torch.empty(2, 4, 12, device="meta"), Grid(3, 4))},
            ValueError,
            "decay must be on the device of q: got meta and cpu",
        ),
        (
            lambda a: {"attn_mask": torch.ones(2, 12, dtype=torch.bool)},
            ValueError,
            r"broadcast to \(B, N, L, L\) = \(2, 4, 12, 12\): got shape \(2, 12\).*attn_mask\[:, None, None, :\]",
        ),
        (lambda a: {"attn_mask": torch.zeros(1, 2, 4, 12, 12)}, ValueError, "broadcast to"),
        (
            lambda a: {"attn_mask": torch.ones(12, 12, dtype=torch.int64)},
            TypeError,
            "bool .* or floating point .*: got torch.int64",
        ),
        (lambda a: {"attn_mask": torch.zeros(12, 12, device="meta")}, ValueError, "device of q: got meta and cpu"),
    ],
)
def test_error(change, error, says):
    arguments = good()
    arguments.update(change(arguments))
    with pytest.raises(error, match=says):
        decay_attention(**arguments)


def test_attention_weights_check_too():
    arguments = good()
    with pytest.raises(ValueError, match="same dtype"):
        attention_weights(arguments["q"], arguments["k"].double(), arguments["decay"])
