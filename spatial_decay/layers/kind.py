"""What a kind of decay is (SDT Tables 3-4): a frozen value with JSON options, its modules, and how it is made."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from spatial_decay.decay import Decay, fixed_rates
from spatial_decay.layers.gate import ContextAwareGate
from spatial_decay.layers.reference import as_reference_grid, step_ratio
from spatial_decay.layout import Layout

__all__ = ["Gated", "Kind", "OnReferenceGrid", "Rated", "check_finite", "check_flag"]

_LEAST_SHARE = 1e-6  # what must be left of initial_value in RMT's exponents: some ten roundings of float32


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

    def __post_init__(self) -> None:  # noqa: B027  each checks its own options, and calls the next one's
        """Look at the options that were said."""

    def resolved(self, **place: Any) -> Self:
        """The same with a value for every option: what was said, else the place's value, else the layer's default.

        Args:
            place: Values of the place for options that were left out, by name. A model says its grid_size besides,
                (H, W), for kinds that cannot do without a reference_grid.

        Returns:
            A value without None, but for a reference_grid that is off.
        """
        left_out = [option for option in self.options() if getattr(self, option) is None]
        found = {option: place.get(option) for option in left_out}
        values = {name: self.defaults.get(name) if value is None else value for name, value in found.items()}
        return replace(self, **values)

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of its options.

        Returns:
            In the order of the fields.
        """
        return tuple(field.name for field in fields(cls))

    @property
    def config(self) -> dict[str, Any]:
        """{"kind": name, ...} in JSON values, as `decay=` takes it again."""
        values = asdict(self)
        return {"kind": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def modules(self, dim: int, num_heads: int) -> dict[str, nn.Module]:  # noqa: ARG002  kinds override it
        """What it has of trained parameters, by name: submodules of SpatialDecayMask.

        Args:
            dim: D.
            num_heads: N.

        Returns:
            Modules by name; empty for kinds that are not trained.
        """
        return {}

    @abstractmethod
    def describe(self, mask: Any, x: Tensor, layout: Layout) -> Decay | None:
        """The decay of features (B, L, D), by the modules of a SpatialDecayMask.

        Args:
            mask: The SpatialDecayMask, whose modules are called.
            x: Features (B, L, D).
            layout: Where the L tokens lie.

        Returns:
            What is added to the scores; None for nothing.
        """

    def check(self, num_heads: int) -> None:  # noqa: B027  most give one for any number
        """Look at options that not every number of heads can have.

        Args:
            num_heads: N.

        Raises:
            ValueError: they give no decay for so many heads.
        """


def check_finite(kind: Kind, **values: float | None) -> None:
    """Raise ValueError where an option that was said is no finite number; kept as float, which JSON and torch load."""
    for name, value in values.items():
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value)):
            raise ValueError(f"{name} of kind {kind.name!r} must be a finite number: got {value!r}.")
        object.__setattr__(kind, name, float(value))


def check_flag(kind: Kind, **values: bool | None) -> None:
    """Raise ValueError where an option that was said is neither True nor False."""
    for name, value in values.items():
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} of kind {kind.name!r} must be True or False: got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Gated(Kind):
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
        super().__post_init__()
        check_flag(self, gate_bias=self.gate_bias)
        check_finite(self, gate_bias_init=self.gate_bias_init)
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
        """G of each gate, (B, N, L), by the modules of a SpatialDecayMask.

        Args:
            mask: The SpatialDecayMask, whose gates are called.
            x: Features (B, L, D).

        Returns:
            One tensor a gate, <= 0, nats per grid step.
        """
        return [getattr(mask, name)(x).transpose(1, 2) for name in self.gates]


@dataclass(frozen=True, kw_only=True)
class Rated(Kind):
    """A kind with RMT's constant rates, lambda_n = log(1 - 2 ** (-initial_value - heads_range * n / N)).

    Args:
        initial_value: Of head 0; 2 where it is left out.
        heads_range: How much more the last head sees; 4 where it is left out.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"initial_value": 2.0, "heads_range": 4.0}

    initial_value: float | None = None
    heads_range: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self, initial_value=self.initial_value, heads_range=self.heads_range)

    def check(self, num_heads: int) -> None:
        assert self.initial_value is not None
        assert self.heads_range is not None
        lowest = self.initial_value + min(0.0, self.heads_range * (num_heads - 1) / num_heads)
        if lowest <= _LEAST_SHARE * self.initial_value:
            raise ValueError(
                f"kind {self.name!r} needs initial_value + heads_range * n / N > 0 for every head n, and above what "
                "float32 rounds to 0: got "
                f"initial_value={self.initial_value}, heads_range={self.heads_range}, N = {num_heads}."
            )

    def rates_of(self, mask: Any, x: Tensor) -> Tensor:
        """lambda_n, (N,). Made anew for each call: a buffer would follow the model into half precision.

        Args:
            mask: The SpatialDecayMask.
            x: Features (B, L, D), for their device and dtype.

        Returns:
            (N,), float32 at least, < 0.
        """
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
class OnReferenceGrid(Kind):
    """A kind that can measure distances in steps of the grid that a model is trained on.

    On a grid of another size its numbers, nats per grid step, are multiplied by what a step there is of a step here. So
    what lies at opposite borders of an image is about as far apart at any size. Positions that do not say how large the
    image is, their grid_size, are an error.

    Args:
        reference_grid: (H, W) of the patch tokens trained on. None: off, a step is a step on any grid.
    """

    reference_grid: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_grid is not None:
            object.__setattr__(self, "reference_grid", as_reference_grid(self.reference_grid))

    def in_reference_steps(self, numbers: Tensor, layout: Layout, axes: tuple[int, ...] = (0, 1)) -> Tensor:
        """Numbers per step of the reference grid as numbers per step of this one; as they are where it is off.

        Along one axis they are multiplied by H0 / H, or W0 / W. A number that serves both axes is multiplied by
        (H0 + W0) / (H + W): where both grow alike this is the same factor, and else it keeps the mean Manhattan
        distance of two tokens.

        Args:
            numbers: Nats per grid step, any shape.
            layout: Where the tokens lie.
            axes: Along which the numbers count, 0 for the height and 1 for the width.

        Returns:
            Of the same shape.

        Raises:
            ValueError: the layout is neither a grid nor part of one, and reference_grid is not off.
        """
        if self.reference_grid is None:
            return numbers
        return numbers * step_ratio(self.reference_grid, layout, axes, f"reference_grid of kind {self.name!r}")
