"""Backend `lowrank`: the checks of all backends for the one kind that has channels, its errors, what it refuses."""

from dataclasses import dataclass
from functools import partial

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from spatial_decay import SpatialDecayAttention, explain_backend
from spatial_decay.decay import ManhattanDecay, PairwiseDecay, SquaredDecay, dense
from spatial_decay.layout import Grid, Positions
from spatial_decay.ops import BACKENDS, decay_attention, lowrank
from spatial_decay.ops.native import library
from tests import test_positions
from tests.cases import CASES, case_id, make_gates, relative_error
from tests.ops import test_attention

SQUARED = next(case for case in CASES if case.kind == "squared")
CHECKS = {
    "equations": partial(test_attention.test_equals_the_equations, size=(3, 5), num_prefix=0),
    "equations behind prefix tokens": partial(test_attention.test_equals_the_equations, size=(3, 5), num_prefix=2),
    "one token": partial(test_attention.test_equals_the_equations, size=(1, 1), num_prefix=0),
    "a line": partial(test_attention.test_equals_the_equations, size=(1, 7), num_prefix=1),
    "float32": partial(test_attention.test_equals_math, size=(14, 14), dtype=torch.float32),
    "bfloat16": partial(test_attention.test_equals_math, size=(14, 14), dtype=torch.bfloat16),
    "autocast": test_attention.test_under_autocast,
    "bool mask": partial(test_attention.test_attn_mask_adds_to_the_decay, as_float=False),
    "float mask": partial(test_attention.test_attn_mask_adds_to_the_decay, as_float=True),
    "empty rows": partial(test_attention.test_a_row_that_may_attend_to_nothing_is_zero, dtype=torch.float64),
    "empty rows, bfloat16": partial(test_attention.test_a_row_that_may_attend_to_nothing_is_zero, dtype=torch.bfloat16),
    "key padding": test_attention.test_key_padding_hides_the_padding,
    "gradients": test_attention.test_gradients_equal_those_of_math,
    "gradcheck": test_attention.test_gradcheck,
    "only the gate trains": test_attention.test_only_the_gate_trains,
    "strides": test_attention.test_strides_do_not_matter,
    "positions": test_positions.check_backend,
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_as_every_backend(check):
    check(case=SQUARED, backend="lowrank")


def run(decay_of, dtype, leaves, weight, **options):
    """Output, and gradients of q, k, v and the gate, which is float32 at least."""
    *heads, gate = leaves
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [*(x.to(dtype).requires_grad_() for x in heads), gate.to(wide).requires_grad_()]
    out = decay_attention(*leaves[:3], decay_of(leaves[3]), **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(dtype))]


def errors(grid, dtype, backends, terms=None):
    """Of each backend, the relative errors of the output and of the gradients of q, k, v and the gate.

    At the default strength, or with terms of so many nats.
    """
    q, k, v, weight = torch.randn(4, 1, 4, grid.num_tokens, 64).to(dtype)
    leaves = q, k, v, make_gates(SQUARED, 1, 4, grid.num_tokens, torch.float32)[0]
    decay_of = partial(SquaredDecay.from_gate, layout=grid)
    if terms is not None:
        decay_of = partial(decay_of, alpha=0.01 * terms / decay_of(leaves[3]).largest_term().item())
    exact = run(decay_of, torch.float64, leaves, weight, backend="math")
    return [
        torch.tensor([(a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)])
        for found in (run(decay_of, dtype, leaves, weight, backend=backend) for backend in backends)
    ]


@pytest.mark.parametrize("size", [(14, 14), pytest.param((32, 32), marks=pytest.mark.slow)], ids=case_id)
def test_in_float32_it_is_as_exact_as_a_mask_at_the_default_strength(size):
    """Up to 32 x 32: the output, q, k and v; the gate's gradient to within 3 times the mask's largest error."""
    of_lowrank, of_mask = errors(Grid(*size), torch.float32, ("lowrank", "sdpa"))
    assert (of_lowrank[:4] <= 1.5 * of_mask[:4]).all()
    assert of_lowrank[4] <= 3 * of_mask[1:].max()


@pytest.mark.parametrize("num_prefix", [0, 1], ids="P={}".format)
@pytest.mark.parametrize("size", [(14, 14), (10, 30), pytest.param((56, 56), marks=pytest.mark.slow)], ids=case_id)
def test_what_auto_lets_through_has_few_errors(size, num_prefix):
    """At the largest terms that it takes: what _FEW says of them."""
    (found,) = errors(Grid(*size, num_prefix), torch.float32, ("lowrank",), terms=64)
    assert found[0] < 5e-6
    assert found[4] < 3e-5


@pytest.mark.parametrize("num_prefix", [0, 1], ids="P={}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
def test_high_and_low_parts_hold_the_output_in_half_precision(dtype, num_prefix):
    """Of the output as good as the mask does, up to the largest terms that are taken; not of the gate's gradient."""
    for terms, of_gate in ((8, 0.015), (0.99 / torch.finfo(dtype).eps, 0.1)):
        of_lowrank, of_mask = errors(Grid(14, 14, num_prefix), dtype, ("lowrank", "sdpa"), terms=terms)
        assert of_lowrank[0] <= 1.3 * of_mask[0]
        assert (of_lowrank[1:4] <= 3 * of_mask[1:4]).all()
        assert of_lowrank[4] <= of_gate


@pytest.mark.parametrize(
    ("size", "scale"),
    [((1, 200), None), ((10, 190), None), ((14, 14), 1e-3), ((14, 14), 2.0**-20), ((14, 14), -1.0), ((3, 4), 2.0**10)],
    ids=case_id,
)
def test_float16_does_not_overflow(size, scale):
    grid = Grid(*size)
    q, k, v = torch.randn(3, 1, 4, grid.num_tokens, 32, dtype=torch.float16)
    q = q / max(1.0, scale or 1.0)
    (gate,) = make_gates(SQUARED, 1, 4, grid.num_tokens, torch.float32)
    strength = SquaredDecay.from_gate(gate, grid).strength
    strength[:, 0] = 0  # a head without a decay
    strength[:, 1] = -1e-39  # and one with next to none
    for numbers in (strength, strength.requires_grad_()):
        decay = SquaredDecay(numbers, grid)
        found = decay_attention(q, k, v, decay, scale=scale, backend="lowrank")
        assert relative_error(found, decay_attention(q, k, v, decay, scale=scale, backend="math")) < 1e-3
    (gradient,) = torch.autograd.grad(found.float().square().sum(), strength)
    assert gradient.isfinite().all()


def test_the_channels_are_the_mask():
    known = torch.rand(2, 12) > 0.3
    far = Positions(*(100 * torch.rand(2, 2, 12)).masked_fill(~known, float("nan")), known)
    for layout in (Grid(3, 4), Grid(2, 5, 2), far):
        strength = -torch.rand(2, 3, 12, dtype=torch.float64)
        strength[..., : layout.num_prefix_tokens] = float("nan")  # not looked at
        if layout.known is not None:
            strength = strength.masked_fill(~known[:, None], float("nan"))
        decay = SquaredDecay(strength, layout)
        queries, keys = decay.channels()
        assert queries.shape == keys.shape == (2, 3, 12, 8)
        torch.testing.assert_close(queries @ keys.mT, dense(decay), rtol=1e-11, atol=1e-11)
        assert 0.5 < PairwiseDecay.largest_term(decay).item() / decay.largest_term().item() <= 1 + 1e-12


def test_a_head_of_any_width_and_any_scale():
    grid = Grid(4, 5, 1)
    decay = SquaredDecay(-torch.rand(1, 2, 21), grid)
    for head_dim, scale in ((1, None), (3, 2.0), (20, -0.5), (64, 1e-3)):
        q, k, v = torch.randn(3, 2, 2, 21, head_dim)
        found = decay_attention(q, k, v, decay, scale=scale, backend="lowrank")
        assert found.shape == q.shape
        assert relative_error(found, decay_attention(q, k, v, decay, scale=scale, backend="math")) < 1e-5


def test_dropout_drops():
    q, k = torch.randn(2, 1, 2, 64, 8)
    v = torch.ones(1, 2, 64, 8)
    dropped = decay_attention(
        q, k, v, SquaredDecay(-torch.rand(1, 2, 64), Grid(8, 8)), dropout_p=0.5, backend="lowrank"
    )
    assert (dropped - 1).abs().max() > 0.1
    assert (dropped.mean() - 1).abs() < 0.2


@dataclass(frozen=True)
class Doubled(SquaredDecay):
    def pairwise(self, query, key, *steps):
        return 2 * super().pairwise(query, key, *steps)


def test_what_it_cannot():
    q, strength = torch.randn(1, 1, 4, 8), -torch.rand(1, 1, 4)
    for decay, scale, says in (
        (None, None, "no decay (needs a decay with channels, as SquaredDecay is)"),
        (ManhattanDecay(strength, Grid(2, 2)), None, "ManhattanDecay (needs a decay with channels"),
        (Doubled(strength, Grid(2, 2)), None, "Doubled (needs a decay with channels"),  # says more than its channels
        (
            SquaredDecay(strength, Grid(2, 2)),
            0.0,
            "scale=0.0 (needs one of at least 2 ** -20: what is added is divided",
        ),
        (SquaredDecay(strength, Grid(2, 2)), 1e-38, "scale=1e-38 (needs one of at least 2 ** -20"),
    ):
        with pytest.raises(NotImplementedError) as caught:
            decay_attention(q, q, q, decay, scale=scale, backend="lowrank")
        assert says in str(caught.value)
    with pytest.raises(NotImplementedError, match="ManhattanDecay has no channels. Write a method `channels`"):
        ManhattanDecay(strength, Grid(2, 2)).channels()


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.bfloat16, 128), (torch.float16, 1024), (torch.float32, 2896), (torch.float64, 67108864)],
    ids=case_id,
)
def test_terms_that_the_dtype_cannot_hold_are_refused(dtype, limit):
    """Half of the digits that the dtype has, of high and low parts together."""
    q = torch.randn(1, 1, 197, 8, dtype=dtype)

    def attend(terms, backend="lowrank"):  # at a corner r = 7^2 + 7^2
        strength = torch.full((1, 1, 197), -terms / 98, dtype=torch.promote_types(dtype, torch.float32))
        return decay_attention(q, q, q, SquaredDecay(strength, Grid(14, 14, 1)), backend=backend)

    assert relative_error(attend(0.99 * limit), attend(0.99 * limit, "math")) < 1 / limit
    with pytest.raises(
        NotImplementedError, match=rf"{dtype} keeps less than half of the digits \(needs at most {limit}"
    ):
        attend(1.01 * limit)


def test_float32_numbers_under_float64_queries_count_as_they_are(chosen):
    grid, q = Grid(26, 26), torch.randn(2, 1, 676, 8, dtype=torch.float64)
    of_numbers = SquaredDecay(torch.full((1, 1, 676), -65 / 338), grid)
    assert explain_backend(*q[None].expand(3, 2, -1, -1, -1), of_numbers).startswith("tiled")


def test_forward_mode_of_the_decay_is_a_reason():
    q, strength = torch.randn(1, 1, 9, 8), -torch.rand(1, 1, 9)
    with forward_ad.dual_level():
        decay = SquaredDecay(forward_ad.make_dual(strength, torch.ones_like(strength)), Grid(3, 3))
        with pytest.raises(NotImplementedError) as caught:
            decay_attention(q, q, q, decay, backend="lowrank")
    assert str(caught.value).count("forward-mode derivatives (needs none)") == 1


@pytest.fixture
def chosen(monkeypatch):
    """By auto where native cannot run."""
    monkeypatch.setattr(library, "reason", lambda: "no kernel")

    def choose(dtype=torch.float32, layout=None, strength=0.0, device="cpu", **options):
        layout = layout or Grid(26, 26)
        q = torch.empty(2, 4, layout.num_tokens, 16, dtype=dtype, device=device)
        wide = torch.promote_types(dtype, torch.float32)
        decay = SquaredDecay(torch.full((1, 4, layout.num_tokens), -strength, dtype=wide, device=device), layout)
        return explain_backend(q, q, q, decay, **options).splitlines()[0]

    return choose


def test_auto_takes_it_in_float32_where_native_cannot(chosen, monkeypatch):
    assert chosen() == chosen(torch.float64) == chosen(dropout_p=0.1) == "lowrank"
    assert chosen(attn_mask=torch.zeros(2, 1, 1, 676)) == "lowrank"
    assert chosen(attn_mask=torch.zeros(676, 676)) == chosen(torch.bfloat16) == "tiled"
    with monkeypatch.context() as during:
        during.setattr(torch.compiler, "is_exporting", lambda: True, raising=False)
        assert chosen() == "lowrank"
    monkeypatch.setattr(BACKENDS["math"], "_SMALL", 1 << 30)
    assert chosen() == "math"


def test_auto_takes_it_where_the_terms_are_small(chosen):
    """strength times 13^2 + 13^2 on the grid, times the largest of 2 * 1500^2 at the positions."""
    assert chosen(strength=63 / 338) == chosen(torch.float64, strength=1e5) == "lowrank"
    assert chosen(strength=65 / 338) == chosen(torch.float64, strength=1e6) == "tiled"
    far = Positions(*torch.linspace(0, 3000, 676).expand(2, 1, -1))
    assert chosen(layout=far, strength=60 / 4.5e6) == "lowrank"
    assert chosen(layout=far, strength=1.0) == "sdpa"
    for wide in (Grid(10, 65), Grid(2, 700)):
        assert chosen(layout=wide, strength=1e-5) == "lowrank"


def test_where_nobody_may_read_the_terms_the_extent_counts(chosen, monkeypatch):
    positions = Positions(*torch.zeros(2, 1, 676))
    assert chosen(device="meta") == chosen(device="meta", layout=Grid(64, 64)) == "lowrank"
    assert chosen(device="meta", layout=Grid(10, 65)) == "sdpa"
    assert chosen(torch.float64, device="meta", layout=Grid(10, 65)) == "lowrank"
    monkeypatch.setattr(lowrank, "are_readable", lambda *tensors: False)
    assert chosen(layout=positions) == "sdpa"
    assert chosen(layout=Grid(10, 65)) == "tiled"
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True, raising=False)
    assert chosen(layout=Grid(10, 65)) == "lowrank"  # a program is for all sizes
    assert chosen(layout=positions) == "sdpa"


def test_compiled_it_is_one_graph_on_each_side_of_64(chosen):
    counter = CompileCounter()
    compiled = torch.compile(make_layer(), fullgraph=True, dynamic=True, backend=counter)
    for size in ((20, 30), (30, 20), (33, 64), (20, 70), (80, 20)):
        compiled(torch.randn(1, 1 + size[0] * size[1], 16), size)
    assert counter.frame_count <= 3


def make_layer(**options):
    layer = SpatialDecayAttention(
        16, 2, decay="squared", rope="none", lpe_kernel_size=0, num_prefix_tokens=1, **options
    )
    return layer.eval()


@pytest.mark.slow
def test_an_exported_program_has_no_mask():
    """By auto: the decay is in q and k, and no tensor has L x L numbers."""
    layer, x = make_layer(), torch.randn(2, 1 + 18 * 19, 16)
    program = torch.export.export(layer, (x, (18, 19)), strict=False)
    torch.testing.assert_close(program.module()(x, (18, 19)), layer(x, (18, 19)), rtol=1e-5, atol=1e-6)
    largest = max(node.meta["val"].numel() for node in program.graph.nodes if hasattr(node.meta.get("val"), "numel"))
    assert largest < (18 * 19) ** 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter's own age
def test_onnxruntime_runs_a_layer():
    layer, x = make_layer(), torch.randn(2, 1 + 32 * 32, 16)
    program = torch.onnx.export(layer, (x, (32, 32)), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (name,) = [each.name for each in session.get_inputs()]
    (found,) = session.run(None, {name: x.numpy()})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(found), layer.double()(x.double(), (32, 32))) < 1e-5


def test_it_asks_for_attention_without_a_mask(monkeypatch):
    seen = []
    attend = F.scaled_dot_product_attention

    def watch(q, k, v, attn_mask=None, **options):
        seen.append((q.shape, v.shape, attn_mask))
        return attend(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    decay = SquaredDecay(-torch.rand(1, 2, 12), Grid(3, 4))
    decay_attention(*torch.randn(3, 1, 2, 12, 20), decay, backend="lowrank")
    decay_attention(*torch.randn(3, 1, 2, 12, 20).bfloat16(), decay, backend="lowrank")
    assert seen == [((1, 2, 12, 32), (1, 2, 12, 32), None), ((1, 2, 12, 48), (1, 2, 12, 48), None)]
