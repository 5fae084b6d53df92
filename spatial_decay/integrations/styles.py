"""How one module is split over processes: ParallelStyles for torch's parallelize_module, beside those that it has.

A parameter becomes a DTensor, so that state dicts, optimizers and checkpoints know all of it. The module's own forward
reads the part that its process computes with: its class becomes a subclass with properties of the parameters' names, as
fully_shard makes one. So layers, kernels and operators get plain tensors, and know nothing of processes.
"""

import inspect
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from spatial_decay.decay import AxialDecay, Decay

__all__ = ["DepthwiseByChannels", "FusedByHeads", "HeadsOfAttention", "HeadsOfHost", "Local", "TokensIn"]


class Local(ParallelStyle):
    """The module computes with its process's part of its own parameters, plain tensors in and out.

    Args:
        rows: Names of parameters that are split by their rows: each process has its heads' or its channels'.
        summed: Names of parameters that all processes have whole and each uses for its own heads alone, so that the
            gradient is the sum of theirs. Those in neither are whole, and used for the same on each process.
        heads: Axis of the module's input and output whose parts the processes have; both are DTensors then, for a host
            library's code, which counts all heads. None: plain tensors.
    """

    mixin: type = object

    def __init__(self, *, rows: Collection[str] = (), summed: Collection[str] = (), heads: int | None = None) -> None:
        super().__init__()
        self.rows, self.summed, self.heads = frozenset(rows), frozenset(summed), heads

    def _placement(self, name: str) -> Placement:
        return Shard(0) if name in self.rows else Replicate()

    def _names(self, module: nn.Module) -> tuple[str, ...]:
        """Of the parameters that forward reads as its process's parts."""
        return tuple(name for name, _ in module.named_parameters(recurse=False))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, weight in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(weight.detach(), device_mesh, [self._placement(name)])
            module.register_parameter(name, nn.Parameter(part, requires_grad=weight.requires_grad))
        module.__class__ = _local_class(type(module), self.mixin, self._names(module), self.summed)
        if self.heads is not None:
            module.register_forward_pre_hook(lambda _, args: tuple(map(_to_local, args)))
            module.register_forward_hook(lambda _, __, out: _from_local(out, device_mesh, self.heads))
        return module

    def __repr__(self) -> str:
        said = {"rows": sorted(self.rows), "summed": sorted(self.summed), "heads": self.heads}
        options = [f"{name}={value}" for name, value in said.items() if value not in ([], None)]
        return f"{type(self).__name__}({', '.join(options)})"


class _FusedLinear:
    """A linear layer (3 * D, D) to q, k and v: weight by columns in memory, three times the own heads in use."""

    _parameters: dict[str, Any]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        return F.linear(x, _own_thirds(weight), None if bias is None else _own_thirds(bias))


class FusedByHeads(Local):
    """One linear layer to q, k and v, (3 * N * d, D): each process computes its heads of all three.

    Rows in the model's own order are no process's heads: q, k and v lie one after the other. So the weight lies by
    columns (and the bias whole), which state dicts, checkpoints and fully_shard can say, and goes to heads and back by
    one exchange of its shards, 1 / p of the weight a process.

    Args:
        head_dim: d, for a host library's code: the output is a DTensor (B, L, 3, N, d) then. None: a tensor
            (B, L, 3 * d * N / p).
    """

    mixin = _FusedLinear

    def __init__(self, *, head_dim: int | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim

    def _placement(self, name: str) -> Placement:
        return Shard(1) if name == "weight" else Replicate()

    def _names(self, module: nn.Module) -> tuple[str, ...]:  # noqa: ARG002  none of any
        return ()  # forward takes them itself: a look at the weight's dtype must not exchange it

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)
        head_dim = self.head_dim
        if head_dim is not None:
            module.register_forward_hook(
                lambda _, __, out: _from_local(out.unflatten(-1, (3, -1, head_dim)), device_mesh, 3)
            )
        return module


class _DepthwiseConv2d:
    """As many groups as there are filters here."""

    stride: Any
    padding: Any
    dilation: Any

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, weight.shape[0])


class DepthwiseByChannels(Local):
    """A depthwise nn.Conv2d, each process its channels."""

    mixin = _DepthwiseConv2d

    def __init__(self) -> None:
        super().__init__(rows=("weight", "bias"))


class TokensIn(ParallelStyle):
    """The module's first argument, whole on each process: its gradient is the sum of what each has of its heads.

    One sum for all that reads the tokens: q, k, v, gates and output gate.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        first = next(iter(inspect.signature(module.forward).parameters))
        added = getattr(module, "spatial_decay", None)
        first = first if added is None else added.parameters_of_forward[0]

        def sum_gradients(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (_sum_gradients(args[0], device_mesh), *args[1:]), kwargs
            return args, kwargs | {first: _sum_gradients(kwargs[first], device_mesh)}

        module.register_forward_pre_hook(sum_gradients, with_kwargs=True)
        return module


class HeadsOfAttention(ParallelStyle):
    """DecayAttention among its process's heads: of decays and masks that have all heads, those.

    Args:
        num_heads: N, of all processes.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        num_heads, count = self.num_heads, self.num_heads // device_mesh.size()
        start = device_mesh.get_local_rank() * count

        def own(x: Tensor, axis: int) -> Tensor:
            return x.narrow(axis, start, count) if x.shape[axis] == num_heads else x

        def take_own(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            q, k, v, decay, layout = args
            mask = kwargs.get("attn_mask")
            if mask is not None:
                mask = _sum_gradients(mask, device_mesh)
                mask = own(mask, -3) if mask.ndim > 2 else mask
            return (q, k, v, _map_numbers(decay, lambda x: own(x, 1)), layout), kwargs | {"attn_mask": mask}

        module.register_forward_pre_hook(take_own, with_kwargs=True)
        return module


class HeadsOfHost(ParallelStyle):
    """AddedDecay between DTensors: q, k and v (B, N, L, d) come with their heads split, and so goes the output."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(lambda _, args: tuple(map(_to_local, args)))
        module.register_forward_hook(lambda _, __, out: _from_local(out, device_mesh, 1))
        return module


def _to_local(x: Any) -> Any:
    return x.to_local() if isinstance(x, DTensor) else x


def _from_local(x: Tensor, mesh: DeviceMesh, axis: int | None) -> DTensor:
    assert axis is not None
    return DTensor.from_local(x, mesh, [Shard(axis)], run_check=False)


def _sum_gradients(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x itself; in the backward pass the sum of all processes' gradients."""
    if not x.requires_grad:
        return x
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _own_thirds(parameter: DTensor) -> Tensor:
    """(3 * C, ...) -> (3 * C / p, ...): of q, k and v the rows of this process's heads."""
    thirds = parameter.unflatten(0, (3, -1)).redistribute(placements=[Shard(1)])
    return thirds.to_local().flatten(0, 1)


def _map_numbers(decay: Decay | None, change: Callable[[Tensor], Tensor]) -> Decay | None:
    """The decay of other numbers."""
    if decay is None:
        return None
    if isinstance(decay, AxialDecay):
        rows, columns = (_map_numbers(part, change) for part in (decay.rows, decay.columns))
        return replace(decay, rows=rows, columns=columns)  # type: ignore[arg-type]  # they are no AxialDecay
    names = [field.name for field in fields(decay)]  # type: ignore[arg-type]  # they are dataclasses
    tensors = {name: value for name in names if isinstance(value := getattr(decay, name), Tensor)}
    changed = {name: change(value) for name, value in tensors.items()}
    if all(changed[name] is value for name, value in tensors.items()):
        return decay
    return replace(decay, **changed)  # type: ignore[type-var]  # the same


_Key = tuple[type, type, tuple[str, ...], frozenset[str]]
_CLASSES: dict[_Key, type] = {}


def _local_class(cls: type, mixin: type, names: tuple[str, ...], summed: frozenset[str]) -> type:
    """The subclass whose parameters of these names are read as the parts of this process."""
    key = (cls, mixin, names, summed)
    if key not in _CLASSES:
        members: dict[str, Any] = {name: _read(name, is_summed=name in summed) for name in names}
        members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        bases = (cls,) if mixin is object else (mixin, cls)
        _CLASSES[key] = type(cls.__name__, bases, members)
    return _CLASSES[key]


def _read(name: str, *, is_summed: bool) -> property:
    def read(module: nn.Module) -> Any:
        parameter: Any = module._parameters[name]
        if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:  # as fully_shard keeps it at rest
            return parameter
        local = parameter.to_local()
        return _sum_gradients(local, parameter.device_mesh) if is_summed else local

    return property(read)
