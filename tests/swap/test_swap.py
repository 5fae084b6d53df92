"""What swap_attention takes, leaves and refuses; patch dropout, packed images, threads, and passes that overlap."""

import copy
import json
import threading
from functools import partial

import pytest
import timm
import torch
import torch.utils.checkpoint
import transformers
from torch import nn

import spatial_decay as sd
from spatial_decay.layers.kinds import as_kind
from spatial_decay.layout import Grid, Positions
from tests.cases import relative_error
from tests.swap.hosts import HF, HOSTS, SMALL, STRONG, pickled, traces

BY_NAME = {host.name: host for host in HOSTS}
VIT = BY_NAME["timm vit_tiny_patch16_224"]


def vit(**options):
    options = SMALL | {"num_classes": 10, "img_size": 64, "dynamic_img_size": True} | options
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **options)


def test_the_report_names_all_and_why():
    model = vit(depth=4)
    report = sd.swap_attention(model, "fixed", layers=[0, -1])
    assert report.replaced == ("blocks.0.attn", "blocks.3.attn")
    assert report.left == {"blocks.1.attn": "it is not in layers", "blocks.2.attn": "it is not in layers"}
    assert str(report).splitlines() == [
        "decay 'fixed' in 2 attention modules, 0 new parameters",
        "attention        class      heads  new parameters  grid from",
        "blocks.0,3.attn  Attention      3           2 x 0  patch_embed.proj",
        "left as it was: blocks.1-2.attn, because it is not in layers",
        "next: fine-tune; the outputs have changed, and no weight is new",
    ]
    assert isinstance(model.blocks[0].attn, timm.layers.Attention)
    assert not any("spatial_decay" in name for name, _ in model.blocks[1].named_parameters())


def test_options_reach_the_layers():
    model = vit().double()
    decay = sd.kinds.Full(alpha=0.3, gate_bias_init=1.5)
    sd.swap_attention(model, decay, lpe_kernel_size=5, gate_rank=2, backend="math")
    added = model.blocks[0].attn.spatial_decay
    assert (added.decay.kind.alpha, added.decay.gate.bias[0].item(), added.attention.backend) == (0.3, 1.5, "math")
    assert added.lpe.conv.kernel_size == (5, 5)
    assert added.decay.gate.weight.dtype == added.output_gate.down.dtype == torch.float64
    sd.restore_attention(model)
    sd.swap_attention(model, sd.kinds.Gaussian(reference_grid=(4, 4)))
    assert model.blocks[0].attn.spatial_decay.decay.gaussian.reference_grid == (4, 4)


@pytest.mark.parametrize("decay", [sd.kinds.Decomposed(gate_bias_init=0.0), sd.kinds.FixedDecomposed()])
def test_decomposed_kinds_run_where_there_are_no_prefix_tokens(decay):
    host = BY_NAME["a DiT of timm's layers"]
    model = host.make()
    sd.swap_attention(model, decay)
    attn, x = model.blocks[0].attn, torch.randn(2, 24, 48)
    with torch.no_grad():
        model.x_embedder(host.images((8, 12)))
        with pytest.raises(RuntimeError, match="4 x 6 patches behind 0 prefix tokens, and attention got L = 16"):
            attn(x[:, :16])
        q, k, v = attn.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        expected = sd.decay_attention(q, k, v, attn.spatial_decay.decay.describe(x, (4, 6)))
        assert relative_error(attn(x), attn.proj(expected.transpose(1, 2).flatten(2))) < 1e-6
        assert host.run(model, host.images((8, 12))).isfinite().all()


@pytest.mark.parametrize(
    ("name", "num_prefix"),
    [("vit_tiny_patch16_224", 1), ("eva02_tiny_patch14_224", 1), ("naflexvit_base_patch16_gap", 4)],
)
def test_patch_dropout_carries_positions(name, num_prefix):
    options = {} if "naflex" in name else {"img_size": 64, "dynamic_img_size": True, "patch_size": 16}
    model = timm.create_model(name, patch_drop_rate=0.5, num_classes=10, **SMALL | options).train()
    images = torch.randn(2, 3, 64, 96)

    def run():
        torch.manual_seed(3)
        return model(images)

    before = run()
    sd.swap_attention(model, "none")
    assert torch.equal(run(), before)
    sd.restore_attention(model)
    assert torch.equal(run(), before)

    sd.swap_attention(model, STRONG)
    attn, seen = model.blocks[0].attn, []
    hook = attn.register_forward_pre_hook(lambda _, args: seen.append(attn.spatial_decay.calls.layout_of(args[0])))
    run()
    hook.remove()
    (positions,) = seen
    assert isinstance(positions, Positions)
    assert positions.num_tokens == num_prefix + 12
    # The same numbers that timm has drawn, in its order.
    torch.manual_seed(3)
    kept = torch.argsort(torch.randn(2, 24), dim=-1)[:, :12]
    assert torch.equal(positions.h[:, num_prefix:], kept // 6)
    assert torch.equal(positions.w[:, num_prefix:], kept % 6)

    plain = {name: weight.grad for name, weight in gradients_of(model, run).items()}
    model.set_grad_checkpointing()
    for name, weight in gradients_of(model, run).items():
        torch.testing.assert_close(weight.grad, plain[name], rtol=1e-5, atol=1e-6)
    model.eval()
    sd.restore_attention(model)
    assert type(model.patch_drop).__name__ in ("PatchDropout", "PatchDropoutWithIndices")


@pytest.mark.parametrize("decay", ["full", "1d", "bidirectional", "fixed", "gaussian", "none"])
def test_a_name_a_value_and_a_mapping_are_the_same(decay):
    images, outputs, options = torch.randn(1, 3, 64, 96), [], []
    for given in (decay, type(as_kind(decay))(), {"kind": decay}):
        model = vit().eval()
        report = sd.swap_attention(model, given)
        added = model.blocks[0].attn.spatial_decay
        assert added.decay.kind == report.kind
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".spatial_decay." in name and weight.ndim > 1:
                    weight.copy_(torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight))
            outputs.append(model(images))
        options.append(added.options)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert options[0] == options[1] == options[2]
    assert json.loads(json.dumps(options[0])) == options[0]
    assert {name for name, value in options[0]["decay"].items() if value is None} <= {"reference_grid"}  # off


def test_what_is_said_of_a_kind_comes_before_its_quiet_start():
    model = vit()
    assert sd.swap_attention(model, "full").kind == sd.kinds.Full(alpha=0.1, gate_bias=True, gate_bias_init=6.0)
    sd.restore_attention(model)
    report = sd.swap_attention(model, {"kind": "1d", "gate_bias": False})
    assert report.kind == sd.kinds.OneDimensional(causal=False, gate_bias=False, gate_bias_init=0.0)
    assert [name for name, _ in model.blocks[0].attn.spatial_decay.named_parameters()] == ["decay.gate.weight"]


def gradients_of(model, run):
    model.zero_grad(set_to_none=True)
    run().square().sum().backward()
    return {name: weight for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_images_are_each_alone(dtype):
    host = BY_NAME["timm naflexvit_base_patch16_gap"]
    model = host.make().to(dtype)
    sd.swap_attention(model, STRONG)
    images = [torch.randn(3, *size, dtype=dtype) for size in ((64, 96), (96, 48), (32, 32))]
    with torch.no_grad():
        together = model(packed(images, 30))
        for image, out in zip(images, together, strict=True):
            assert out.isfinite().all()
            assert relative_error(out, model(image[None])[0]) < (1e-5 if dtype == torch.float32 else 2e-2)


def packed(images, num_tokens):
    """NaFlex's batch: patches, their coordinates, and which are there; the padding's coordinates are nonsense."""
    patches = torch.zeros(len(images), num_tokens, 768, dtype=images[0].dtype)
    coordinates = torch.zeros(len(images), num_tokens, 2, dtype=torch.long)
    valid = torch.zeros(len(images), num_tokens, dtype=torch.bool)
    for i, image in enumerate(images):
        height, width = image.shape[1] // 16, image.shape[2] // 16
        of_image = image.unflatten(2, (width, 16)).unflatten(1, (height, 16)).permute(1, 3, 2, 4, 0)
        number = torch.arange(height * width)
        patches[i, : height * width] = of_image.flatten(0, 1).flatten(1)
        coordinates[i, : height * width] = torch.stack([number // width, number % width], -1)
        valid[i, : height * width] = True
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


def test_threads_do_not_see_each_others_images():
    model = vit().eval()
    sd.swap_attention(model, STRONG)
    sizes = [(64, 96), (96, 64), (48, 128), (128, 48)]  # 24 patches each
    images = {size: torch.randn(1, 3, *size) for size in sizes}
    with torch.no_grad():
        expected = {size: model(image) for size, image in images.items()}
        wrong, start = [], threading.Barrier(len(sizes))

        def run(size):
            start.wait()
            with torch.no_grad():
                wrong.extend(size for _ in range(20) if not torch.equal(model(images[size]), expected[size]))

        threads = [threading.Thread(target=run, args=(size,)) for size in sizes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_whole_models_inside_a_checkpoint():
    model = vit(patch_drop_rate=0.5).train()
    sd.swap_attention(model, STRONG)
    wide, high = torch.randn(1, 3, 64, 96), torch.randn(1, 3, 96, 64)

    def run(checkpointed):
        torch.manual_seed(0)
        call = partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=False) if checkpointed else model
        return torch.cat([call(wide), call(high)])

    plain = {name: weight.grad for name, weight in gradients_of(model, lambda: run(checkpointed=False)).items()}
    for name, weight in gradients_of(model, lambda: run(checkpointed=True)).items():
        torch.testing.assert_close(weight.grad, plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_in_parts(dynamic):
    """Where the graph breaks behind the patch embedding, and where that alone is compiled."""
    torch._dynamo.reset()
    model, broken = vit().eval(), vit().eval()
    broken.norm_pre = Break()
    sd.swap_attention(model, STRONG)
    sd.swap_attention(broken, STRONG)
    broken.load_state_dict(model.state_dict())
    wide, high = torch.randn(2, 3, 64, 96), torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected = {wide: model(wide), high: model(high)}
        broken(high)
        compiled = torch.compile(broken, backend="eager", dynamic=dynamic)
        model.patch_embed.compile(backend="eager", dynamic=dynamic)
        for images in (wide, high, wide):
            assert relative_error(compiled(images), expected[images]) < 1e-5
            assert relative_error(model(images), expected[images]) < 1e-5


class Break(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


def test_packed_images_compiled():
    """timm's own torch.compiler.disable breaks the graph between NaFlex's embedding and its blocks."""
    torch._dynamo.reset()
    model = BY_NAME["timm naflexvit_base_patch16_gap"].make()
    sd.swap_attention(model, STRONG)
    first, second = (packed([torch.randn(3, *size)], 24) for size in ((64, 96), (48, 128)))
    with torch.no_grad():
        expected = model(first)
        model(second)
        assert relative_error(torch.compile(model, backend="eager")(first), expected) < 1e-5


class Two(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, wide, high):
        return torch.cat([self.a(wide), self.b(high)])


def test_two_towers_have_a_grid_each():
    naflex = timm.create_model("naflexvit_base_patch16_gap", num_classes=10, **SMALL)
    model = Two(naflex, vit(patch_drop_rate=0.5)).eval()
    wide, high = torch.randn(3, 3, 64, 96), torch.randn(3, 3, 96, 64)
    sd.swap_attention(model, STRONG)
    with torch.no_grad():
        assert torch.equal(model(wide, high), torch.cat([model.a(wide), model.b(high)]))
        sd.restore_attention(model)
        sd.swap_attention(model, STRONG, layers=[0, 1])
        assert torch.equal(model(wide, high)[:3], model.a(wide))
    assert model.train()(wide, high).isfinite().all()


def test_a_replaced_patch_embedding_is_no_stale_grid():
    model = vit().eval()
    sd.swap_attention(model)
    model(torch.randn(1, 3, 64, 96))
    model.set_input_size(img_size=64, patch_size=8)
    with pytest.raises(RuntimeError, match="swap again where the patch embedding was replaced"):
        model(torch.randn(1, 3, 32, 48))


def test_calling_a_block_without_the_model_is_an_error():
    model = vit()
    sd.swap_attention(model)
    with pytest.raises(RuntimeError, match="no image has come through the patch embedding"):
        model.blocks[0](torch.randn(1, 17, 48))


def test_class_tokens_that_the_model_does_not_tell_of():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 48, 16, 16)
            self.token = nn.Parameter(torch.zeros(1, 1, 48))
            self.attn = timm.layers.Attention(48, 3)

        def forward(self, x):
            x = self.patches(x).flatten(2).mT
            return self.attn(torch.cat([self.token.expand(len(x), -1, -1), x], 1))

    model, images = Own(), torch.randn(1, 3, 64, 96)
    sd.swap_attention(model)
    with pytest.raises(RuntimeError, match="4 x 6 patches behind 0 prefix tokens.*L = 25.*num_prefix_tokens"):
        model(images)
    sd.restore_attention(model)
    sd.swap_attention(model, num_prefix_tokens=1)
    model(images)
    sd.restore_attention(model)
    sd.swap_attention(model, num_prefix_tokens=1, patch_embed="patches")
    model(images)
    model.patches(images)
    assert model.attn.spatial_decay.calls.layout_of(torch.zeros(1, 25, 48)) == Grid(4, 6, num_prefix_tokens=1)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore::UserWarning")
@torch.no_grad()
def test_attention_without_parameters():
    """PyTorch's quantized layers hold their weights packed; the gates read the same tokens as ever."""
    quantization = pytest.importorskip("torch.ao.quantization")  # torch is about to leave it to torchao
    model = quantization.quantize_dynamic(vit().eval(), {nn.Linear})
    assert not list(model.blocks[0].attn.parameters())
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    report = sd.swap_attention(model, STRONG)
    assert len(report.replaced) == 2
    assert relative_error(model(images), expected) > 1e-3
    assert {value.dtype for value in model.blocks[0].attn.spatial_decay.parameters()} == {torch.float32}
    sd.restore_attention(model)
    assert torch.equal(model(images), expected)


def eager_hf():
    return transformers.ViTModel(transformers.ViTConfig(**HF, attn_implementation="eager"))


def unfused():
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def with_own_forward():
    model = vit(depth=1)
    model.blocks[0].attn.forward = model.blocks[0].attn.forward  # as accelerate's hooks do
    return model


def wrapped():
    return type("DistributedDataParallel", (nn.Sequential,), {})(vit())


class TwoStems(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 48, 16, 16), nn.Conv2d(3, 48, 8, 8)
        self.attn = timm.layers.Attention(48, 3)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), {}, "WindowAttention is not known .*window_size="),
        (lambda: nn.Linear(3, 3), {}, "found none\nFor attention of your own"),
        (eager_hf, {}, r"attn_implementation='eager' \(needs 'sdpa'\)"),
        (unfused, {}, r"fused_attn is False"),
        (with_own_forward, {}, "its forward has been replaced on this very module"),
        (TwoStems, {}, "of 2 patch embeddings none is nearest: name it as patch_embed"),
        (wrapped, {}, "before the model is wrapped .* got a DistributedDataParallel at 'the root'"),
        (lambda: vit().blocks, {}, "no patch embedding was found: name as patch_embed the module"),
        (vit, {"decay": "round"}, "kind of decay must be one of"),
        (vit, {"decay": {"kind": "1d", "alpha": 7}}, "kind '1d' has the options .*gate_bias.*: got alpha"),
        (vit, {"decay": {"alpha": 7}}, 'a decay as a mapping must say its "kind"'),
        (vit, {"decay": sd.kinds.Fixed(initial_value=-1.0)}, "needs initial_value"),
        (vit, {"decay": "decomposed"}, "belong to no row or column"),
        (vit, {"layers": [2]}, "2 attention modules, 0 to 1 or negative: got"),
        (vit, {"layers": []}, "one or more: got none. Leave it out for all"),
        (vit, {"patch_embed": "stem"}, "must be the name of a module of the model: got 'stem'"),
        (vit, {"backend": "fast"}, "backend must be 'auto' or one of"),
        (vit, {"decay": "none", "backend": "triton"}, "'none' keeps the model's own softmax.*'auto': got 'triton'"),
        (vit, {"lpe_kernel_size": 4}, "must be odd"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_changes(build, options, message):
    model = build()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        sd.swap_attention(model, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("ending", ["swapped again", "restored as a whole"])
def test_restored_block_by_block(ending):
    model = vit(patch_drop_rate=0.5).train()
    found = traces(model)
    images = torch.randn(2, 3, 64, 96)
    sd.swap_attention(model, STRONG)
    assert sd.restore_attention(model.blocks[0]) == ("attn",)
    assert model(images).isfinite().all()  # the other block works on
    with pytest.raises(ValueError, match="it has no attention with decay"):
        sd.restore_attention(model.patch_embed)  # whose hook the other block needs
    assert model(images).isfinite().all()
    sd.restore_attention(model.blocks[1])
    assert model(images).isfinite().all()
    if ending == "swapped again":
        sd.swap_attention(model, STRONG)
        assert sum(len(module._forward_hooks) for module in model.modules()) == 3  # of patches, dropout, model
        assert model(images).isfinite().all()
        assert sd.restore_attention(model) == ("blocks.0.attn", "blocks.1.attn")
    else:
        assert sd.restore_attention(model) == ()
    assert traces(model) == found
    with pytest.raises(ValueError, match="it has no attention with decay"):
        sd.restore_attention(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_parts_of_copies_keep_what_they_need(copied):
    model = vit(patch_drop_rate=0.5).train()
    found = traces(model)
    sd.swap_attention(model, STRONG)
    other = copied(model)
    sd.restore_attention(model)
    part = nn.Sequential(other.patch_embed, other.patch_drop, other.blocks[0])
    sd.restore_attention(part)
    assert other(torch.randn(2, 3, 64, 96)).isfinite().all()
    other.blocks = other.blocks[:1]  # the rest is gone with its decay
    assert sd.restore_attention(other) == ()
    other.blocks = copy.deepcopy(model.blocks)
    assert traces(other) == traces(model) == found


def test_twice_and_never():
    model = vit()
    with pytest.raises(ValueError, match="it has no attention with decay"):
        sd.restore_attention(model)
    sd.swap_attention(model)
    with pytest.raises(ValueError, match="swapped already"):
        sd.swap_attention(model)


def test_attention_that_turns_causal_or_unfused_later():
    model = vit().eval()
    sd.swap_attention(model)
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="got is_causal=True"):
        model(images, is_causal=True)
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(RuntimeError, match="must hand its attn_mask to F.scaled_dot_product_attention"):
        model(images)


def test_masks_of_the_host_still_count():
    model = vit().eval()
    sd.swap_attention(model, STRONG)
    images = torch.randn(2, 3, 64, 64)
    mask = torch.ones(2, 1, 17, 17, dtype=torch.bool)
    with torch.no_grad():
        assert relative_error(model(images, attn_mask=mask), model(images)) < 1e-6
        mask[:, :, :, 9:] = False
        assert relative_error(model(images, attn_mask=mask), model(images)) > 1e-3
    host = BY_NAME["diffusers DiT"]
    model = host.make()
    x, keys = torch.randn(2, 16, 48), torch.zeros(2, 1, 16)
    keys[:, :, 9:] = -1e4
    attn = model.transformer_blocks[0].attn1
    with torch.no_grad():
        expected = attn(x, attention_mask=keys)
        sd.swap_attention(model, "none")
        model.pos_embed(host.images((8, 8)))
        torch.testing.assert_close(attn(x, attention_mask=keys), expected)
