"""Passes through a swapped model that overlap, nest, end early or are computed again; and copies of parts of it."""

import copy
import itertools
import threading
from functools import partial
from random import Random

import peft
import pytest
import timm
import torch
import torch.utils.checkpoint
import transformers
from timm.layers import set_reentrant_ckpt
from torch import nn

import spatial_decay as sd
from tests.swap.hosts import HF, SMALL, STRONG, pickled, traces

WIDE, HIGH, HALF = (64, 96), (96, 64), (64, 48)  # the first two have 24 patches each


def images(size):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(sum(size) + size[0]))


def vit(**options):
    torch.manual_seed(0)
    given = SMALL | {"num_classes": 10, "img_size": 64, "dynamic_img_size": True} | options
    model = timm.create_model("vit_tiny_patch16_224", **given).train()
    sd.swap_attention(model, STRONG)
    return model


def dinov2():
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**HF, mlp_ratio=2)).train()
    sd.swap_attention(model, STRONG)
    return model


def run_timm(model, x):
    return model.forward_features(x)


def run_transformers(model, x):
    return model(x).last_hidden_state


def gradients(model, run):
    model.zero_grad(set_to_none=True)
    run()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def both_forward_first(call, order):
    losses = [call(images(size)).square().sum() for size in (WIDE, HIGH)]
    for i in order:
        losses[i].backward()


def both_at_once(call):
    (call(images(WIDE)).square().sum() + call(images(HIGH)).square().sum()).backward()


def a_backward_between(call, model):
    wide = call(images(WIDE))
    call(images(HALF)).square().sum().backward()
    model.zero_grad(set_to_none=True)
    call(images(HIGH))
    wide.square().sum().backward()


FROZEN = {
    "nothing": (),
    "embedding": ("patch_embed", "embeddings.patch"),
    "all but gates": ("patch_embed", "pos_embed", "embeddings", "token", "qkv", "query", "key", "value", "mlp", "norm"),
    "all but MLPs": ("patch_embed", "pos_embed", "embeddings", "token", "attn", "attention", "norm1"),
}


QUICK = [("timm", "embedding", True), ("transformers", "all but MLPs", False)]


@pytest.mark.parametrize(
    ("library", "frozen", "use_reentrant"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(["timm", "transformers"], FROZEN, [True, False])
    ],
)
def test_checkpointed_passes_may_overlap(library, frozen, use_reentrant):
    """The libraries' own checkpointing, behind what is frozen, against the same passes without it."""
    model, run = (vit(), run_timm) if library == "timm" else (dinov2(), run_transformers)
    for name, weight in model.named_parameters():
        is_frozen = any(part in name for part in FROZEN[frozen]) and ".spatial_decay." not in name
        weight.requires_grad = not (is_frozen or (frozen == "all but MLPs" and ".spatial_decay." in name))
    if use_reentrant:  # which computes no gradients without an input that has one
        embed = model.patch_embed if library == "timm" else model.embeddings
        embed.register_forward_hook(lambda _module, _args, x: x.requires_grad_())
    call = partial(run, model)
    runs = [
        partial(both_forward_first, call, (0, 1)),
        partial(both_forward_first, call, (1, 0)),
        partial(both_at_once, call),
        partial(a_backward_between, call, model),
    ]
    plain = [gradients(model, run) for run in runs]
    set_reentrant_ckpt(use_reentrant)
    try:
        if library == "timm":
            model.set_grad_checkpointing()
        else:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": use_reentrant})
        again = [gradients(model, run) for run in runs]
    finally:
        set_reentrant_ckpt(False)
    for expected, got in zip(plain, again, strict=True):
        assert set(got) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_pass_of_another_thread_does_not_stop_training(use_reentrant):
    model, kept = vit(), []
    for weight in model.patch_embed.parameters():
        weight.requires_grad = False
    set_reentrant_ckpt(use_reentrant)
    try:
        model.set_grad_checkpointing()
        other = threading.Thread(target=lambda: kept.append(model(images(HIGH))))  # its graph stays
        other.start()
        other.join()
        model(images(WIDE)).sum().backward()
        kept.pop().sum().backward()
    finally:
        set_reentrant_ckpt(False)


def checkpoint(function, *args, use_reentrant=True):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints_within_checkpoints_and_parts_with_the_patch_embedding(use_reentrant):
    model = vit(depth=3)
    call = partial(checkpoint, use_reentrant=use_reentrant)

    def first(x):
        return model.blocks[0](model._pos_embed(model.patch_embed(x)))

    def last(x, inner):
        return inner(model.blocks[2], inner(model.blocks[1], x))

    def run(outer, inner):
        x = [outer(first, images(size).requires_grad_()) for size in (WIDE, HIGH)]
        sum(outer(partial(last, inner=inner), y).square().sum() for y in x).backward()

    plain = gradients(model, lambda: run(lambda f, *args: f(*args), lambda f, *args: f(*args)))
    again = gradients(model, lambda: run(call, call))
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_random_schedules_of_checkpoints_and_backwards():
    """Chance says how many blocks are in a checkpoint, of which kind and nested or not, and which backward is next."""
    model, sizes, random = vit(depth=4), (WIDE, HIGH, (32, 192), (192, 32)), Random(0)

    def loss(size, plan):
        x = model._pos_embed(model.patch_embed(images(size)))
        start = 0
        for width, use_reentrant, is_nested in plan or [(4, None, False)]:
            blocks = model.blocks[start : start + width]
            start += width
            if use_reentrant is None:
                x = nn.Sequential(*blocks)(x)
            elif is_nested:
                x = checkpoint(partial(nested, blocks), x, use_reentrant=use_reentrant)
            else:
                x = checkpoint(nn.Sequential(*blocks), x, use_reentrant=use_reentrant)
        return x.square().sum()

    def nested(blocks, x):
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def train(schedule, plans):
        alive = []
        for step, plan in zip(schedule, plans, strict=True):
            if isinstance(step, tuple):
                alive.append(loss(step, plan))
            elif alive:
                alive.pop(step % len(alive)).backward()
        torch.stack(alive).sum().backward()  # the last step is a pass

    for _ in range(30):
        schedule = [random.choice(sizes) if random.random() < 0.6 else random.randrange(9) for _ in range(8)]
        schedule.append(WIDE)
        plans = [
            [(width, random.choice([True, False, None]), random.random() < 0.3) for width in random.choice(WIDTHS)]
            for _ in schedule
        ]
        plain = gradients(model, partial(train, schedule, [None] * len(schedule)))
        again = gradients(model, partial(train, schedule, plans))
        for name, gradient in plain.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-3, atol=1e-4)


WIDTHS = [(4,), (1, 3), (2, 2), (1, 1, 2), (1, 1, 1, 1)]


def test_two_images_in_one_checkpoint_cannot_be_told_apart():
    model = vit()

    def embed(size):
        return model._pos_embed(model.patch_embed(images(size)))

    def two(x, y):
        return model.blocks[0](x) + model.blocks[0](y)

    wide = embed(WIDE)
    high = embed(HIGH)  # both before either block: the last one counts, as the docs say
    checkpoint(two, wide, high).sum().backward()

    def one_after_the_other(size, other):
        x = model.blocks[0](embed(size))
        return x + model.blocks[0](embed(other))

    plain = gradients(model, lambda: one_after_the_other(WIDE, HIGH).sum().backward())
    again = gradients(model, lambda: checkpoint(one_after_the_other, WIDE, HIGH, use_reentrant=False).sum().backward())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5)

    def after(x, size):
        x = model.blocks[0](x)
        return x + model.blocks[1](embed(size))

    x = embed(WIDE)
    out = checkpoint(after, x, HIGH)
    with pytest.raises(RuntimeError, match="2 that differ, .*4 x 6.*6 x 4.*a checkpoint of its own"):
        out.sum().backward()


class OwnCheckpoint(torch.autograd.Function):
    """One that nobody knows: its forward does not see its context."""

    @staticmethod
    def forward(block, x):
        with torch.no_grad():
            return block(x)

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004  its name is PyTorch's
        ctx.block = inputs[0]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient):
        return computed_again(ctx, gradient)


class HiddenCheckpoint(OwnCheckpoint):
    """Its backward does not look like that of a checkpoint either."""

    @staticmethod
    def backward(context, gradient):
        return computed_again(context, gradient)


def computed_again(context, gradient):
    x = context.saved_tensors[0].detach().requires_grad_()
    with torch.enable_grad():
        context.block(x).backward(gradient)
    return None, x.grad


@pytest.mark.parametrize("unknown", [OwnCheckpoint, HiddenCheckpoint])
def test_what_is_no_known_checkpoint_is_refused(unknown):
    model = vit()
    x = model._pos_embed(model.patch_embed(images(WIDE)))
    out = unknown.apply(model.blocks[0], x)
    with pytest.raises(RuntimeError, match="no image of so many.*with torch.utils.checkpoint.checkpoint"):
        out.sum().backward()


class WithoutContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model, x):
        del ctx
        with torch.no_grad():
            return model(x)


def test_functions_of_somebodys_own_that_look_like_checkpoints():
    model = vit().eval()
    expected = model(images(WIDE))

    def backward(ctx):
        return model(images(WIDE))

    for context in (None, object(), torch.autograd.function.FunctionCtx()):
        assert torch.equal(backward(context), expected)
    assert torch.equal(WithoutContext.apply(model, images(WIDE)), expected)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpoint_that_has_ended_says_nothing_of_one_that_is_not_known(use_reentrant):
    """A checkpoint computes a whole pass again and ends; then, in the same backward pass, the unknown one runs."""
    model = vit()

    def first(x):
        return model.blocks[0](model._pos_embed(model.patch_embed(x)))

    unknown = HiddenCheckpoint.apply(model.blocks[0], model._pos_embed(model.patch_embed(images(WIDE))))
    known = checkpoint(first, images(HIGH).requires_grad_(), use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="no image of so many"):
        (unknown.sum() + known.sum()).backward()


@pytest.mark.slow  # it compiles
def test_compiled_blocks_in_checkpoints_are_refused():
    """What is compiled reads the pass that runs, and in the backward pass none does."""
    torch._dynamo.reset()
    model = vit()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    model.set_grad_checkpointing()
    outputs = [model(images(size)) for size in (WIDE, HIGH)]
    with pytest.raises(RuntimeError, match="compile the whole model rather than its blocks"):
        outputs[0].sum().backward()


@pytest.mark.parametrize("ends", ["well", "in an error"])
@pytest.mark.parametrize("outer", ["model", "forward_features"])
def test_a_hook_may_call_the_model_within_its_own_pass(outer, ends):
    model, inner, depth = vit().eval(), [], []

    def look(module, _args, _output):
        if len(depth) == 2:
            if ends == "in an error":
                raise ValueError("seen enough")
            return
        depth.append(1)
        try:
            inner.append(model(images((HIGH, HALF)[len(depth) - 1])))
        except ValueError:
            inner.append(None)
        depth.pop()

    with torch.no_grad():
        call = model if outer == "model" else model.forward_features
        expected = call(images(WIDE))
        of_high = model(images(HIGH))
        hook = model.pos_drop.register_forward_hook(look)
        assert torch.equal(call(images(WIDE)), expected)
        hook.remove()
    assert len(inner) == 2
    assert (inner[0] is None) == (ends == "in an error")
    assert ends != "well" or torch.equal(inner[1], of_high)


def test_a_pass_leaves_nothing_behind():
    model = vit()
    for run in (lambda: model(images(WIDE)), stop_at_pos_drop(model)):
        run()
        with pytest.raises(RuntimeError, match="no image has come through the patch embedding"):
            model.blocks[0](torch.randn(1, 25, 48))


def stop_at_pos_drop(model):
    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    def run():
        hook = model.pos_drop.register_forward_hook(stop)
        with pytest.raises(StopError):
            model(images(HIGH))
        hook.remove()

    return run


@pytest.mark.parametrize("part", ["blocks.0", "blocks.0.attn", "blocks.0.attn.spatial_decay", "patch_embed", "blocks"])
def test_a_copied_part_works_in_the_model_that_it_came_from(part):
    model = vit(patch_drop_rate=0.0).eval()
    with torch.no_grad():
        expected = [model(images(size)) for size in (WIDE, HIGH)]
        for _ in range(3):  # a copy of a copy too
            model.set_submodule(part, copy.deepcopy(model.get_submodule(part)))
            assert all(torch.equal(model(images(s)), x) for s, x in zip((WIDE, HIGH), expected, strict=True))
        other = copy.deepcopy(model)  # has its own
        hook = model.pos_drop.register_forward_hook(lambda *_: check(torch.equal(other(images(HIGH)), expected[1])))
        assert torch.equal(model(images(WIDE)), expected[0])
        hook.remove()
        sd.restore_attention(model)
        assert torch.equal(other(images(WIDE)), expected[0])
        assert torch.equal(pickled(other)(images(HIGH)), expected[1])


def check(condition):
    assert condition


@pytest.mark.parametrize("wrapped", ["spatial_decay", "patch_embed"])
def test_modules_to_save_of_peft(wrapped):
    """PEFT puts a copy of the part beside it, and calls the copy."""
    model = vit()
    found = traces(timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=10, img_size=64))
    expected = model(images(WIDE)).detach()
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=[wrapped])  # starts as if it were not there
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(adapted(images(WIDE)), expected)
    both = copy.deepcopy(adapted)
    assert torch.equal(both(images(WIDE)), expected)
    adapted(images(WIDE)).sum().backward()
    trained = [name for name, weight in adapted.named_parameters() if f"{wrapped}." in name and weight.grad is not None]
    assert trained
    assert all(".modules_to_save." in name for name in trained)
    with torch.no_grad():
        for weight in both.parameters():
            weight.add_(0.01 * weight.requires_grad)
    before, merged = both(images(WIDE)), both.merge_and_unload()
    assert not torch.equal(before, expected)
    torch.testing.assert_close(merged(images(WIDE)), before)
    sd.restore_attention(merged)
    if wrapped == "spatial_decay":
        sd.restore_attention(adapted.unload())
        assert traces(model) == found


def test_a_copy_keeps_the_hooks_that_it_needs():
    model = vit(patch_drop_rate=0.5).eval()
    found = traces(timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=10, img_size=64, patch_drop_rate=0.5))
    block = copy.deepcopy(model.blocks[0])
    with torch.no_grad():
        sd.restore_attention(model)
        plain = model(images(WIDE))
        model.blocks[0], original = block, model.blocks[0]
        assert not torch.equal(model(images(WIDE)), plain)
        model.blocks[0] = original
        before = traces(model)
        with pytest.raises(ValueError, match="which a copy of a part of it needs .*restore_attention"):
            sd.swap_attention(model, "fixed")
        assert traces(model) == before
        assert sd.restore_attention(block) == ("attn",)
        assert sd.restore_attention(model) == ()
        assert traces(model) == found
    sd.swap_attention(model, "fixed")


def test_torch_jit_trace_is_refused():
    """It would keep the layout of the image that it saw, and say so in warnings of its own alone."""
    with pytest.raises(RuntimeError, match=r"must be exported with torch.export or torch.onnx.export\(dynamo=True\)"):
        torch.jit.trace(vit().eval(), images(WIDE))


def test_a_pickled_part_has_lost_its_model():
    model = vit()
    model.blocks[0] = pickled(model.blocks[0])
    with pytest.raises(RuntimeError, match="pickle the whole model rather than a part"):
        model(images(WIDE))
