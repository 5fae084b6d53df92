"""swap_attention in other people's models: nothing without decay, the equation's mask with it, training, copies."""

import copy
import itertools

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from timm.layers import PatchDropout
from torch import nn

import spatial_decay as sd
from tests.cases import relative_error
from tests.swap.hosts import HOSTS, STRONG, InFloat64, full_masks, pickled, traces

EVERY_HOST = pytest.mark.parametrize("host", HOSTS, ids=str)
EVERY_CODE = pytest.mark.parametrize(
    "host", [pytest.param(host, marks=pytest.mark.slow if host.is_copy else ()) for host in HOSTS], ids=str
)
SOME = ["timm vit_tiny_patch16_224", "timm eva02_tiny_patch14_224", "transformers DINOv3", "diffusers DiT"]
JOINT = ["diffusers Stable Diffusion 3", "diffusers Flux"]
BY_NAME = {host.name: host for host in HOSTS}
SOME_HOSTS = pytest.mark.parametrize("host", [host for host in HOSTS if host.name in SOME], ids=str)


def seen_at(module: nn.Module, run) -> tuple[tuple, dict, object]:
    """What a module is called with while run() runs, and what it gives."""
    seen = []
    handle = module.register_forward_hook(lambda _, *call: seen.append(call), with_kwargs=True)
    run()
    handle.remove()
    (call,) = seen
    return call


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@EVERY_HOST
def test_no_decay_changes_nothing_and_restoring_leaves_nothing(host):
    model = host.make()
    names, found = set(model.state_dict()), traces(model)
    with torch.no_grad():
        before = [host.run(model, host.images(size)) for size in host.sizes]
        report = sd.swap_attention(model, "none")
        swapped = [host.run(model, host.images(size)) for size in host.sizes]
        assert len(report.replaced) == 2
        assert tuple(report.left) == host.left
        assert set(model.state_dict()) == names
        assert sd.restore_attention(model) == report.replaced
        restored = [host.run(model, host.images(size)) for size in host.sizes]
    for a, b, c in zip(before, swapped, restored, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert traces(model) == found


@pytest.mark.parametrize("patch_drop_rate", [0.0, 0.5])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, lambda model: pickled(copy.deepcopy(model))])
def test_copies_and_pickles_restore_themselves_alone(copied, patch_drop_rate):
    """Among hooks of the host's own, which stay; attention before the patch embedding is met first by pickle."""
    model = nn.ModuleDict({"vit": BY_NAME["timm vit_tiny_patch16_224"].make()})
    model["vit"].patch_drop = PatchDropout(patch_drop_rate) if patch_drop_rate else nn.Identity()
    model["vit"].patch_embed = model["vit"]._modules.pop("patch_embed")  # last
    model["vit"].norm_pre.register_forward_hook(own_hook)
    found = traces(model)
    sd.swap_attention(model, STRONG)
    swapped = traces(model)
    assert swapped != found
    other = copied(model)
    assert traces(other) == swapped
    handle = other["vit"].norm_pre.register_forward_hook(own_hook)  # an id of its own, after those in the pickle
    assert len(other["vit"].norm_pre._forward_hooks) == 2
    handle.remove()
    sd.restore_attention(other)
    assert traces(other) == found
    assert traces(model) == swapped
    model["vit"].train()(torch.randn(1, 3, 64, 96))
    sd.restore_attention(model)
    assert traces(model) == found


def own_hook(*_):
    """Does nothing."""


@EVERY_CODE
def test_what_was_restored_can_be_swapped_again(host):
    model = host.make()
    found = traces(model)
    sd.swap_attention(model, STRONG)
    other = pickled(model)
    sd.restore_attention(other)
    assert traces(other) == found
    sd.swap_attention(other, "fixed")
    sd.restore_attention(other)
    assert traces(other) == found


@EVERY_HOST
def test_decay_is_the_equation_at_each_size(host):
    model = host.make()
    original = copy.deepcopy(model)
    report = sd.swap_attention(model, STRONG)
    for name, size in itertools.product(report.replaced, host.sizes):
        with torch.no_grad():
            args, kwargs, got = seen_at(model.get_submodule(name), lambda size=size: host.run(model, host.images(size)))
        x = args[0] if args else kwargs["hidden_states"]
        x = original.get_submodule(name).norm(x) if host.has_norm else x
        gate = model.get_submodule(name).spatial_decay.decay.gate
        before, behind = host.prefix_of.get(name, host.num_prefix_tokens), host.num_suffix_tokens
        grid = host.grid(size)
        masks = full_masks(gate, x[:, before : x.shape[1] - behind], grid, host.kept and host.kept(grid))
        before, behind = (a + b for a, b in zip((before, behind), host.text.get(name, (0, 0)), strict=True))
        masks = F.pad(masks, (before, behind, before, behind))
        with torch.no_grad(), InFloat64(masks):
            expected = first(original.get_submodule(name)(*args, **kwargs))
        assert relative_error(first(got), expected) < 2e-6
        with torch.no_grad():
            assert relative_error(first(original.get_submodule(name)(*args, **kwargs)), expected) > 1e-3


@pytest.mark.parametrize("kind", ["full", "1d", "bidirectional"])
@EVERY_CODE
def test_it_starts_from_the_behaviour_that_the_model_has(host, kind):
    model = host.make()
    with torch.no_grad():
        before = host.run(model, host.images(host.sizes[-1]))
        sd.swap_attention(model, kind)
        after = host.run(model, host.images(host.sizes[-1]))
    change = ((after - before).norm() / before.norm()).item()
    assert 0 < change < 0.01


@pytest.mark.parametrize("kind", ["full", "1d", "bidirectional"])
def test_so_it_does_on_large_grids(kind):
    (host,) = (host for host in HOSTS if host.name == "a DiT of timm's layers")
    model, images = host.make(), host.images((56, 56), batch_size=1)  # 784 tokens: sums along a path grow with them
    with torch.no_grad():
        before = host.run(model, images)
        sd.swap_attention(model, kind)
        change = ((host.run(model, images) - before).norm() / before.norm()).item()
    assert 0 < change < 0.01


def gradients(host, model, size):
    model.zero_grad()
    torch.manual_seed(2)
    host.run(model, host.images(size)).square().sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def set_checkpointing(model):
    for name in ("set_grad_checkpointing", "activation_checkpointing_enable", "enable_gradient_checkpointing"):
        if hasattr(model, name):
            getattr(model, name)()
            return
    pytest.fail(f"{type(model).__name__} offers no gradient checkpointing that this test knows")


@EVERY_HOST
def test_gates_get_gradients_also_with_checkpointing(host):
    model = host.make().train()
    report = sd.swap_attention(model, STRONG, lpe_kernel_size=0 if host.kept else 3, gate_rank=4)
    plain = gradients(host, model, host.sizes[-1])
    new = [name for name in plain if ".spatial_decay." in name]
    # gate and its bias, output gate's two, and LPE, which needs a whole grid, and its bias
    assert len(new) == len(report.replaced) * (4 if host.kept else 6)
    # Those of the last module reach no class token, which is all that some models read of it.
    assert all(plain[name].any() for name in new if name.startswith(f"{report.replaced[0]}."))
    if not host.has_checkpointing:
        return
    set_checkpointing(model)
    again = gradients(host, model, host.sizes[-1])
    assert set(again) == set(plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6)


@EVERY_CODE
def test_autocast(host):
    model = host.make()
    sd.swap_attention(model, STRONG)
    full = host.run(model, host.images(host.sizes[0]))
    with torch.autocast("cpu", torch.bfloat16):
        half = host.run(model, host.images(host.sizes[0]))
    assert half.isfinite().all()
    assert relative_error(half.detach(), full.detach()) < 0.1
    half.float().square().sum().backward()
    assert all(
        weight.grad is not None and weight.dtype == torch.float32
        for name, weight in model.named_parameters()
        if ".spatial_decay." in name
    )


@SOME_HOSTS
def test_copies_and_pickles_are_models_of_their_own(host):
    model = host.make()
    sd.swap_attention(model, STRONG)
    with torch.no_grad():
        expected = host.run(model, host.images(host.sizes[-1]))
        for other in (copy.deepcopy(model), pickled(model)):
            host.run(model, host.images(host.sizes[0]))  # another size through the original
            assert torch.equal(host.run(other, host.images(host.sizes[-1])), expected)
            sd.restore_attention(other)
            host.run(other, host.images(host.sizes[-1]))
        assert torch.equal(host.run(model, host.images(host.sizes[-1])), expected)


@pytest.mark.parametrize(
    "host",
    [
        pytest.param(host, marks=() if str(host).startswith("timm vit") else pytest.mark.slow)
        for host in HOSTS
        if host.name in [*SOME, "transformers Data2VecVision", "vit-pytorch ViT", *JOINT]
    ],
    ids=str,
)
def test_compiles_whole_at_each_size_and_with_checkpointing(host):
    torch._dynamo.reset()
    model = host.make()
    sd.swap_attention(model, STRONG)
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # below, what comes behind the graph too
    for size in host.sizes:
        with torch.no_grad():
            got, expected = host.run(compiled, host.images(size)), host.run(model, host.images(size))
        assert relative_error(got, expected) < 1e-5
    model.train()
    if host.has_checkpointing:
        set_checkpointing(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = gradients(host, model, host.sizes[0])
    plain = {name: gradient.clone() for name, gradient in plain.items()}
    again = gradients(host, compiled, host.sizes[0])
    for name, gradient in plain.items():  # of what is not used it gives zeros
        torch.testing.assert_close(again[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-5)


@SOME_HOSTS
def test_exports_and_runs_in_onnxruntime(host, tmp_path):
    model = host.make()
    sd.swap_attention(model, STRONG)

    class Run(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return host.run(self.model, x)

    x = host.images(host.sizes[0])
    if host.name == "timm vit_tiny_patch16_224":
        file = str(tmp_path / "vit.onnx")
        torch.onnx.export(
            model, (x,), file, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
        )
        session, more = onnxruntime.InferenceSession(file), host.images(host.sizes[0], batch_size=5)
        (got,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
        with torch.no_grad():
            assert relative_error(torch.from_numpy(got), host.run(model, more)) < 1e-4
    exported = torch.export.export(Run(), (x,)).module()
    with torch.no_grad():
        assert relative_error(exported(x), host.run(model, x)) < 1e-5
