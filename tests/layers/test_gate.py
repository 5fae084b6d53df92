"""The Context-Aware Gate against Eq. 4-5, and its precision."""

import pytest
import torch

from spatial_decay import ContextAwareGate
from tests import references


def test_equals_the_equations():
    gate = ContextAwareGate(5, 3).double()
    torch.nn.init.normal_(gate.weight)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    out = gate(x)
    assert out.shape == (2, 7, 3)
    for b in range(2):
        for n in range(3):
            expected = torch.tensor(references.gate(x[b].tolist(), gate.weight[n].tolist()), dtype=torch.float64)
            torch.testing.assert_close(out[b, :, n], expected, rtol=1e-12, atol=1e-12)


def test_is_never_positive_and_never_nan():
    gate = ContextAwareGate(1, 1)
    torch.nn.init.ones_(gate.weight)
    out = gate(torch.tensor([[-1e4], [-90.0], [0.0], [90.0], [1e4]]))
    assert out.isfinite().all()
    assert (out <= 0).all()


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_stays_in_float32(how):
    gate = ContextAwareGate(32, 4)
    x = torch.randn(2, 9, 32)
    if how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = gate(x)
        assert torch.equal(out, gate(x))
    else:
        gate, x = gate.bfloat16(), x.bfloat16()
        out = gate(x)
        torch.testing.assert_close(out, gate.float()(x.float()))
    assert out.dtype == torch.float32


def test_bias_sets_where_it_starts():
    gate = ContextAwareGate(8, 2, bias=True, bias_init=6.0)
    out = gate(torch.zeros(1, 8))
    torch.testing.assert_close(out, torch.full((1, 2), references.log_sigmoid(6.0)))


def test_float32_gates_on_a_half_precision_model():
    gate, x = ContextAwareGate(8, 2), torch.randn(1, 4, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(gate(x), gate(x.float()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.ones(1, 4, 8, dtype=torch.int64), TypeError, "floating point: got torch.int64"),
        (torch.ones(1, 4, 9), ValueError, r"must be dim = 8: got shape \(1, 4, 9\)"),
    ],
)
def test_impossible_input_is_refused(x, error, says):
    with pytest.raises(error, match=says):
        ContextAwareGate(8, 2)(x)


def test_no_heads_are_refused():
    with pytest.raises(ValueError, match="num_heads must be >= 1: got 0"):
        ContextAwareGate(8, 0)


def test_bias_init_without_bias_is_refused():
    with pytest.raises(ValueError, match="bias_init needs a bias: got bias_init=6.0 with bias=False"):
        ContextAwareGate(8, 2, bias_init=6.0)
