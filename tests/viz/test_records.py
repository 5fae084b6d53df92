"""Records: recorded maps equal the equations and what the layers compute; hooks leave no trace."""

import importlib

import pytest
import timm
import torch
from torch import nn

from spatial_decay import SDTH, SDTP, SpatialDecayAttention, swap_attention, viz
from spatial_decay.layers.kinds import KINDS
from spatial_decay.layout import Grid, Positions
from spatial_decay.ops import attention_weights
from tests.cases import GATED, GATES_OF_KIND, case_id, reference_of_head
from tests.viz.backbone import DIM, HEADS, SIZE, make

AXIAL_KINDS = ("decomposed", "fixed_decomposed")


def as_queries():
    return [(h, w) for h in range(SIZE[0]) for w in range(SIZE[1])]


@pytest.mark.parametrize(
    ("case", "num_prefix"), [(case, p) for case in GATED for p in (0, 2) if not (p and case.is_axial)], ids=case_id
)
def test_gates_and_decay_are_those_of_the_equations(case, num_prefix):
    model, images = make({"kind": case.kind, **case.options}, num_prefix)
    layer = viz.record(model, images)[0]
    gates = layer.gates()
    assert list(gates) == GATES_OF_KIND[case.kind]
    assert all(gate.shape == (2, HEADS, *SIZE) for gate in gates.values())
    grid = Grid(*SIZE)
    for h, w in as_queries():
        decay = layer.decay((h, w))
        assert decay.shape == (2, HEADS, *SIZE)
        for b in range(2):
            for n in range(HEADS):
                mask = reference_of_head(case, [gate.flatten(2) for gate in gates.values()], b, n, HEADS, grid)
                if case.is_axial:
                    columns, rows = mask
                    row = [columns[w][h][g] + rows[g][w][u] for g, u in as_queries()]
                else:
                    row = mask[h * SIZE[1] + w]
                expected = torch.tensor(row, dtype=torch.float64).exp().reshape(SIZE)
                torch.testing.assert_close(decay[b, n], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "num_prefix"), [(kind, p) for kind in KINDS for p in (0, 2) if not (p and kind in AXIAL_KINDS)]
)
def test_attention_is_what_the_layers_compute(kind, num_prefix):
    model, images = make(kind, num_prefix)
    seen = []
    for module in (model.first.attn, model.second):
        module.register_forward_hook(lambda module, args, _: seen.append((module, args[0].clone())))
    records = viz.record(model, images)
    assert [record.name for record in records] == ["first.attn", "second"]
    for record, (module, x) in zip(records, seen, strict=True):
        assert record.kind == module.decay.kind
        assert record.layout == Grid(*SIZE, num_prefix)
        expected = module.attention_weights(x, SIZE).detach()
        for i, query in enumerate(as_queries()):
            attention = record.attention(query)
            assert attention.shape == (2, HEADS, *SIZE)
            torch.testing.assert_close(attention.flatten(2), expected[:, :, num_prefix + i, num_prefix:])


def test_maps_stay_those_of_the_call():
    model, images = make("full")
    mask = torch.zeros(12, 12, dtype=torch.float64)
    second = viz.record(model, images, attn_mask=mask)[1]
    before = [second.gates()["gate"], second.decay((1, 2)), second.attention((1, 2))]
    mask.fill_(float("-inf"))
    for parameter in model.parameters():
        parameter.data.normal_()
    after = [second.gates()["gate"], second.decay((1, 2)), second.attention((1, 2))]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert not any(x.requires_grad for x in after)


def test_what_the_model_does_in_place_is_not_in_the_record():
    class Scribbler(SpatialDecayAttention):
        def attend(self, q, k, v, *args, **kwargs):
            out = super().attend(q, k, v, *args, **kwargs)
            q.zero_()
            k.zero_()
            return out

    attn = Scribbler(DIM, HEADS, rope="none").eval()
    x = torch.randn(2, 12, DIM)
    attention = viz.record(attn, x, SIZE)[0].attention((1, 2))
    torch.testing.assert_close(attention.flatten(2), attn.attention_weights(x, SIZE)[:, :, 6].detach())


def test_the_mask_of_the_call_is_in_the_attention():
    model, images = make("full")
    may_attend = torch.ones(12, dtype=torch.bool)
    may_attend[5:] = False
    attention = viz.record(model, images, attn_mask=may_attend)[1].attention((0, 0)).flatten(2)
    assert (attention[..., 5:] == 0).all()
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, HEADS, dtype=torch.float64))


def test_maps_of_a_hierarchical_model_in_half_precision():
    model = SDTH(
        10,
        1,
        embed_dims=(8, 16),
        depths=(1, 2),
        num_heads=(2, 4),
        mlp_ratios=(2, 2),
        decay=("decomposed", "full"),
        init_values=(None, None),
        stem_stride=1,
    )
    records = viz.record(model.eval().bfloat16(), torch.rand(1, 1, 6, 8, dtype=torch.bfloat16))
    names = ["stages.0.blocks.0.attn", "stages.1.blocks.0.attn", "stages.1.blocks.1.attn"]
    assert [record.name for record in records] == names
    assert [record.layout.size for record in records] == [(6, 8), (3, 4), (3, 4)]
    for record in records:
        assert record.decay((1, 2)).dtype == record.attention((1, 2)).dtype == torch.float32
        assert all(gate.dtype == torch.float32 for gate in record.gates().values())


def test_hooks_are_removed():
    model, images = make("full")
    viz.record(model, images)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_hooks_are_removed_when_the_model_raises():
    model, images = make("full")
    model.second.proj = nn.Linear(1, 1)  # does not fit
    with pytest.raises(RuntimeError):
        viz.record(model, images)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays_as_it_is(training):
    model, images = make("full")
    model.train(training)
    viz.record(model, images)
    assert all(module.training == training for module in model.modules())


def make_vit(**options):
    options = {"img_size": (24, 32), "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": HEADS} | options
    return timm.models.VisionTransformer(num_classes=0, mlp_ratio=1, **options).double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_swapped_model(kind):
    prefix = {} if kind not in AXIAL_KINDS else {"class_token": False, "global_pool": "avg"}
    num_prefix = 0 if prefix else 1
    model = make_vit(**prefix)
    decay = {"kind": kind, "gate_bias_init": 0.0} if GATES_OF_KIND.get(kind) else kind
    swap_attention(model, decay, num_prefix_tokens=num_prefix)
    images = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    seen = []  # q, k, v as timm makes them, and the tokens
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].clone())))
    records = viz.record(model, images)
    assert [record.name for record in records] == ["blocks.0.attn", "blocks.1.attn"]
    for record, (module, x) in zip(records, seen, strict=True):
        q, k, _ = module.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        core, layout = module.spatial_decay, Grid(*SIZE, num_prefix)
        assert (record.kind, record.layout) == (core.decay.kind, layout)
        features = q.transpose(1, 2).flatten(2) if kind == "gaussian" else x
        mask = core.decay(features, layout)
        gates = record.gates()
        assert list(gates) == GATES_OF_KIND.get(kind, [])
        for name, gate in gates.items():
            expected = getattr(core.decay, name)(x)[:, num_prefix:].transpose(1, 2).unflatten(-1, SIZE)
            torch.testing.assert_close(gate, expected.detach())
        for i, query in enumerate(as_queries()):
            if kind in AXIAL_KINDS:
                expected = attention_weights(q, k, core.decay.describe(features, layout))
            else:
                mask = torch.zeros(13, 13, dtype=torch.float64) if mask is None else mask
                expected = (q @ k.mT * q.shape[-1] ** -0.5 + mask).softmax(-1)
                factor = mask.expand(2, HEADS, -1, -1)[:, :, num_prefix + i, num_prefix:].exp()
                torch.testing.assert_close(record.decay(query).flatten(2), factor.detach())
            row = expected[:, :, num_prefix + i, num_prefix:].detach()
            torch.testing.assert_close(record.attention(query).flatten(2), row)


def test_a_swapped_module_alone_has_the_name_of_its_class():
    model = make_vit()
    swap_attention(model, "full")
    host = model.blocks[0].attn
    model.forward_features(torch.zeros(1, 3, 24, 32, dtype=torch.float64))  # the layout is noted by the whole model
    assert [record.name for record in viz.record(host, torch.zeros(1, 13, DIM).double())] == [type(host).__name__]


def test_attention_as_attn_layer_of_timm():
    attention_layer = importlib.import_module("spatial_decay.integrations.timm").attention_layer
    model = make_vit(img_size=32, attn_layer=attention_layer("1d"))
    seen = []
    model.blocks[1].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    records = viz.record(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert [record.name for record in records] == ["blocks.0.attn", "blocks.1.attn"]
    attn = model.blocks[1].attn
    expected = attn.attention_weights(seen[0]).detach()
    torch.testing.assert_close(records[1].attention((1, 2)).flatten(2), expected[:, :, 7, 1:])
    torch.testing.assert_close(records[1].decay((1, 2)).flatten(2), attn.decay(seen[0]).exp().detach()[:, :, 7, 1:])


def test_sdt_p():
    model = SDTP(8, 2, 4, 10, dim=DIM, depth=2, num_heads=HEADS, mlp_ratio=1, gate_rank=2).double().eval()
    for block in model.blocks:
        nn.init.normal_(block.modulation.weight)  # else all blocks are nothing at first
        nn.init.normal_(block.modulation.bias)
    seen = []
    model.blocks[1].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    latents = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    records = viz.record(model, latents, torch.tensor([3, 700]), y=torch.tensor([0, 10]))
    assert [record.name for record in records] == ["blocks.0.attn", "blocks.1.attn"]
    attn, layer = model.blocks[1].attn, records[1]
    assert layer.layout == Grid(*SIZE)
    gate = attn.decay.gate(seen[0]).transpose(1, 2).unflatten(-1, SIZE).detach()
    torch.testing.assert_close(layer.gates()["gate"], gate)
    mask = attn.decay(seen[0], SIZE).detach()
    torch.testing.assert_close(layer.decay((1, 2)).flatten(2), mask.exp()[:, :, 6])
    expected = attn.attention_weights(seen[0], SIZE).detach()
    torch.testing.assert_close(layer.attention((1, 2)).flatten(2), expected[:, :, 6])


def test_a_layer_that_is_called_twice():
    attn = SpatialDecayAttention(DIM, HEADS).eval()
    x = torch.randn(1, 4, DIM)
    first, second = viz.record(nn.Sequential(attn, attn), x)
    assert (first.name, second.name) == ("0", "0")
    torch.testing.assert_close(second.gates()["gate"].flatten(2), attn.decay.gate(attn(x)).mT.detach())
    assert not torch.equal(first.gates()["gate"], second.gates()["gate"])


def test_tokens_that_fill_no_grid():
    attn = SpatialDecayAttention(DIM, HEADS, lpe_kernel_size=0)
    positions = Positions(torch.tensor([[0, 0, 2]]), torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match=r"SpatialDecayAttention needs a whole grid.*Positions of 3 tokens"):
        viz.record(attn, torch.zeros(1, 3, DIM), positions)


def test_a_model_without_attention_with_decay():
    with pytest.raises(ValueError, match="Linear without any"):
        viz.record(nn.Linear(2, 2), torch.zeros(1, 2))


def test_attention_that_is_not_called():
    class Other(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.attn = SpatialDecayAttention(DIM, HEADS)

    with pytest.raises(ValueError, match="must run the model's attention with decay.*Other with 1 of them, none of"):
        viz.record(Other(), torch.zeros(1, 2))


@pytest.mark.parametrize("part", [False, True], ids=["model", "part"])
def test_what_was_compiled_before_is_recorded_all_the_same(part):
    torch._dynamo.reset()
    model, images = make("full")
    expected = viz.record(model, images)
    if part:
        model.first.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        out = compiled(images)
    records = viz.record(compiled, images)
    assert len(records) == len(expected) == 2
    for record, plain in zip(records, expected, strict=True):
        assert torch.equal(record.gates()["gate"], plain.gates()["gate"])
        assert torch.equal(record.attention((1, 2)), plain.attention((1, 2)))
    with torch.no_grad():
        assert torch.equal(compiled(images), out)  # still compiled, and the same


@pytest.mark.parametrize("query", [(3, 0), (0, 4), (-1, 0)])
def test_a_query_off_the_grid(query):
    model, images = make("full")
    layer = viz.record(model, images)[0]
    for look in (layer.decay, layer.attention):
        with pytest.raises(ValueError, match="grid of first.attn, 3 x 4"):
            look(query)


@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_has_the_maps_of_the_whole(kind, num_prefix):
    if num_prefix and kind in AXIAL_KINDS:
        return
    model, images = make(kind, num_prefix)
    mask = torch.randn(2, 1, 1, num_prefix + 12, dtype=torch.float64)
    layer = viz.record(model, images, attn_mask=mask)[1]
    for image, heads in ((1, [1, 0]), (0, [1])):
        part = layer.select([image], heads)
        torch.testing.assert_close(part.decay((1, 2)), layer.decay((1, 2))[[image]][:, heads])
        torch.testing.assert_close(part.attention((1, 2)), layer.attention((1, 2))[[image]][:, heads])
        for name, gate in part.gates().items():
            assert torch.equal(gate, layer.gates()[name][[image]][:, heads])


@pytest.mark.parametrize("mask_shape", [(12,), (12, 12), (2, 1, 12, 12)], ids=str)
def test_weights_are_those_of_ops_with_masks_that_leave_nothing(mask_shape):
    model, images = make("full")
    may_attend = torch.rand(mask_shape) < 0.5
    if len(mask_shape) > 1:
        may_attend[..., 3, :] = False
    layer = viz.record(model, images, attn_mask=may_attend)[1]
    expected = attention_weights(layer.q, layer.k, layer.added, attn_mask=may_attend)
    for queries in (torch.arange(12), torch.tensor([7, 3])):
        torch.testing.assert_close(layer.weights(queries), expected[:, :, queries])


def test_without_decay_and_decay_alone():
    model, images = make("decomposed")
    layer = viz.record(model, images)[1]
    plain = layer.without_decay()
    assert (plain.kind.name, plain.gates()) == ("none", {})
    expected = (layer.q @ layer.k.mT * layer.q.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(plain.attention((1, 2)).flatten(2), expected[:, :, 6])
    model, images = make("full")
    layer = viz.record(model, images)[1]
    decay = layer.decay((1, 2))
    torch.testing.assert_close(layer.decay_alone().attention((1, 2)), decay / decay.sum((2, 3), keepdim=True))


@pytest.mark.parametrize("chosen", [([], [0]), ([2], [0]), ([0], [2]), ([0], [])], ids=str)
def test_a_part_that_is_not_there(chosen):
    model, images = make("full")
    with pytest.raises(ValueError, match=r"of first.attn must be numbers from 0 to 1, one or more: got"):
        viz.record(model, images)[0].select(*chosen)


def test_its_repr_fits_on_a_line():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48, num_heads=3, img_size=64)
    swap_attention(model)
    (layer,) = viz.record(model, torch.randn(1, 3, 64, 64))
    assert repr(layer) == "LayerRecord('blocks.0.attn', 'full', 4 x 4 patches, q: float32 (1, 3, 17, 16))"
