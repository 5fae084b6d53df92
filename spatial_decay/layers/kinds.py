"""How features become a decay: kinds as values with JSON fields (SDT Eq. 4-11, Tables 3-4; RMT; ALiBi; LocAtViT)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from spatial_decay.decay import (
    AxialDecay,
    Decay,
    EuclideanDecay,
    ManhattanDecay,
    PathDecay,
    SquaredDecay,
    alibi_slopes,
)
from spatial_decay.layers.gaussian import GaussianGate
from spatial_decay.layers.kind import Gated, Kind, OnReferenceGrid, Rated, check_finite, check_flag
from spatial_decay.layers.rates import TrainedRates
from spatial_decay.layout import Layout

__all__ = [
    "KINDS",
    "Alibi",
    "Bidirectional",
    "DecayLike",
    "Decomposed",
    "Fixed",
    "FixedDecomposed",
    "Full",
    "Gaussian",
    "Kind",
    "KindName",
    "Learned",
    "NoDecay",
    "OneDimensional",
    "Squared",
    "as_kind",
]

KindName: TypeAlias = Literal[
    "full",
    "fixed",
    "learned",
    "alibi",
    "squared",
    "1d",
    "bidirectional",
    "decomposed",
    "fixed_decomposed",
    "gaussian",
    "none",
]
"""The names of all kinds, each short for its value with nothing said."""


@dataclass(frozen=True, kw_only=True)
class Full(Gated, OnReferenceGrid):
    """-abs((G_i + G_j) / 2 * d_M(i, j) * alpha), SDT Eq. 7-9.

    Args:
        alpha: Scale, > 0; 0.1 where it is left out.
        gate_bias: See ContextAwareGate; in a layer none.
        gate_bias_init: See ContextAwareGate; in a swapped model 6.
        reference_grid: See OnReferenceGrid; off where it is left out.

    Raises:
        ValueError: alpha is not finite or not > 0; gate_bias_init with gate_bias=False; reference_grid is no
            pair of whole numbers >= 1.
    """

    name: ClassVar[str] = "full"
    defaults: ClassVar[Mapping[str, Any]] = {"alpha": 0.1, **Gated.defaults}
    quiet: ClassVar[Mapping[str, Any]] = {"gate_bias": True, "gate_bias_init": 6.0}

    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self, alpha=self.alpha)
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha must be finite and > 0: got {self.alpha}. For no decay at all use kind 'none'.")

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        assert self.alpha is not None
        (gate,) = self.gates_of(mask, x)
        return ManhattanDecay.from_gate(self.in_reference_steps(gate, layout), layout, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class Fixed(Rated, OnReferenceGrid):
    """-abs(lambda_n) * d_M(i, j), not trained: RMT; SDT Table 3.

    Args:
        initial_value: lambda_n = log(1 - 2 ** (-initial_value - heads_range * n / N)); 2 where it is left out.
        heads_range: The same; 4 where it is left out.
        reference_grid: See OnReferenceGrid; off where it is left out.
    """

    name: ClassVar[str] = "fixed"

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        return ManhattanDecay.constant(self.in_reference_steps(self.rates_of(mask, x), layout), layout)


@dataclass(frozen=True, kw_only=True)
class Learned(Rated, OnReferenceGrid):
    """-softplus(lambda_n) * d_M(i, j), a trained rate a head: what lies between `fixed` and `full`.

    Args:
        initial_value: The rates begin as those of `fixed`, with 2 where it is left out; in a swapped model with 12.
        heads_range: The same, with 4 where it is left out; in a swapped model with 0, each rate 0.00024.
        reference_grid: See OnReferenceGrid; off where it is left out.
    """

    name: ClassVar[str] = "learned"
    quiet: ClassVar[Mapping[str, Any]] = {"initial_value": 12.0, "heads_range": 0.0}

    def modules(self, dim: int, num_heads: int) -> dict[str, nn.Module]:  # noqa: ARG002  a rate reads no features
        assert self.initial_value is not None
        assert self.heads_range is not None
        return {"rates": TrainedRates(num_heads, initial_value=self.initial_value, heads_range=self.heads_range)}

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:  # noqa: ARG002  the same for all features
        return ManhattanDecay.constant(self.in_reference_steps(mask.rates(), layout), layout)


@dataclass(frozen=True, kw_only=True)
class Alibi(OnReferenceGrid):
    """-m_n * sqrt(dh^2 + dw^2), not trained: ALiBi's geometric slopes with the distance of CROMA.

    Args:
        reference_grid: See OnReferenceGrid; off where it is left out.
    """

    name: ClassVar[str] = "alibi"

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        dtype = torch.promote_types(x.dtype, torch.float32)
        slopes = alibi_slopes(mask.num_heads, device=x.device, dtype=dtype)
        return EuclideanDecay.constant(self.in_reference_steps(slopes, layout), layout)


@dataclass(frozen=True, kw_only=True)
class Squared(Full):
    """(G_i + G_j) / 2 * (dh^2 + dw^2) * alpha: `full` with the squared distance.

    Args:
        alpha: Scale, > 0; 0.01 where it is left out, which along an axis is as much as the 0.1 of `full` at 10 steps.
        gate_bias: See ContextAwareGate; in a layer none.
        gate_bias_init: See ContextAwareGate; in a swapped model 7, as quiet at 32 x 32 patches as `full` with its 6.
        reference_grid: See OnReferenceGrid; off where it is left out.

    Raises:
        ValueError: alpha is not finite or not > 0; gate_bias_init with gate_bias=False; reference_grid is no
            pair of whole numbers >= 1.
    """

    name: ClassVar[str] = "squared"
    defaults: ClassVar[Mapping[str, Any]] = {**Full.defaults, "alpha": 0.01}
    quiet: ClassVar[Mapping[str, Any]] = {"gate_bias": True, "gate_bias_init": 7.0}

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        assert self.alpha is not None
        (gate,) = self.gates_of(mask, x)
        of_steps = self.in_reference_steps(gate, layout)
        return SquaredDecay.from_gate(self.in_reference_steps(of_steps, layout), layout, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class OneDimensional(Gated):
    """-sum of abs(g_k), k = min(i, j) .. max(i, j) - 1 over the raster sequence, SDT Eq. 6.

    Args:
        causal: Eq. 6 as written, -inf above the diagonal. Otherwise, and where it is left out, its symmetric extension.
        gate_bias: See ContextAwareGate; in a layer none.
        gate_bias_init: See ContextAwareGate; in a swapped model 9.
    """

    name: ClassVar[str] = "1d"
    defaults: ClassVar[Mapping[str, Any]] = {"causal": False, **Gated.defaults}

    causal: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, causal=self.causal)

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        (gate,) = self.gates_of(mask, x)
        return PathDecay.from_gate(gate, layout, causal=bool(self.causal))


@dataclass(frozen=True, kw_only=True)
class Bidirectional(Gated):
    """The mean of a forward and a backward `1d` with a gate each, SDT Table 4.

    Args:
        gate_bias: See ContextAwareGate; in a layer none.
        gate_bias_init: See ContextAwareGate; in a swapped model 9.
    """

    name: ClassVar[str] = "bidirectional"
    gates: ClassVar[tuple[str, ...]] = ("gate_forward", "gate_backward")

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        forward_gate, backward_gate = self.gates_of(mask, x)
        return PathDecay.bidirectional(forward_gate, backward_gate, layout)


@dataclass(frozen=True, kw_only=True)
class Decomposed(Gated, OnReferenceGrid):
    """`1d` within rows, then within columns of the result, a gate each, SDT Eq. 11-12; no alpha.

    Args:
        gate_bias: See ContextAwareGate; in a layer none.
        gate_bias_init: See ContextAwareGate; in a swapped model 9.
        reference_grid: See OnReferenceGrid, each axis by itself; off where it is left out.
    """

    name: ClassVar[str] = "decomposed"
    gates: ClassVar[tuple[str, ...]] = ("gate_h", "gate_w")
    needs_grid: ClassVar[bool] = True
    takes_prefix_tokens: ClassVar[bool] = False

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        gate_h, gate_w = self.gates_of(mask, x)
        gate_h, gate_w = self.in_reference_steps(gate_h, layout, (0,)), self.in_reference_steps(gate_w, layout, (1,))
        return AxialDecay.from_gates(gate_h, gate_w, layout)


@dataclass(frozen=True, kw_only=True)
class FixedDecomposed(Rated, OnReferenceGrid):
    """-abs(lambda_n) * distance within rows, then within columns of the result: RMT's first stages.

    Args:
        initial_value: lambda_n = log(1 - 2 ** (-initial_value - heads_range * n / N)); 2 where it is left out.
        heads_range: The same; 4 where it is left out.
        reference_grid: See OnReferenceGrid, each axis by itself; off where it is left out.
    """

    name: ClassVar[str] = "fixed_decomposed"
    needs_grid: ClassVar[bool] = True
    takes_prefix_tokens: ClassVar[bool] = False

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        rates = self.rates_of(mask, x)
        rates_h, rates_w = (self.in_reference_steps(rates, layout, (axis,)) for axis in (0, 1))
        return AxialDecay.constant(rates_h, rates_w, layout)


@dataclass(frozen=True, kw_only=True)
class Gaussian(OnReferenceGrid):
    """a_i * exp(-(dh^2 / s_h,i + dw^2 / s_w,i) / 2), a and s from the query: LocAtViT.

    Args:
        reference_grid: (H, W) that the model is trained on, which the authors' law of its width needs on every grid,
            see GaussianGate; left out, that of a ViT's img_size or of an SDT-P's input_size, elsewhere (14, 14).

    Raises:
        ValueError: reference_grid is no pair of whole numbers >= 1.
    """

    name: ClassVar[str] = "gaussian"
    defaults: ClassVar[Mapping[str, Any]] = {"reference_grid": (14, 14)}
    reads_queries: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    def resolved(self, **place: Any) -> Self:
        return super().resolved(**{"reference_grid": place.get("grid_size"), **place})

    def modules(self, dim: int, num_heads: int) -> dict[str, nn.Module]:
        assert self.reference_grid is not None
        return {"gaussian": GaussianGate(dim // num_heads, self.reference_grid)}

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        q = x.unflatten(-1, (-1, mask.dim // mask.num_heads)).transpose(1, 2)  # (B, N, L, d)
        decay: Decay = mask.gaussian(q, layout)
        return decay


@dataclass(frozen=True, kw_only=True)
class NoDecay(Kind):
    """Nothing is added, SDT Table 3."""

    name: ClassVar[str] = "none"

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> None:  # noqa: ARG002  nothing to read
        return None


KINDS: dict[str, type[Kind]] = {
    kind.name: kind
    for kind in (
        Full,
        Fixed,
        Learned,
        Alibi,
        Squared,
        OneDimensional,
        Bidirectional,
        Decomposed,
        FixedDecomposed,
        Gaussian,
        NoDecay,
    )
}
"""All kinds by name."""

DecayLike: TypeAlias = KindName | Kind | Mapping[str, Any]
"""What `decay=` takes: a name, a value of this module, or its config {"kind": name, ...}."""


def as_kind(decay: DecayLike) -> Kind:
    """The kind that is meant.

    Args:
        decay: A name, a value such as kinds.Full(alpha=0.2), or a mapping {"kind": "full", "alpha": 0.2}.

    Returns:
        The value; an option that was left out is None.

    Raises:
        TypeError: neither a name, a kind nor a mapping.
        ValueError: an unknown name; a mapping without "kind", or with options that the kind has not or that cannot be.
    """
    if isinstance(decay, Kind):
        return decay
    if isinstance(decay, str):
        return _named(decay)()
    if not isinstance(decay, Mapping):
        raise TypeError(
            f'decay must be the name of a kind, a value such as kinds.Full(alpha=0.2), or a mapping with "kind": got '
            f"{type(decay).__name__}."
        )
    options = dict(decay)
    if "kind" not in options:
        raise ValueError(f'a decay as a mapping must say its "kind", one of {", ".join(KINDS)}: got {options}.')
    kind = _named(options.pop("kind"))
    if unknown := [option for option in options if option not in kind.options()]:
        raise ValueError(
            f"kind {kind.name!r} has "
            + (f"the options {', '.join(kind.options())}" if kind.options() else "no options")
            + f": got {', '.join(map(str, unknown))}. Leave out what it has not."
        )
    return kind(**options)


def _named(name: object) -> type[Kind]:
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"kind of decay must be one of {', '.join(KINDS)}: got {name!r}.")
    return KINDS[name]
