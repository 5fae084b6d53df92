"""Out of Python with sizes that vary: one compiled graph, one exported program, one ONNX file for all of them.

ONNX files are run by onnxruntime; docs/guides/export.md says what stays fixed.
"""

from functools import partial

import onnxruntime
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim

import spatial_decay as sd
from spatial_decay.ops import sdpa
from tests.cases import TWO_STAGES, relative_error

VIT = {"img_size": 64, "dim": 24, "depth": 1, "num_heads": 2}
ON_A_REFERENCE_GRID = {"decay": [sd.kinds.Decomposed(reference_grid=(3, 5)), sd.kinds.Full(reference_grid=(4, 3))]}
# Name: model, channels, size of a step (the total stride or the patch).
MODELS = {
    "sdt_h": (  # without rotary embeddings, which sdt_p has
        lambda: sd.SDTH(5, stem_stride=1, rope="none", init_values=[None, None], **TWO_STAGES | ON_A_REFERENCE_GRID),
        3,
        2,
    ),
    "sdt_p": (lambda: sd.SDTP(8, 2, 4, 10, dim=24, depth=1, num_heads=2, gate_rank=4), 4, 2),
    "vit_full": (lambda: sd.ViT(5, decay="full", num_registers=1, **VIT), 3, 16),
    "vit_alibi": (
        lambda: sd.ViT(5, decay=sd.kinds.Alibi(reference_grid=(4, 4)), rope="axial", rope_reference_grid=(4, 4), **VIT),
        3,
        16,
    ),
    "vit_squared": (lambda: sd.ViT(5, decay="squared", num_registers=1, **VIT), 3, 16),  # by lowrank
    "locatvit": (lambda: sd.ViT(5, decay="gaussian", global_pool="prr", **VIT), 3, 16),
}
slow = partial(pytest.param, marks=pytest.mark.slow)
FIRST = (2, 4, 4)  # batch and grid that is traced; for the ViTs that of their positions
OTHERS = [(3, 5, 3), (4, 3, 6), (2, 4, 4), (5, 2, 7)]


def build(name):
    return with_weights(MODELS[name][0]())


def with_weights(model):
    """That all matter: a new model's begin at zero or near it."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval()


def make_inputs(name, batch_size, height, width):
    """Images or latents of a grid, and the timesteps and labels of the latents."""
    _, channels, step = MODELS[name]
    images = torch.randn(batch_size, channels, height * step, width * step)
    return (images, torch.arange(batch_size) * 150, torch.arange(batch_size) + 3)[: 3 if name == "sdt_p" else 1]


def dynamic_shapes(name):
    step, batch_size = MODELS[name][2], Dim("batch_size", max=64)
    images = {0: batch_size, 2: step * Dim("height", max=64), 3: step * Dim("width", max=64)}
    return (images, {0: batch_size}, {0: batch_size})[: 3 if name == "sdt_p" else 1]


def assert_close(got, model, inputs):
    with torch.no_grad():
        expected = model(*inputs)
    assert expected.std() > 0.05
    assert len(expected) == 1 or (expected[0] - expected[-1]).abs().max() > 0.05  # it looks at what it is given
    assert got.shape == expected.shape
    assert relative_error(torch.as_tensor(got), expected) < 1e-4


def targets(graph):
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@pytest.fixture(scope="module")
def exported():
    """By name, the model and its program, each traced once."""
    programs = {}

    def get(name):
        if name not in programs:
            torch.manual_seed(0)
            model = build(name)
            inputs, shapes = make_inputs(name, *FIRST), dynamic_shapes(name)
            programs[name] = model, torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
        return programs[name]

    return get


# The largest model, whose tracing takes longest, is slow, and so are those that differ from another by their decay.
SLOW_MODELS = ("sdt_h", "vit_alibi", "vit_squared")
EVERY_MODEL = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_MODELS else ()) for name in MODELS]
)


@EVERY_MODEL
def test_one_compiled_graph_for_all_sizes(name):
    """From the first call, where it is told that sizes vary; the size of the positions is none of its own."""
    torch.compiler.reset()
    model, counter = build(name), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for i, size in enumerate([FIRST, *OTHERS]):
        inputs = make_inputs(name, *size)
        if i == 0:
            for x in inputs:
                for dimension in (0, 2, 3)[: 3 if x.ndim == 4 else 1]:
                    torch._dynamo.mark_dynamic(x, dimension)
        with torch.no_grad():
            assert_close(compiled(*inputs), model, inputs)
    assert counter.frame_count == 1


def test_without_being_told_it_compiles_twice():
    """For the first size, then for all others."""
    torch.compiler.reset()
    model, counter = build("vit_full"), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in [FIRST, *OTHERS]:
        inputs = make_inputs("vit_full", *size)
        with torch.no_grad():
            assert_close(compiled(*inputs), model, inputs)
    assert counter.frame_count == 2


@EVERY_MODEL
def test_one_exported_program_for_all_sizes(name, exported):
    model, program = exported(name)
    for size in [*OTHERS, (1, 4, 4)]:
        inputs = make_inputs(name, *size)
        assert_close(program.module()(*inputs).detach(), model, inputs)
    assert not [target for target in targets(program.graph) if "spatial_decay" in target or "complex" in target]


def test_a_program_with_a_backend_of_ours_needs_this_package():
    model = with_weights(sd.ViT(5, decay="full", backend="tiled", **VIT))
    inputs = make_inputs("vit_full", *FIRST)
    program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes("vit_full"), strict=False)
    assert "spatial_decay.tiled.default" in targets(program.graph)
    assert_close(program.module()(*inputs).detach(), model, inputs)


def test_masks_are_not_aligned_in_a_program(monkeypatch):
    """On CUDA rows of a mask are padded to a multiple of 8, which differs from size to size."""
    monkeypatch.setattr(sdpa, "row_multiple", lambda device: 8)
    model = sd.SpatialDecayAttention(16, 2, backend="sdpa")
    shapes = ({1: Dim("height", max=64), 2: Dim("width", max=64)},)
    program = torch.export.export(model, (torch.randn(2, 4, 4, 16),), dynamic_shapes=shapes, strict=False)
    x = torch.randn(2, 3, 5, 16)
    assert_close(program.module()(x).detach(), model, (x,))


def run_onnx(program, inputs):
    """What onnxruntime makes of these inputs."""
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit_full"])  # which is the next test's
def test_one_onnx_file_for_all_sizes(name, exported):
    model, program = exported(name)
    onnx_program = torch.onnx.export(program, dynamo=True, verbose=False)
    for size in [*OTHERS, (1, 4, 4)]:
        inputs = make_inputs(name, *size)
        assert_close(run_onnx(onnx_program, inputs), model, inputs)


def test_onnx_from_the_model_itself():
    """Long enough for auto to take an operator of its own, were it not that ONNX has none of them."""
    model = with_weights(sd.ViT(5, decay="full", **(VIT | {"img_size": 320})))
    onnx_program = torch.onnx.export(
        model, (torch.randn(2, 3, 320, 320),), dynamic_shapes=dynamic_shapes("vit_full"), dynamo=True, verbose=False
    )
    for size in [(2, 20, 20), (1, 3, 5)]:
        inputs = make_inputs("vit_full", *size)
        assert_close(run_onnx(onnx_program, inputs), model, inputs)


@pytest.mark.parametrize("backend", ["native", "tiled", "triton"])
def test_a_named_backend_that_onnx_cannot_hold_says_so(backend):
    model = sd.ViT(5, decay="full", backend=backend, **VIT).eval()
    with pytest.raises(Exception, match="ONNX has no such operator") as caught:
        torch.onnx.export(model, make_inputs("vit_full", *FIRST), dynamo=True, verbose=False)
    assert "Use backend='auto' or one of: sdpa, math" in str(caught.value)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name",
    ["sdt_p", "locatvit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sdt_h", "vit_full", "vit_alibi"))],
)
def test_torch_jit_trace_serves_all_sizes(name):
    """As fvcore and OpenVINO read it: real numbers alone; its warnings tell of checks that it leaves out."""
    model = build(name)
    traced = torch.jit.trace(model, make_inputs(name, *FIRST), check_trace=False)
    assert "complex" not in str(traced.inlined_graph)
    for sizes in [FIRST, *OTHERS]:
        inputs = make_inputs(name, *sizes)
        assert_close(traced(*inputs), model, inputs)
