"""Backend `triton`: values and gradients against float64, its operators, its machine code, and what it cannot run.

With a GPU it runs there; without one, the same tests run in Triton's interpreter.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from spatial_decay import SpatialDecayAttention, explain_backend
from spatial_decay.decay import AxialDecay, GaussianDecay, ManhattanDecay, PathDecay
from spatial_decay.layout import Grid, Positions
from spatial_decay.ops import choice, decay_attention
from spatial_decay.ops import triton as room
from spatial_decay.ops.formulas import formula_of
from spatial_decay.ops.inputs import checked_inputs
from spatial_decay.ops.triton import operators, schedule
from spatial_decay.ops.triton.schedule import Schedule
from tests.cases import AXIAL, PAIRWISE, case_id, make_gates

pytestmark = pytest.mark.skipif(
    (room._TRITON or (0, 0)) < room._OLDEST_TRITON, reason="needs Triton 3.3 or newer: pip install triton"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the norm: of a softmax and two products in float32, and of what is rounded before each product.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
KINDS = [
    case
    for case in PAIRWISE
    if formula_of(case.build(make_gates(case, 1, 1, 1), 1, Grid(1, 1))) and not case.options.get("causal")
]
FULL, PATH, GAUSSIAN = (next(case for case in KINDS if case.name == name) for name in ("full", "1d", "gaussian"))


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    if DEVICE != "cpu":
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    import triton.language as tl
    from triton.runtime import interpreter

    # At each call of a helper the interpreter puts its own language in the place of Triton's once more, which takes
    # half of its time. Once a launch is enough.
    replace_language = interpreter._patch_lang

    def replace_once(function):
        languages = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        return replace_language(function) if any(tl.core.is_builtin(x.load) for x in languages) else None

    monkeypatch.setattr(interpreter, "_patch_lang", replace_once)


def error(actual, expected):
    """Relative to the norm of what is expected, where that is below 1 (a row of one token has no gradient) to 1."""
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1.0)).item()


def heads(batch_size, num_heads, length, head_dim, dtype=torch.float32):
    """As a ViT has them: (B, L, N, d) in memory."""
    return torch.randn(batch_size, length, num_heads, head_dim, device=DEVICE).to(dtype).transpose(1, 2)


def make(case, grid, *, head_dim=16, batch_size=1, num_heads=2, dtype=torch.float32):
    """q, k, v, the gradient of the output, and a decay; its numbers are float32 in all dtypes."""
    q, k, v, grad = (heads(batch_size, num_heads, grid.num_tokens, head_dim, dtype) for _ in range(4))
    gates = make_gates(case, batch_size, num_heads, grid.num_tokens, torch.float32)
    with torch.device(DEVICE):
        return q, k, v, grad, case.build([gate.to(DEVICE) for gate in gates], num_heads, grid)


def run(q, k, v, grad, decay, backend="triton", **options):
    """Output, and the gradients of q, k, v and of the decay's numbers; math in float64."""
    dtype = torch.float64 if backend == "math" else None
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v))
    if "attn_mask" in options and dtype is not None and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    decay, numbers = with_leaves(decay, dtype)
    out = decay_attention(q, k, v, decay, backend=backend, **options)
    return [out, *torch.autograd.grad(out, (q, k, v, *numbers), grad.to(out.dtype))]


def with_leaves(decay, dtype):
    """The same decay with numbers that ask for gradients, and these."""
    if decay is None:
        return None, []
    if isinstance(decay, AxialDecay):
        (rows, first), (columns, second) = with_leaves(decay.rows, dtype), with_leaves(decay.columns, dtype)
        return dataclasses.replace(decay, rows=rows, columns=columns), first + second
    names = [field.name for field in dataclasses.fields(decay) if isinstance(getattr(decay, field.name), torch.Tensor)]
    leaves = {name: getattr(decay, name).detach().to(dtype or torch.float32).requires_grad_() for name in names}
    return dataclasses.replace(decay, **leaves), list(leaves.values())


def check(inputs, dtype=torch.float32, backend="triton", **options):
    found, wanted = run(*inputs, backend=backend, **options), run(*inputs, backend="math", **options)
    for got, expected in zip(found, wanted, strict=True):
        assert got.isfinite().all()
        assert error(got, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("size", "num_prefix"), [((7, 10), 0), ((5, 7), 3)], ids=case_id)
@pytest.mark.parametrize("case", KINDS, ids=case_id)
def test_equals_float64(case, size, num_prefix):
    check(make(case, Grid(*size, num_prefix)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("case", [FULL, PATH, GAUSSIAN], ids=case_id)
def test_half_precision(case, dtype):
    check(make(case, Grid(7, 10, 1), head_dim=64, num_heads=1, dtype=dtype), dtype)


@pytest.mark.parametrize(
    ("case", "head_dim"),
    [(FULL, 1), (PATH, 20), (FULL, 32), (PATH, 72), (FULL, 80), (PATH, 96), (FULL, 128)],
    ids=case_id,
)
def test_head_dims(case, head_dim):
    """Of most, the scale is no power of two: to the two kernels of the backward pass a token must yet be one number."""
    check(make(case, Grid(7, 10, 1), head_dim=head_dim, num_heads=1))
    check(make(case, Grid(7, 10), head_dim=head_dim, num_heads=1))
    check(make(case, Grid(4, 5), head_dim=head_dim, num_heads=1))


@pytest.mark.parametrize("size", [(7, 10), (4, 5)], ids=["long", "short"])
def test_paths_that_cost_nothing(size):
    """Which of two tokens comes later is to be known where their sums are equal."""
    q, k, v, grad, decay = make(PATH, Grid(*size))
    check((q, k, v, grad, dataclasses.replace(decay, cumulative=decay.cumulative.div(4).round())))


@pytest.mark.parametrize("case", [FULL, PATH, GAUSSIAN], ids=case_id)
def test_what_stands_at_prefix_tokens_is_not_read(case):
    q, k, v, grad, decay = make(case, Grid(7, 10, 2))
    expected = run(q, k, v, grad, decay)
    nonsense = {field.name: getattr(decay, field.name) for field in dataclasses.fields(decay)}
    nonsense = {name: x.clone() for name, x in nonsense.items() if isinstance(x, torch.Tensor)}
    for value, x in zip((float("nan"), float("inf"), float("inf")), nonsense.values(), strict=False):
        x[..., :2] = value
    for got, wanted in zip(run(q, k, v, grad, dataclasses.replace(decay, **nonsense)), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("case", "size", "longest_short"),
    [(AXIAL[0], *short) for short in (((3, 5), 64), ((1, 1), 64), ((4, 1), 64), ((3, 5), 3), ((2, 3), 0))]
    + [(case, (3, 5), 3) for case in AXIAL[1:]],
    ids=case_id,
)
def test_rows_and_columns(monkeypatch, case, size, longest_short):
    """Both axes by the kernels for short sequences, one, or none."""
    monkeypatch.setattr(schedule, "num_warps_of_short", lambda work: int(work.num_patches <= longest_short))
    check(make(case, Grid(*size), batch_size=2))


@pytest.mark.parametrize("grid", [Grid(9, 8), Grid(4, 5)], ids=["long", "short"])
def test_any_strides(grid):
    """Head by head, features last but one, and every other head, in place of token by token."""
    q, k, v, grad, decay = make(FULL, grid)
    expected = run(q, k, v, grad, decay)
    by_head = (*(x.contiguous() for x in (q, k, v)), grad, decay)
    by_feature = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, grad)]
    q_of_more, k_of_more, strength = (x.repeat_interleave(2, dim=1)[:, ::2] for x in (q, k, decay.strength))
    for inputs in (
        by_head,
        (by_feature[0], k, v, by_feature[1], decay),
        (q_of_more, k_of_more, v, grad, dataclasses.replace(decay, strength=strength)),
    ):
        for got, wanted in zip(run(*inputs), expected, strict=True):
            assert torch.equal(got, wanted)


def test_outputs_lie_as_a_projection_wants_them():
    q, k, v, _, decay = make(FULL, Grid(9, 8))
    assert decay_attention(q, k, v, decay, backend="triton").transpose(1, 2).is_contiguous()
    q, k, v, _, decay = make(AXIAL[0], Grid(3, 5))
    assert decay_attention(q, k, v, decay, backend="triton").transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("case", [FULL, AXIAL[0]], ids=case_id)
def test_key_masks_and_images_that_are_all_padding(case):
    grid = Grid(2, 3) if case.is_axial else Grid(4, 8, 2)
    inputs = make(case, grid, batch_size=2)
    mask = torch.rand(2, 1, 1, grid.num_tokens, device=DEVICE) > 0.4
    mask[1] = False
    check(inputs, attn_mask=mask)
    assert all((got[1] == 0).all() for got in run(*inputs, attn_mask=mask)[:4])
    check(inputs, attn_mask=torch.randn(1, 2, 1, grid.num_tokens, device=DEVICE))  # added, for each head


def test_images_that_share_their_decay():
    q, k, v, grad, _ = make(FULL, Grid(5, 7), batch_size=3)
    check((q, k, v, grad, ManhattanDecay(-torch.rand(1, 2, 35, device=DEVICE), Grid(5, 7))))


@pytest.mark.parametrize(
    ("num_images", "knows_all"),
    [(1, False), (2, False), pytest.param(2, True, marks=pytest.mark.slow)],
    ids=["shared", "each its own", "each its own, all known"],
)
@pytest.mark.parametrize("case", [FULL, PATH, GAUSSIAN], ids=case_id)
def test_positions(case, num_images, knows_all):
    """In no order, some twice; and tokens that lie nowhere, whose coordinates are nonsense."""
    shape = (num_images, 75)
    h, w = torch.randint(0, 9, (2, *shape), device=DEVICE).float()
    known = None if knows_all else torch.rand(shape, device=DEVICE) > 0.3
    if known is not None:
        h = h.masked_fill(~known, float("nan"))
    inputs = make(case, Positions(h, w, known), batch_size=2)
    check(inputs, attn_mask=torch.rand(2, 1, 1, 75, device=DEVICE) > 0.3)


def test_more_prefix_tokens_than_a_block_holds():
    check(make(FULL, Grid(3, 4, 70), num_heads=1))


def test_without_decay():
    q, k, v, grad, _ = make(FULL, Grid(9, 8))
    check((q, k, v, grad, None))
    check((q[:, :, :20], k[:, :, :20], v[:, :, :20], grad[:, :, :20], None), scale=0.7)


@pytest.mark.parametrize("size", [(5, 6), (9, 11)], ids=case_id)
def test_short_and_long_kernels_agree(monkeypatch, size):
    inputs = make(PATH, Grid(*size))
    monkeypatch.setattr(schedule, "num_warps_of_short", lambda work: 8)
    short = run(*inputs)
    monkeypatch.setattr(schedule, "num_warps_of_short", lambda work: 0)
    for a, b in zip(short, run(*inputs), strict=True):
        assert error(a, b.double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("case", "tile"),
    [(FULL, (64, 64)), (FULL, (128, 32)), (FULL, (16, 128)), (GAUSSIAN, (128, 32)), (GAUSSIAN, (16, 128))],
    ids=case_id,
)
def test_any_tiles_give_the_same(monkeypatch, case, tile):
    monkeypatch.setattr(schedule, "from_table", lambda step, work: Schedule(*tile, 4, 2))
    check(make(case, Grid(9, 15, 1), num_heads=1))


@pytest.mark.parametrize("case", [FULL, AXIAL[0]], ids=case_id)
def test_autotuned_takes_the_fastest_tiles(monkeypatch, case):
    monkeypatch.setattr(schedule, "_FASTEST", {})
    if not case.is_axial:  # few, because the interpreter is slow
        few = [Schedule(32, 32, 4, 2), Schedule(16, 64, 4, 2)]
        monkeypatch.setattr(schedule, "candidates", lambda step, first: few)
    inputs = make(case, Grid(2, 3) if case.is_axial else Grid(9, 8))
    check(inputs, backend="triton_autotune")
    timed = dict(schedule._FASTEST)
    steps = {"short forward", "short backward"} if case.is_axial else {"forward", "backward rows", "backward columns"}
    assert {step for step, *_ in timed} == steps
    run(*inputs, backend="triton_autotune")
    assert timed == schedule._FASTEST


def test_the_fastest_that_fits_is_kept(monkeypatch):
    monkeypatch.setattr(schedule, "_FASTEST", {})
    first = Schedule(128, 64, 8, 2)
    choices = schedule.candidates("backward rows", first)
    assert choices[0] == first
    assert len(set(choices)) == len(choices) > 5
    times = {choices[0]: 3.0, choices[1]: None, choices[2]: 1.0}
    assert schedule.fastest("a key", choices, lambda choice: times.get(choice, 2.0)) == choices[2]
    assert schedule.fastest("a key", choices, lambda choice: pytest.fail("was timed before")) == choices[2]


@pytest.mark.parametrize("grid", [Grid(9, 8, 1), Grid(4, 5)], ids=["long", "short"])
@pytest.mark.parametrize("case", [FULL, GAUSSIAN], ids=case_id)
def test_results_are_bitwise_repeatable(case, grid):
    inputs = make(case, grid, num_heads=1)
    assert all(torch.equal(a, b) for a, b in zip(run(*inputs), run(*inputs), strict=True))


def arguments(length, formula="path"):
    """Of the operators."""
    q, k, v = (torch.randn(1, 2, 1, length, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    numbers = torch.rand(1, 2, 1, length, device=DEVICE).cumsum(-1).requires_grad_()
    mask, positions = torch.randn(2, 1, 1, length, device=DEVICE), torch.rand(1, 2, length, device=DEVICE)
    return q, k, v, formula, numbers, mask, positions, 0, 0.5, False


def test_the_operators_are_well_made():
    torch.library.opcheck(operators.short_forward, arguments(20))
    torch.library.opcheck(operators.forward, arguments(40, "manhattan"))


@pytest.mark.parametrize("case", [FULL, AXIAL[0]], ids=case_id)
def test_it_is_one_graph(case):
    torch.compiler.reset()
    q, k, v, grad, decay = make(case, Grid(3, 4) if case.is_axial else Grid(9, 8))

    def attend(q, k, v):
        return decay_attention(q, k, v, decay, backend="triton")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves, grad),
        torch.autograd.grad(attend(*leaves), leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_it_can_be_exported():
    class Attend(torch.nn.Module):
        def forward(self, q, strength):
            return decay_attention(q, q, q, ManhattanDecay(strength, Grid(4, 5)), backend="triton")

    inputs = heads(1, 2, 20, 8), -torch.rand(1, 2, 20, device=DEVICE)
    program = torch.export.export(Attend(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Attend()(*inputs))


def test_autocast_and_checkpointing():
    attn = SpatialDecayAttention(16, 1, backend="triton").to(DEVICE)
    x = torch.randn(1, 9, 8, 16, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attn(x)
        again = checkpoint(attn, x, use_reentrant=False)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # the positional convolution
        plain, checkpointed = (torch.autograd.grad(y.square().sum(), list(attn.parameters())) for y in (out, again))
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert out.dtype == torch.bfloat16
    seen = []
    attn.decay.gate.register_forward_hook(lambda module, inputs, gate: seen.append(gate.dtype))
    with torch.autocast(DEVICE, torch.bfloat16):
        attn(x)
    assert seen == [torch.float32]


def test_it_says_all_that_it_cannot():
    q = torch.randn(1, 1, 4, 130, dtype=torch.float64, device=DEVICE)
    mask = torch.zeros(4, 4, requires_grad=True, device=DEVICE)
    with pytest.raises(NotImplementedError) as caught:
        decay_attention(q, q, q, attn_mask=mask, dropout_p=0.1, scale=-1.0, backend="triton")
    assert str(caught.value).splitlines()[1:-1] == [
        "  - torch.float64 (needs float32, float16 or bfloat16)",
        "  - head_dim=130 (needs at most 128)",
        "  - scale=-1.0 (needs one above 0)",
        "  - attn_mask differs from query to query (needs one over keys, (B, 1, 1, L))",
        "  - dropout_p=0.1 (needs 0)",
        "  - attn_mask requires grad (needs one without)",
    ]


@pytest.mark.parametrize(
    ("decay", "reason"),
    [
        (PathDecay(torch.zeros(1, 1, 4), Grid(2, 2), causal=True), "a causal PathDecay (needs causal=False)"),
        (
            GaussianDecay(*torch.ones(3, 1, 1, 4), Grid(1, 4), max_distance=2),
            "a grid of 1 x 4 patches behind 0 prefix tokens with max_distance=2 (needs a Grid within it, or none)",
        ),
        (
            GaussianDecay(*torch.ones(3, 1, 1, 4), Positions(*torch.ones(2, 1, 4)), max_distance=2),
            "Positions of 4 tokens with max_distance=2 (needs a Grid within it, or none)",
        ),
    ],
)
def test_decays_that_it_cannot(decay, reason):
    q = torch.randn(1, 1, decay.layout.num_tokens, 8)
    inputs = checked_inputs(q, q, q, decay, None, 0.0, None)
    assert room._reasons_of_the_inputs(inputs) == [reason]


def test_machines_that_it_cannot(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert room._reasons_of_the_machine(torch.device("cpu")) == ["q is on cpu (needs cuda)"]
    monkeypatch.setattr(room, "capability_of", lambda device: (7, 5))
    assert room._reasons_of_the_machine(cuda) == ["compute capability 7.5 (needs 8.0 or newer)"]
    monkeypatch.setattr(room, "_TRITON", (3, 2))
    assert room._reasons_of_the_machine(cuda) == ["Triton 3.2 (needs 3.3 or newer)"]
    monkeypatch.setattr(room, "_TRITON", None)
    assert room._reasons_of_the_machine(cuda) == ["Triton is not installed (pip install triton)"]


def test_auto_takes_it_on_cuda_and_goes_on_where_it_cannot(monkeypatch):
    def chosen(**options):
        decay = options.pop("decay", ManhattanDecay(torch.zeros(1, 2, 72), Grid(9, 8)))
        inputs = checked_inputs(*torch.randn(3, 1, 2, 72, 8), decay, options.pop("mask", None), 0.0, None)
        q = SimpleNamespace(**{name: getattr(inputs.q, name) for name in ("shape", "dtype", "stride")}, **options)
        q.device, q.is_cuda, q.requires_grad = torch.device("cuda"), True, False
        return choice.choose(dataclasses.replace(inputs, q=q), "auto")

    monkeypatch.setattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda q: False)
    monkeypatch.setattr(room, "capability_of", lambda device: (9, 0))
    assert chosen() == "triton"
    assert chosen(mask=torch.zeros(1, 1, 1, 72)) == "triton"
    assert chosen(mask=torch.zeros(1, 1, 72, 72)) == "sdpa"
    assert chosen(decay=None) == "sdpa"  # without a decay there is nothing to gain
    monkeypatch.setattr(room, "capability_of", lambda device: (7, 5))
    assert chosen() == "sdpa"


@pytest.mark.skipif(DEVICE != "cpu", reason="is about the interpreter")
def test_auto_does_not_take_the_interpreter():
    q, k, v, _, decay = make(FULL, Grid(9, 8))
    assert "triton could: on cpu it runs in Triton's interpreter" in explain_backend(q, k, v, decay)


@pytest.mark.slow
def test_the_machine_code_has_not_become_worse():
    """For GPUs that are not there: tensor cores, few registers spilled, no more instructions than in the table."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.triton_instructions"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = json.loads(printed)
    table = json.loads(Path(__file__).with_name("triton_instructions.json").read_text(encoding="utf-8"))
    if found["triton"] != table["triton"]:
        pytest.skip(f"the table is for Triton {table['triton']}, here is {found['triton']}")
    for now, before in zip(found["kernels"], table["kernels"], strict=True):
        costs, kept = now.pop("instructions_per_score"), before.pop("instructions_per_score")
        assert now == before
        assert now["tensor_cores"]
        assert now["percent_spills"] <= 6  # an H200 was fastest with tiles that spill as much
        assert costs <= kept, now


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=case_id)
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize("size", [(14, 14), (16, 16), (32, 32), (56, 56)], ids=case_id)
@pytest.mark.parametrize("case", KINDS, ids=case_id)
def test_real_sizes(case, size, num_prefix, dtype):
    check(make(case, Grid(*size, num_prefix), head_dim=64, num_heads=3, dtype=dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=case_id)
@pytest.mark.parametrize(("size", "head_dim"), [((28, 28), 32), ((56, 56), 16), ((96, 130), 64)], ids=case_id)
@pytest.mark.parametrize("case", AXIAL, ids=case_id)
def test_real_rows_and_columns(case, size, head_dim, dtype):
    # Between the two attentions the output is rounded once more.
    for got, expected in zip(
        run(*(inputs := make(case, Grid(*size), head_dim=head_dim, dtype=dtype))),
        run(*inputs, backend="math"),
        strict=True,
    ):
        assert error(got, expected) < 2 * TOLERANCE[dtype]


@pytest.mark.gpu
def test_more_sequences_than_a_grid_dimension_holds():
    check(make(AXIAL[0], Grid(28, 28), batch_size=300, num_heads=8, head_dim=16))


@pytest.mark.gpu
def test_a_cuda_graph_replays_it():
    q, k, v, _, decay = make(FULL, Grid(14, 15))
    expected = decay_attention(q, k, v, decay, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decay_attention(q, k, v, decay, backend="triton")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
