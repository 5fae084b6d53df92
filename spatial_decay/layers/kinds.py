"""How features become a decay: the kinds as values with JSON fields (SDT Eq. 4-11, Tables 3-4; RMT; LocAtViT)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor, nn

from spatial_decay.decay import AxialDecay, Decay, ManhattanDecay, PathDecay
from spatial_decay.layers.gaussian import GaussianGate
from spatial_decay.layers.kind import Gated, Kind, Rated, check_finite, check_flag
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
class Full(Gated):
    """-abs((G_i + G_j) / 2 * d_M(i, j) * alpha), SDT Eq. 7-9.

    Args:
        alpha: Scale, > 0; 0.1 where it is left out.
        gate_bias: See ContextAwareGate; in a layer none.
        gate_bias_init: See ContextAwareGate; in a swapped model 6.

    Raises:
        ValueError: alpha is not finite or not > 0; gate_bias_init with gate_bias=False.
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
        return ManhattanDecay.from_gate(gate, layout, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class Fixed(Rated):
    """-abs(lambda_n) * d_M(i, j), not trained: RMT; SDT Table 3.

    Args:
        initial_value: lambda_n = log(1 - 2 ** (-initial_value - heads_range * n / N)); 2 where it is left out.
        heads_range: The same; 4 where it is left out.
    """

    name: ClassVar[str] = "fixed"

    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay:
        return ManhattanDecay.constant(self.rates_of(mask, x), layout)


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
class Decomposed(Gated):
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
class FixedDecomposed(Rated):
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
        initial_grid_size: (H, W) that the model is trained on, see GaussianGate; left out, that of a ViT's img_size or
            of an SDT-P's input_size, elsewhere (14, 14).

    Raises:
        ValueError: initial_grid_size is no pair of whole numbers >= 1.
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
        if not is_pair or not all(type(n) is int and n >= 1 for n in size):
            raise ValueError(f"initial_grid_size must be (H, W), two whole numbers >= 1: got {size!r}.")
        object.__setattr__(self, "initial_grid_size", tuple(size))

    def modules(self, dim: int, num_heads: int) -> dict[str, nn.Module]:
        assert self.initial_grid_size is not None
        return {"gaussian": GaussianGate(dim // num_heads, self.initial_grid_size)}

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
    for kind in (Full, Fixed, OneDimensional, Bidirectional, Decomposed, FixedDecomposed, Gaussian, NoDecay)
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
