"""swap_attention in other people's models: nothing without decay, the equation's mask with it, training, copies."""

import copy

import onnxruntime
import pytest
import torch
from timm.layers import PatchDropout
from torch import nn

import spatial_decay as sd
from tests.cases import relative_error
from tests.swap.checks import check_compiled, check_full, check_gradients, check_no_decay, gradients, set_checkpointing
from tests.swap.hosts import HOSTS, STRONG, pickled, traces

EVERY_HOST = pytest.mark.parametrize("host", HOSTS, ids=str)
EVERY_CODE = pytest.mark.parametrize(
    "host", [pytest.param(host, marks=pytest.mark.slow if host.is_copy else ()) for host in HOSTS], ids=str
)
SOME = ["timm vit_tiny_patch16_224", "timm eva02_tiny_patch14_224", "transformers DINOv3", "diffusers DiT"]
JOINT = ["diffusers Stable Diffusion 3", "diffusers Flux"]
BY_NAME = {host.name: host for host in HOSTS}
SOME_HOSTS = pytest.mark.parametrize("host", [host for host in HOSTS if host.name in SOME], ids=str)


@EVERY_HOST
def test_no_decay_changes_nothing_and_restoring_leaves_nothing(host):
    check_no_decay(host)


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
    check_full(host)


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


@EVERY_HOST
def test_gates_get_gradients_also_with_checkpointing(host):
    check_gradients(host)


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
    check_compiled(host, "eager")  # below, what comes behind the graph too
    model = host.make()
    sd.swap_attention(model, STRONG)
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
