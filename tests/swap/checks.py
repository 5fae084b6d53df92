"""What must hold of every model of HOSTS: the tests ask it, and the table of the hosts prints it."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spatial_decay as sd
from tests.cases import relative_error
from tests.swap.hosts import STRONG, HostModel, InFloat64, full_masks, traces

LARGEST_ERROR = {"full": 2e-6, "compiled": 1e-5}
"""Relative, in float32: of attention with decay against the equations in float64; of a compiled model against itself
as it is."""


def check_no_decay(host: HostModel) -> None:
    """Kind `none` is the model as it was, bit for bit at each size, and a model that is restored is so too."""
    model = host.make()
    names = set(model.state_dict())
    with torch.no_grad():
        before = [host.run(model, host.images(size)) for size in host.sizes]
        found = traces(model)  # transformers puts hooks of its own in where a first call asks for hidden states
        report = sd.swap_attention(model, "none")
        swapped = [host.run(model, host.images(size)) for size in host.sizes]
        assert len(report.replaced) == 2
        assert tuple(report.left) == host.left
        assert set(model.state_dict()) == names
        assert sd.restore_attention(model) == report.replaced
        restored = [host.run(model, host.images(size)) for size in host.sizes]
    for a, b, c in zip(before, swapped, restored, strict=True):
        assert torch.equal(a, b), "its outputs with kind 'none' are not the same bits"
        assert torch.equal(a, c), "its outputs after restore_attention are not the same bits"
    assert traces(model) == found


def check_full(host: HostModel) -> float:
    """Each attention with kind `full` is the equation at each size; the largest relative error."""
    model = host.make()
    original = copy.deepcopy(model)
    report = sd.swap_attention(model, STRONG)
    errors = []
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
        errors.append(relative_error(first(got), expected))
        with torch.no_grad():  # the decay is strong enough to be seen
            assert relative_error(first(original.get_submodule(name)(*args, **kwargs)), expected) > 1e-3
    assert max(errors) < LARGEST_ERROR["full"], f"its error is {max(errors):.1e}"
    return max(errors)


def check_gradients(host: HostModel) -> None:
    """All that a swap adds gets a gradient, and the same with gradient checkpointing where the model offers it."""
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


def check_compiled(host: HostModel, backend: str) -> float:
    """One graph without breaks at each size, by a backend of torch.compile; the largest relative error."""
    torch._dynamo.reset()
    model = host.make()
    sd.swap_attention(model, STRONG)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    errors = []
    for size in host.sizes:
        with torch.no_grad():
            errors.append(relative_error(host.run(compiled, host.images(size)), host.run(model, host.images(size))))
    assert max(errors) < LARGEST_ERROR["compiled"], f"its error is {max(errors):.1e}"
    return max(errors)


def check_compiles(host: HostModel) -> None:
    """The model as it is, without decay, is one graph."""
    torch._dynamo.reset()
    with torch.no_grad():
        host.run(torch.compile(host.make(), fullgraph=True, backend="eager"), host.images(host.sizes[0]))


def gradients(host: HostModel, model: nn.Module, size: tuple[int, int]) -> dict[str, Tensor]:
    """Of the square of the outputs, by the names of the weights."""
    model.zero_grad()
    torch.manual_seed(2)
    host.run(model, host.images(size)).square().sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def set_checkpointing(model: nn.Module) -> None:
    """Turn gradient checkpointing on, as the model's library names it."""
    for name in ("set_grad_checkpointing", "activation_checkpointing_enable", "enable_gradient_checkpointing"):
        if hasattr(model, name):
            getattr(model, name)()
            return
    raise AssertionError(f"{type(model).__name__} offers no gradient checkpointing that this check knows")


def seen_at(module: nn.Module, run: Callable[[], Any]) -> tuple[tuple, dict, Any]:
    """What a module is called with while run() runs, and what it gives."""
    seen = []
    handle = module.register_forward_hook(lambda _, *call: seen.append(call), with_kwargs=True)
    run()
    handle.remove()
    (call,) = seen
    return call


def first(output: Any) -> Tensor:
    """The tensor that an attention module gives, alone or first of several."""
    return output if isinstance(output, Tensor) else output[0]
