"""The self-check: every backend against the equations written out (SDT Eq. 10, 12), output and gradient."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

from spatial_decay.decay import Decay
from spatial_decay.layers import SpatialDecayMask
from spatial_decay.layers.kinds import KindName
from spatial_decay.ops import decay_attention
from spatial_decay.ops.choice import BACKENDS, Backend

__all__ = ["Comparison", "comparisons", "devices", "example"]

# Each pair formula, and the arrangement of rows and columns.
_KINDS: tuple[KindName, ...] = ("full", "1d", "gaussian", "alibi", "squared", "decomposed")
_GRID, _HEADS, _HEAD_DIM = (14, 10), 2, 32
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_BY_NAME_ONLY = ("flex", "triton_autotune")


@dataclass(frozen=True)
class Comparison:
    """One backend on one device, over the kinds that it can run.

    Args:
        device: Where.
        backend: Which.
        dtype: Of q, k and v.
        output: Largest difference over the largest value.
        gradient: The same of the gradients of q, k, v and of what makes the decay; None where the backend has none.
        kinds: Those that it can run.
        error: What it raised, where it did.
    """

    device: torch.device
    backend: str
    dtype: torch.dtype
    output: float = 0.0
    gradient: float | None = None
    kinds: tuple[KindName, ...] = _KINDS
    error: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether the numbers are those of the equations, to within what the dtype holds; NaN is not."""
        return self.error is None and max(self.output, self.gradient or 0.0) <= _TOLERANCE[self.dtype]

    def __str__(self) -> str:
        """A row of the table."""
        name = f"{self.device.type:4}  {self.backend:15}  {str(self.dtype).removeprefix('torch.'):8}"
        if self.error is not None:
            return f"{name}  FAILED: {self.error}"
        gradient = "no gradient here " if self.gradient is None else f"gradient {self.gradient:.1e}"
        of = "" if self.kinds == _KINDS else f", of {', '.join(self.kinds)} alone"
        return f"{name}  output {self.output:.1e}  {gradient}  {'ok' if self.is_good else 'WRONG'}{of}"


def devices() -> list[torch.device]:
    """The CPU, and the GPU that torch takes first."""
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [torch.device(name) for name, is_there in found.items() if is_there]


def comparisons(*, is_full: bool) -> Iterator[Comparison]:
    """Every backend that runs on a device of this machine.

    Args:
        is_full: Those too that "auto" never takes, and that compile or time themselves first, for some minutes.
    """
    for device in devices():
        for name in BACKENDS:
            for dtype in _TOLERANCE:
                if is_full or name not in _BY_NAME_ONLY:
                    found = _compare(name, dtype, device)
                    if found is not None:
                        yield found


def example(
    kind: KindName, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Decay | None, list[Tensor]]:
    """q, k and v, (1, N, L, d) each, a decay of this kind, and all that has a gradient; always the same numbers."""
    qkv, features, mask = _numbers(kind)
    q, k, v = (x.to(device, dtype).requires_grad_() for x in qkv)
    wide = torch.promote_types(dtype, torch.float32)
    mask = copy.deepcopy(mask).to(device, wide)
    decay = cast(SpatialDecayMask, mask).describe(features.to(device, wide), _GRID)
    return q, k, v, decay, [q, k, v, *mask.parameters()]


@cache
def _numbers(kind: KindName) -> tuple[Tensor, Tensor, nn.Module]:
    """Rounded to bfloat16, so that in every dtype they are the same."""
    num_tokens, dim = _GRID[0] * _GRID[1], _HEADS * _HEAD_DIM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        qkv = torch.randn(3, 1, _HEADS, num_tokens, _HEAD_DIM).bfloat16().double()
        features = torch.randn(1, num_tokens, dim).double()
        mask = SpatialDecayMask(dim, _HEADS, decay=kind).double()
        for parameter in mask.parameters():
            nn.init.normal_(parameter, std=dim**-0.5)
    return qkv, features, mask


@cache
def _expected(kind: KindName) -> tuple[Tensor, list[Tensor]]:
    with torch.enable_grad():
        return _attend(kind, "math", torch.float64, torch.device("cpu"))


def _attend(kind: KindName, backend: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of a sum of it; no gradients under torch.no_grad()."""
    q, k, v, decay, leaves = example(kind, dtype, device)
    out = decay_attention(q, k, v, decay, backend=cast(Backend, backend))
    if not torch.is_grad_enabled():
        return out, []
    weights = torch.cos(torch.arange(out.numel(), device=device)).view(out.shape)
    return out.detach(), list(torch.autograd.grad(out, leaves, weights.to(out.dtype)))


def _compare(backend: str, dtype: torch.dtype, device: torch.device) -> Comparison | None:
    """None where the backend can run no kind: the report says why."""
    for has_gradient in (True, False):
        try:
            with torch.set_grad_enabled(has_gradient):
                found = {kind: _differences(kind, backend, dtype, device) for kind in _KINDS}
        except Exception as error:  # whatever a compiler or a driver raises is what the user has to see
            return Comparison(device, backend, dtype, error=f"{type(error).__name__}: {' '.join(str(error).split())}")
        if of_kinds := {kind: differences for kind, differences in found.items() if differences is not None}:
            output, gradient = (max(of_all) for of_all in zip(*of_kinds.values(), strict=True))
            return Comparison(device, backend, dtype, output, gradient if has_gradient else None, (*of_kinds,))
    return None


def _differences(kind: KindName, backend: str, dtype: torch.dtype, device: torch.device) -> tuple[float, float] | None:
    """Of the output, and of the worst gradient, 0 where there is none; None where the backend cannot run the kind."""
    try:
        out, gradients = _attend(kind, backend, dtype, device)
    except NotImplementedError as error:
        if not str(error).startswith(f"backend={backend!r} cannot run"):
            raise  # an operator that PyTorch lacks on this device
        return None
    right, right_gradients = _expected(kind)
    pairs = zip(gradients, right_gradients, strict=bool(gradients))
    return _difference(out, right), max([0.0, *(_difference(*pair) for pair in pairs)])


def _difference(got: Tensor, right: Tensor) -> float:
    """Largest difference over the largest value; infinite where one is NaN."""
    found = (got.detach().cpu().double() - right).abs().max() / right.abs().max()
    return float("inf") if found.isnan() else found.item()
