"""How features become a decay: the kinds as values with JSON fields (SDT Eq. 4-11, Tables 3-4; RMT; LocAtViT)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from spatial_decay.decay import AxialDecay, Decay, ManhattanDecay, PathDecay, fixed_rates
from spatial_decay.layers.gate import ContextAwareGate
from spatial_decay.layers.gaussian import GaussianGate
from spatial_decay.layout import Layout

__all__ = [
    "KINDS",
    "Bidirectional",
    "DecayLike",
    "Decomposed",
    "Fixed",
    "FixedDecomposed",
    "Full",
    "Gaussian",
    "Kind",
    "KindName",
    "NoDecay",
    "OneDimensional",
    "as_kind",
]

KindName: TypeAlias = Literal[
    "full", "fixed", "1d", "bidirectional", "decomposed", "fixed_decomposed", "gaussian", "none"
]
"""The names of all kinds, each short for its value with nothing said."""


@dataclass(frozen=True, kw_only=True)
class Kind(ABC):
    """A kind of decay: its options, what it is made of, and how features become a decay.

    An option that is left out is None, and takes the value of the place where the kind is used (`resolved`).

    Attributes:
        name: What stands in `decay="..."`, and under "kind" in a config.
        defaults: The options in a layer, as the paper has them.
        quiet: Those that differ in a model that is trained already: next to no decay, with a gate that can learn one.
        reads_queries: Whether it is made from the queries, heads side by side, and not from what they are made of.
        needs_grid: Whether it needs a whole grid, so that Positions cannot have it.
        takes_prefix_tokens: Whether some tokens may lie nowhere.
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    quiet: ClassVar[Mapping[str, Any]] = {}
    reads_queries: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    takes_prefix_tokens: ClassVar[bool] = True

    def resolved(self, **place: Any) -> Self:
        """The same with a value for every option: what was said, else the place's value, else the layer's default."""
        left_out = [option for option in self.options() if getattr(self, option) is None]
        return replace(self, **{option: place.get(option, self.defaults[option]) for option in left_out})

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of its options."""
        return tuple(field.name for field in fields(cls))

    @property
    def config(self) -> dict[str, Any]:
        """{"kind": name, ...} in JSON values, as `decay=` takes it again."""
        values = asdict(self)
        return {"kind": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def modules(self, dim: int, num_heads: int) -> dict[str, nn.Module]:  # noqa: ARG002  kinds override it
        """What it has of trained parameters, by name: submodules of SpatialDecayMask."""
        return {}

    @abstractmethod
    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay | None:
        """The decay of features (B, L, D), by the modules of a SpatialDecayMask."""

    def check(self, num_heads: int) -> None:  # noqa: B027  most give one for any number
        """Raise ValueError where the options give no decay for so many heads."""


def _check_finite(kind: Kind, **values: float | None) -> None:
    for name, value in values.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and math.isfinite(value)):
            raise ValueError(f"{name} of kind {kind.name!r} must be a finite number: got {value!r}.")


def _check_flag(kind: Kind, **values: bool | None) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} of kind {kind.name!r} must be True or False: got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class _Gated(Kind):
    """A kind with Context-Aware Gates.

    Args:
        gate_bias: Give the gates a trained bias; in a layer there is none unless gate_bias_init says so.
        gate_bias_init: Its first value, see ContextAwareGate.
    """

    gates: ClassVar[tuple[str, ...]] = ("gate",)
    defaults: ClassVar[Mapping[str, Any]] = {"gate_bias": False, "gate_bias_init": 0.0}
    quiet: ClassVar[Mapping[str, Any]] = {"gate_bias": True, "gate_bias_init": 9.0}

    gate_bias: bool | None = None
    gate_bias_init: float | None = None

    def __post_init__(self) -> None:
        _check_flag(self, gate_bias=self.gate_bias)
        _check_finite(self, gate_bias_init=self.gate_bias_init)
        if self.gate_bias is False and self.gate_bias_init:
            raise ValueError(
                f"gate_bias_init needs a gate_bias: got gate_bias_init={self.gate_bias_init} with gate_bias=False. "
                "Leave one of the two out."
            )

    def resolved(self, **place: Any) -> Self:
        if self.gate_bias is None and self.gate_bias_init is not None:
            place["gate_bias"] = True
        if self.gate_bias is False:
            place["gate_bias_init"] = 0.0
        return super().resolved(**place)

    def modules(self, dim: int, num_heads: int) -> dict[str, nn.Module]:
        bias, bias_init = bool(self.gate_bias), self.gate_bias_init or 0.0
        return {name: ContextAwareGate(dim, num_heads, bias=bias, bias_init=bias_init) for name in self.gates}

    def gates_of(self, mask: Any, x: Tensor) -> list[Tensor]:
        """G of each gate, (B, N, L), by the modules of a SpatialDecayMask."""
        return [getattr(mask, name)(x).transpose(1, 2) for name in self.gates]


@dataclass(frozen=True, kw_only=True)
class Full(_Gated):
    """-abs((G_i + G_j) / 2 * d_M(i, j) * alpha), SDT Eq. 7-9.

    Args:
        alpha: Scale, > 0; 0.1 where it is left out.
        gate_bias: See ContextAwareGate; in a layer none.
        gate_bias_init: See ContextAwareGate; in a swapped model 6.
    """

    name: ClassVar[str] = "full"
    defaults: ClassVar[Mapping[str, Any]] = {"alpha": 0.1, **_Gated.defaults}
    quiet: ClassVar[Mapping[str, Any]] = {"gate_bias": True, "gate_bias_init": 6.0}

    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite(self, alpha=self.alpha)
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha must be finite and > 0: got {self.alpha}. For no decay at all use kind 'none'.")

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        assert self.alpha is not None
        (gate,) = self.gates_of(mask, x)
        return ManhattanDecay.from_gate(gate, layout, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class _Rated(Kind):
    """A kind with RMT's constant rates, lambda_n = log(1 - 2 ** (-initial_value - heads_range * n / N)).

    Args:
        initial_value: Of head 0; 2 where it is left out.
        heads_range: How much more the last head sees; 4 where it is left out.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"initial_value": 2.0, "heads_range": 4.0}

    initial_value: float | None = None
    heads_range: float | None = None

    def __post_init__(self) -> None:
        _check_finite(self, initial_value=self.initial_value, heads_range=self.heads_range)

    def check(self, num_heads: int) -> None:
        assert self.initial_value is not None
        assert self.heads_range is not None
        if self.initial_value + min(0.0, self.heads_range * (num_heads - 1) / num_heads) <= 0:
            raise ValueError(
                f"kind {self.name!r} needs initial_value + heads_range * n / N > 0 for every head n: got "
                f"initial_value={self.initial_value}, heads_range={self.heads_range}, N = {num_heads}."
            )

    def rates_of(self, mask: Any, x: Tensor) -> Tensor:
        """lambda_n, (N,). Made anew for each call: a buffer would follow the model into half precision."""
        assert self.initial_value is not None
        assert self.heads_range is not None
        return fixed_rates(
            mask.num_heads,
            initial_value=self.initial_value,
            heads_range=self.heads_range,
            device=x.device,
            dtype=torch.promote_types(x.dtype, torch.float32),
        )


@dataclass(frozen=True, kw_only=True)
class Fixed(_Rated):
    """-abs(lambda_n) * d_M(i, j), not trained: RMT; SDT Table 3.

    Args:
        initial_value: lambda_n = log(1 - 2 ** (-initial_value - heads_range * n / N)); 2 where it is left out.
        heads_range: The same; 4 where it is left out.
    """

    name: ClassVar[str] = "fixed"

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        return ManhattanDecay.constant(self.rates_of(mask, x), layout)


@dataclass(frozen=True, kw_only=True)
class OneDimensional(_Gated):
    """-sum of abs(g_k), k = min(i, j) .. max(i, j) - 1 over the raster sequence, SDT Eq. 6.

    Args:
        causal: Eq. 6 as written, -inf above the diagonal. Otherwise, and where it is left out, its symmetric extension.
        gate_bias: See ContextAwareGate; in a layer none.
        gate_bias_init: See ContextAwareGate; in a swapped model 9.
    """

    name: ClassVar[str] = "1d"
    defaults: ClassVar[Mapping[str, Any]] = {"causal": False, **_Gated.defaults}

    causal: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_flag(self, causal=self.causal)

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        (gate,) = self.gates_of(mask, x)
        return PathDecay.from_gate(gate, layout, causal=bool(self.causal))


@dataclass(frozen=True, kw_only=True)
class Bidirectional(_Gated):
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
class Decomposed(_Gated):
    """`1d` within rows, then within columns of the result, a gate each, SDT Eq. 11-12; no alpha.

    Args:
        gate_bias: See ContextAwareGate; in a layer none.
        gate_bias_init: See ContextAwareGate; in a swapped model 9.
    """

    name: ClassVar[str] = "decomposed"
    gates: ClassVar[tuple[str, ...]] = ("gate_h", "gate_w")
    needs_grid: ClassVar[bool] = True
    takes_prefix_tokens: ClassVar[bool] = False

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        gate_h, gate_w = self.gates_of(mask, x)
        return AxialDecay.from_gates(gate_h, gate_w, layout)


@dataclass(frozen=True, kw_only=True)
class FixedDecomposed(_Rated):
    """-abs(lambda_n) * distance within rows, then within columns of the result: RMT's first stages.

    Args:
        initial_value: lambda_n = log(1 - 2 ** (-initial_value - heads_range * n / N)); 2 where it is left out.
        heads_range: The same; 4 where it is left out.
    """

    name: ClassVar[str] = "fixed_decomposed"
    needs_grid: ClassVar[bool] = True
    takes_prefix_tokens: ClassVar[bool] = False

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        return AxialDecay.constant(self.rates_of(mask, x), layout)


@dataclass(frozen=True, kw_only=True)
class Gaussian(Kind):
    """a_i * exp(-(dh^2 / s_h,i + dw^2 / s_w,i) / 2), a and s from the query: LocAtViT.

    Args:
        initial_grid_size: (H, W) that the model is trained on, see GaussianGate; left out, the model's own, in a layer
            (14, 14).
    """

    name: ClassVar[str] = "gaussian"
    defaults: ClassVar[Mapping[str, Any]] = {"initial_grid_size": (14, 14)}
    reads_queries: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    initial_grid_size: Sequence[int] | None = None

    def __post_init__(self) -> None:
        size = self.initial_grid_size
        if size is None:
            return
        is_pair = isinstance(size, (tuple, list)) and len(size) == 2
        if not is_pair or not all(isinstance(n, int) and n >= 1 for n in size):
            raise ValueError(f"initial_grid_size must be (H, W), two whole numbers >= 1: got {size!r}.")
        object.__setattr__(self, "initial_grid_size", tuple(size))

    def modules(self, dim: int, num_heads: int) -> dict[str, nn.Module]:
        assert self.initial_grid_size is not None
        return {"gaussian": GaussianGate(dim // num_heads, self.initial_grid_size)}

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        q = x.unflatten(-1, (mask.num_heads, -1)).transpose(1, 2)  # (B, N, L, d)
        decay: Decay = mask.gaussian(q, layout)
        return decay


@dataclass(frozen=True, kw_only=True)
class NoDecay(Kind):
    """Nothing is added, SDT Table 3."""

    name: ClassVar[str] = "none"

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> None:  # noqa: ARG002
        return None


KINDS: dict[str, type[Kind]] = {
    kind.name: kind
    for kind in (Full, Fixed, OneDimensional, Bidirectional, Decomposed, FixedDecomposed, Gaussian, NoDecay)
}
"""All kinds by name."""

DecayLike: TypeAlias = KindName | Kind | Mapping[str, Any]
"""What `decay=` takes: a name, a value of this module, or its config {"kind": name, ...}."""


def as_kind(decay: DecayLike) -> Kind:
    """The kind that is meant.

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
