"""SpatialDecayAttention: all of Eq. 13 by loops, tokens and maps, precision, training of the gate, errors."""

import inspect

import pytest
import torch

from spatial_decay import SpatialDecayAttention, kinds
from spatial_decay.layers import AttentionOptions
from spatial_decay.layers.core import DecayAttention
from spatial_decay.layout import Grid
from spatial_decay.ops import sdpa
from tests import references
from tests.cases import (
    EXACT_BACKENDS,
    GATED,
    GATES_OF_KIND,
    TOLERANCE,
    case_id,
    reference_mask,
    reference_of_head,
    relative_error,
)

DIM, HEADS = 16, 2
AXIAL_KINDS = ("decomposed", "fixed_decomposed")


def make(kind="full", dim=DIM, heads=HEADS, **options):
    attn = SpatialDecayAttention(dim, heads, decay=kind, **options)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attn.eval()


def equation_13(attn, case, x, grid, rope):
    """O = U * [softmax(R(Q) R(K)^T / sqrt(d) + M) V + LPE(V)], projected; x (B, L, D), one loop at a time."""
    heads, d, (height, width), prefix = attn.num_heads, attn.head_dim, grid.size, grid.num_prefix_tokens
    gates = [
        torch.nn.functional.logsigmoid(x @ getattr(attn.decay, name).weight.T).transpose(1, 2)
        for name in GATES_OF_KIND[case.kind]
    ]
    masks = None if case.is_axial else reference_mask(case, gates, heads, grid)
    qkv = x @ attn.qkv.weight.T + attn.qkv.bias
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for n in range(heads):
            q, k, v = (qkv[b, :, part * attn.dim + n * d : part * attn.dim + (n + 1) * d].tolist() for part in range(3))
            if rope != "none":
                for i in range(prefix, len(q)):
                    h, w = divmod(i - prefix, width)
                    q[i], k[i] = (references.rotate(z, h, w, width, rope) for z in (q[i], k[i]))
            if masks is None:
                columns, rows = reference_of_head(case, gates, b, n, heads, grid)
                result = references.axial_attention(q, k, v, columns, rows, height, width, d**-0.5)
            else:
                result = references.attention(q, k, v, masks[b % masks.shape[0], n].tolist(), d**-0.5)
            out[b, :, n * d : (n + 1) * d] = torch.tensor(result, dtype=torch.float64)
        for channel in range(attn.dim):
            values = qkv[b, prefix:, 2 * attn.dim + channel].tolist()
            conv = attn.lpe.conv
            local = references.depthwise(
                values, conv.weight[channel, 0].tolist(), conv.bias[channel].item(), height, width
            )
            out[b, prefix:, channel] += torch.tensor(local, dtype=torch.float64)
        for i in range(x.shape[1]):
            u = references.output_gate(x[b, i].tolist(), attn.output_gate.down.tolist(), attn.output_gate.up.tolist())
            out[b, i] *= torch.tensor(u, dtype=torch.float64)
    return out @ attn.proj.weight.T + attn.proj.bias


@torch.no_grad()
@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("rope", ["axial", "flat", "none"])
@pytest.mark.parametrize("case", GATED, ids=case_id)
def test_equals_equation_13(case, rope, num_prefix):
    if case.is_axial and num_prefix:
        return  # refused, see test_mask
    grid = Grid(3, 4, num_prefix)
    attn = make(case.config, rope=rope, lpe_kernel_size=3, gate_rank=3, num_prefix_tokens=num_prefix).double()
    x = torch.randn(2, grid.num_tokens, DIM, dtype=torch.float64)
    expected = equation_13(attn, case, x, grid, rope)
    for backend in EXACT_BACKENDS:
        attn.attention = DecayAttention(backend)
        torch.testing.assert_close(attn(x, grid.size), expected, rtol=1e-12, atol=1e-12)


def test_a_backend_is_given_at_construction(monkeypatch):
    attn = make(backend="sdpa")
    assert attn.backend == "sdpa"
    with pytest.raises(AttributeError):
        attn.backend = "math"
    monkeypatch.setattr(sdpa, "attention", lambda inputs: pytest.fail("sdpa"))
    with pytest.raises(pytest.fail.Exception, match="sdpa"):
        attn(torch.randn(1, 2, 2, DIM))


@pytest.mark.parametrize("kind", list(kinds.KINDS))
def test_tokens_and_maps_are_the_same(kind):
    attn = make(kind).double()
    x = torch.randn(2, 3, 5, DIM, dtype=torch.float64)
    out = attn(x)
    assert out.shape == x.shape
    assert torch.equal(out.flatten(1, 2), attn(x.flatten(1, 2), (3, 5)))
    channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # another order in memory
    torch.testing.assert_close(attn(channels_first), out)


@pytest.mark.parametrize("kind", [kind for kind in kinds.KINDS if kind not in AXIAL_KINDS])
def test_a_square_is_inferred_behind_prefix_tokens(kind):
    attn = make(kind, num_prefix_tokens=5)
    x = torch.randn(2, 5 + 49, DIM)
    assert torch.equal(attn(x), attn(x, (7, 7)))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (14, 14)], ids=case_id)
@pytest.mark.parametrize("kind", list(kinds.KINDS))
def test_every_parameter_gets_a_gradient(kind, size):
    options = {"gate_bias": True, "gate_bias_init": 1.0} if "gate_bias" in kinds.KINDS[kind].options() else {}
    attn = make({"kind": kind, **options}, qk_norm=True).train()
    attn(torch.randn(2, *size, DIM)).square().sum().backward()
    for name, parameter in attn.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@pytest.mark.parametrize("kind", ["full", "1d", "bidirectional", "decomposed"])
def test_only_the_gate_trains(kind, backend):
    """Everything else frozen, input too: the gate's gradient is that of a model where all trains."""
    attn = make(kind, backend=backend).double()
    x = torch.randn(2, 3, 4, DIM, dtype=torch.float64)
    attn(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in attn.decay.named_parameters()}
    attn.zero_grad()
    attn.requires_grad_(False)
    attn.decay.requires_grad_(True)
    attn(x).square().sum().backward()
    assert expected
    for name, parameter in attn.decay.named_parameters():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected[name])
    assert attn.qkv.weight.grad is None


@pytest.mark.parametrize("kind", list(kinds.KINDS))
def test_under_autocast_sdpa_equals_math(kind):
    attn = make(kind, dim=64, heads=2)
    x = torch.randn(2, 7, 7, 64)
    results = {}
    for backend in ("sdpa", "math"):
        attn.attention = DecayAttention(backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results[backend] = attn(x)
        assert results[backend].dtype == torch.bfloat16
    assert relative_error(results["sdpa"], results["math"]) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize("kind", list(kinds.KINDS))
def test_runs_in_half_precision(kind, dtype):
    attn = make(kind).to(dtype)
    out = attn(torch.randn(2, 4, 6, DIM, dtype=dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_attn_mask_hides_tokens():
    attn = make(lpe_kernel_size=0)
    x = torch.randn(1, 4, 4, DIM)
    keys = torch.ones(16, dtype=torch.bool)
    keys[12:] = False
    changed = x.clone()
    changed[:, 3] += 1.0
    mask = keys[None, None, None]
    assert not torch.allclose(attn(x)[:, :3], attn(changed)[:, :3])
    torch.testing.assert_close(attn(x, attn_mask=mask)[:, :3], attn(changed, attn_mask=mask)[:, :3])


@pytest.mark.parametrize("kind", list(kinds.KINDS))
def test_attention_weights_are_those_of_forward(kind):
    attn = make(kind, lpe_kernel_size=0, gate_rank=0).double()
    x = torch.randn(2, 3, 4, DIM, dtype=torch.float64)
    values = attn.qkv(x.flatten(1, 2))[..., 2 * DIM :].unflatten(-1, (HEADS, -1)).transpose(1, 2)
    out = (attn.attention_weights(x) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attn.proj(out), attn(x).flatten(1, 2))


def test_parts_can_be_turned_off():
    attn = SpatialDecayAttention(DIM, HEADS, decay="none", rope="none", lpe_kernel_size=0, gate_rank=0, qkv_bias=False)
    assert {name for name, _ in attn.named_parameters()} == {"qkv.weight", "proj.weight", "proj.bias"}


def test_mixed_dtypes_and_devices_are_refused():
    attn = SpatialDecayAttention(DIM, HEADS)
    with pytest.raises(TypeError, match="dtype of the weights: got torch.float64, and weights in torch.float32"):
        attn(torch.randn(1, 4, DIM, dtype=torch.float64))
    with pytest.raises(ValueError, match="device of the weights: got meta, and weights on cpu"):
        attn(torch.empty(1, 4, DIM, device="meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attn(torch.randn(1, 4, DIM, dtype=torch.float16)).dtype == torch.bfloat16


def test_output_gate_starts_around_one_whatever_the_model_does_to_its_linear_layers():
    attn = SpatialDecayAttention(64, 4)
    attn.apply(lambda m: torch.nn.init.trunc_normal_(m.weight, std=0.02) if isinstance(m, torch.nn.Linear) else None)
    u = attn.output_gate(torch.randn(100, 64))
    assert (u - 1).abs().max() < 0.2


def test_dropout_only_in_training():
    attn = make(attn_drop=0.5, proj_drop=0.5)
    x = torch.randn(1, 4, 4, DIM)
    assert torch.equal(attn(x), attn(x))
    attn.train()
    assert not torch.equal(attn(x), attn(x))


def test_the_typed_options_are_the_keywords():
    signature = inspect.signature(SpatialDecayAttention).parameters
    assert set(AttentionOptions.__annotations__) == set(signature) - {
        "dim",
        "num_heads",
        # SDTBlock has these two as arguments of its own.
        "decay",
        "num_prefix_tokens",
    }


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"num_heads": 3}, ValueError, "dim must be a multiple of num_heads: got dim = 16, num_heads = 3"),
        ({"num_heads": 0}, ValueError, "dim must be a multiple of num_heads"),
        ({"num_heads": 8}, ValueError, "rope='axial' needs head_dim to be a multiple of 4: got head_dim = 2"),
        ({"num_heads": 16, "rope": "flat"}, ValueError, "rope='flat' needs head_dim to be a multiple of 2"),
        ({"decay": "gauss"}, ValueError, "one of full, fixed, .*: got 'gauss'"),
        ({"decay": "decomposed", "num_prefix_tokens": 1}, ValueError, "needs num_prefix_tokens = 0"),
        (
            {"backend": "flash"},
            ValueError,
            "one of triton, native, lowrank, tiled, sdpa, .*: got 'flash'",
        ),
        ({"lpe_kernel_size": 4}, ValueError, "must be odd and >= 1: got 4"),
        ({"gate_rank": -1}, ValueError, "gate_rank must be >= 0 .*: got -1"),
        ({"attn_drop": 1.5}, ValueError, "0 <= attn_drop < 1: got 1.5"),
        ({"alpha": 0.2}, TypeError, "alpha"),
    ],
)
def test_impossible_options_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        SpatialDecayAttention(DIM, **{"num_heads": HEADS, **options})


@pytest.mark.parametrize(
    ("shape", "call", "error", "says"),
    [
        ((2, 10, DIM), {}, ValueError, "must be a square: got L = 10, num_prefix_tokens = 0.*Pass layout"),
        ((2, 10, DIM), {"layout": (3, 4)}, ValueError, r"got layout=\(3, 4\) \(H \* W = 12\), L = 10"),
        (
            (2, 10, DIM),
            {"layout": (10,)},
            ValueError,
            r"\(H, W\), a Grid or Positions, or None: got \(10,\)",
        ),
        (
            (2, 9, DIM),
            {"layout": 3},
            ValueError,
            r"\(H, W\), a Grid or Positions, or None: got 3",
        ),
        (
            (2, 9, DIM),
            {"layout": (3.0, 3.0)},
            ValueError,
            r"\(H, W\), a Grid or Positions, or None: got \(3.0, 3.0\)",
        ),
        ((2, 9, DIM), {"layout": torch.ones(9, 9)}, ValueError, "got Tensor. attn_mask comes after it"),
        ((2, 3, 3, DIM), {"layout": torch.ones(9, 9)}, ValueError, "got Tensor. attn_mask comes after it"),
        ((2, 10, DIM), {"layout": (-2, -5)}, ValueError, "two positive integers"),
        ((2, 3, 4, DIM), {"layout": (4, 3)}, ValueError, r"\(H, W\) of the map: got \(4, 3\) and a map of 3 x 4"),
        ((10, DIM), {}, ValueError, r"tokens \(B, L, D\) or a map \(B, H, W, D\): got shape \(10, 16\)"),
        ((2, DIM, 3, 4), {}, ValueError, "must be dim = 16: got shape .*permute"),
        (
            (2, 4, DIM),
            {"attn_mask": torch.zeros(3, 3)},
            ValueError,
            r"\(B, N, L, L\) = \(2, 2, 4, 4\)",
        ),
    ],
)
def test_impossible_input_is_refused(shape, call, error, says):
    with pytest.raises(error, match=says):
        SpatialDecayAttention(DIM, HEADS)(torch.randn(shape), **call)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="x must be floating point: got torch.int64"):
        SpatialDecayAttention(DIM, HEADS)(torch.ones(1, 4, DIM, dtype=torch.int64))


def test_maps_have_no_place_for_prefix_tokens():
    with pytest.raises(ValueError, match="a map .* has no place for prefix tokens"):
        SpatialDecayAttention(DIM, HEADS, num_prefix_tokens=1)(torch.randn(1, 2, 2, DIM))
