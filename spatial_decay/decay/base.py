"""A decay is a few numbers a token and one pair formula (M of SDT Eq. 10); masks and score functions come from it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.layout import Layout
from spatial_decay.precision import at_least_float32
from spatial_decay.values import are_readable, in_words

__all__ = [
    "STRONGEST",
    "FactoredDecay",
    "Numbers",
    "PairwiseDecay",
    "ScoreMod",
    "check_range",
    "dense",
    "factor",
    "register_factor",
    "score_mod",
    "strength_of_gate",
]

Numbers: TypeAlias = tuple[Tensor, ...]
"""What a decay knows of each token: one or more tensors, (B, N, L) whole, or broadcast against the other side."""

ScoreMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""score, batch, head, query index, key index -> score, as torch.nn.attention.flex_attention takes it."""


class PairwiseDecay(ABC):
    """What is added to the score of a query and a key, as a function of these two tokens alone.

    A decay is a frozen dataclass of tensors (B, N, L), in the order in which `pairwise` takes them, and of the layout
    of the L tokens; B may be 1 where images share the numbers. `dense` and `score_mod` do the rest. Prefix tokens and
    others that lie nowhere have no position: nothing is added to any score that they take part in, whatever `pairwise`
    says of them.

    Attributes:
        has_channels: Whether the class itself says its `channels`, so that backend `lowrank` may run it: a subclass may
            say more in its `pairwise`.
    """

    has_channels: ClassVar[bool] = False

    layout: Layout

    @property
    def numbers(self) -> Numbers:
        """The tensors (B, N, L), in the order of the fields."""
        names: dict[str, object] = self.__dataclass_fields__  # type: ignore[attr-defined]  # what decorators add
        values = [getattr(self, name) for name in names]
        return tuple([value for value in values if isinstance(value, Tensor)])

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__repr__" not in vars(cls):  # before dataclass gives it one with all the values
            cls.__repr__ = PairwiseDecay.__repr__  # type: ignore[method-assign]  # on purpose
        cls.has_channels = "channels" in vars(cls)

    def __repr__(self) -> str:
        # Decays are dataclasses.
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        tensors = [name for name, value in values.items() if isinstance(value, Tensor)]
        options = {name: values[name] for name in values if name not in (*tensors, "layout")}
        said = [f"{', '.join(tensors)}: {in_words(self.numbers[0])}"] if tensors else []
        said += [f"{name}={value}" for name, value in options.items() if value != getattr(type(self), name, None)]
        return f"{type(self).__name__}({', '.join([*said, str(self.layout)])})"

    @abstractmethod
    def pairwise(self, query: Numbers, key: Numbers, *steps: Tensor) -> Tensor:
        """What is added to the scores, in nats, for numbers of queries and of keys and the steps between them.

        All broadcast together; on a grid each step has the size of its own axis, so that what is done to one axis alone
        is done H + W times a query and not H * W times.

        Args:
            query: The numbers of queries, in the order of the fields.
            key: Those of keys.
            steps: Differences of position, key minus query, one tensor an axis, in grid steps.

        Returns:
            Nats, in the shape to which all broadcast.
        """

    def channels(self) -> tuple[Tensor, Tensor]:
        """Channels of queries and of keys whose products are the decay, for the few decays that have such.

        Returns:
            Two tensors (B, N, L, r), float32 at least, in nats together; zeros at tokens that lie nowhere.

        Raises:
            NotImplementedError: this decay has none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no channels. Write a method `channels` for it.")

    def largest_term(self) -> Tensor:
        """The largest product of a query's and a key's number in any channel: what is rounded where they are added.

        A class that says its channels anew below one that says this, says this anew too.

        Returns:
            Of shape (), >= 0, in nats; it may be larger than any product that there is.

        Raises:
            NotImplementedError: this decay has no channels.
        """
        of_queries, of_keys = (x.abs().amax(-2) for x in self.channels())  # (B, N, r) each
        return (of_queries * of_keys).amax()


class FactoredDecay(PairwiseDecay):
    """M[i, j] = (t_i + s * t_j) * F(steps), with one number t a token: the form that backend `tiled` runs.

    Attributes:
        sign: s, 1 or -1.
        factor: Name of F, see register_factor.
    """

    sign: ClassVar[int]
    factor: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if getattr(cls, "sign", 1) not in (1, -1):
            raise ValueError(f"sign of {cls.__name__} must be 1 or -1: got {cls.sign!r}. Scale its numbers instead.")

    @classmethod
    def has_form(cls) -> bool:
        """Whether the form is all there is to it: a subclass may say more in its `pairwise`.

        Returns:
            True where backend `tiled` may run it.
        """
        return cls.pairwise is FactoredDecay.pairwise

    @property
    def hides_later(self) -> bool:
        """Whether a query may not attend to tokens with F > 0."""
        return False

    def pairwise(self, query: Numbers, key: Numbers, *steps: Tensor) -> Tensor:
        f = factor(self.factor, *steps)
        (of_query,), (of_key,) = query, key
        decay = (of_query + of_key if self.sign > 0 else of_query - of_key) * f
        return decay.masked_fill(f > 0, float("-inf")) if self.hides_later else decay


_FACTORS: dict[str, Callable[..., Tensor]] = {}


def register_factor(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make F known under its own name, by which operators pass it on; F takes the steps. A decorator.

    Args:
        function: F, of the steps, one tensor an axis; it gives what they broadcast to.

    Returns:
        The function itself.

    Raises:
        ValueError: another function has that name.
    """
    known = _FACTORS.get(function.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
        raise ValueError(
            f"a factor must have a name of its own: got {function.__name__}, which {known.__module__} has registered. "
            "Rename the function."
        )
    _FACTORS[function.__name__] = function
    return function


def factor(name: str, *steps: Tensor) -> Tensor:
    """F(steps) of the registered name.

    Args:
        name: That of a function decorated with register_factor.
        steps: Differences of position, one tensor an axis, in grid steps.

    Returns:
        What the steps broadcast to.

    Raises:
        ValueError: no function has that name.
    """
    if name not in _FACTORS:
        raise ValueError(
            f"factor must be the name of a registered function, one of {', '.join(_FACTORS)}: got {name!r}. "
            "Decorate the function with register_factor."
        )
    return _FACTORS[name](*steps)


STRONGEST = 256.0
"""What a gate adds to a path at most, in nats. More changes nothing that float32 can show, unless the scores of two
keys differ by some 240 (of bidirectional, whose steps are the mean of two gates, 112); and the sums would lose the
digits of all other gates."""


def check_range(name: str, x: Tensor, layout: Layout, lowest: float, highest: float) -> None:
    """Raise ValueError where numbers (B, N, L) of tokens that lie somewhere are outside, if they can be read."""
    known = layout.known
    if x.ndim != 3 or x.shape[-1] != layout.num_tokens or not are_readable(x):
        return  # a wrong shape is told where q is known
    if known is not None:
        if len(x) != len(known) and 1 not in (len(x), len(known)):
            return
        x = x.masked_fill(~known[:, None], min(max(0.0, lowest), highest)) if are_readable(known) else x[..., :0]
    x = x.detach()[..., layout.num_prefix_tokens :]
    if not x.numel():
        return
    least, most = (value.item() for value in x.aminmax())
    if least < lowest or most > highest:
        raise ValueError(
            f"{name} must lie in {lowest:.2g} .. {highest:g}: got {least:g} .. {most:g}. Take it from a gate, which is "
            "the logarithm of a number between 0 and 1, for instance F.logsigmoid(x)."
        )


def strength_of_gate(gate: Tensor, layout: Layout, *, alpha: float, lowest: float) -> Tensor:
    """alpha * G / 2, float32 at least and not below lowest; raise ValueError where alpha or the gate cannot be."""
    if isinstance(alpha, (int, float)) and not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be finite and > 0: got {alpha}. For no decay at all use kind 'none'.")
    check_range("gate", gate, layout, -math.inf, 0.0)
    return (at_least_float32(gate) * (alpha / 2)).clamp(min=lowest)


def dense(decay: PairwiseDecay, *, dtype: torch.dtype | None = None, row_multiple: int = 1) -> Tensor:
    """The decay as a mask.

    Args:
        decay: Any pairwise decay.
        dtype: Of the mask. The pair formula itself is computed in float32 at least: half precision holds neither
            positions above 256 (bf16) nor long sums. None: that of the formula.
        row_multiple: Each row starts at a multiple of so many elements in memory. CUDA's memory-efficient
            attention copies the mask where that is not a multiple of 8.

    Returns:
        (B, N, L, L), zero wherever a token takes part that lies nowhere. B is 1 where all images share the decay.
    """
    layout = decay.layout
    num_prefix, num_tokens = layout.num_prefix_tokens, layout.num_tokens
    # Contiguous, for the mask lies in memory as they do, and those of a gate, (B, L, N), have the heads innermost.
    numbers = tuple(at_least_float32(x)[..., num_prefix:].contiguous() for x in decay.numbers)
    # Prefix tokens are padded in at the end, and the rows with them; without, keys past the end need no copy.
    multiple = 1 if num_prefix else row_multiple
    steps = layout.steps(device=numbers[0].device, dtype=numbers[0].dtype, row_multiple=multiple)
    mask = decay.pairwise(
        tuple(layout.queries(x) for x in numbers),
        tuple(layout.keys(x, row_multiple=multiple) for x in numbers),
        *steps,
    )
    mask = torch.broadcast_tensors(mask, *steps)[0].flatten(3)  # (B, N, L - P, L - P and more)
    if (known := layout.known) is not None:
        pairs = layout.queries(known[:, None]) & layout.keys(known[:, None], row_multiple=multiple)
        mask = mask.masked_fill(~pairs, 0.0)
    mask = mask if dtype is None else mask.to(dtype)
    if num_prefix or mask.shape[-1] % row_multiple:
        mask = F.pad(mask, (num_prefix, -num_tokens % row_multiple, num_prefix, 0))
    return mask if mask.shape[-1] == num_tokens else mask[..., :num_tokens]


def score_mod(decay: PairwiseDecay) -> ScoreMod:
    """The decay as a score function, for FlexAttention or anything else that asks for one score at a time.

    The indices may be scalars, as FlexAttention gives them, or tensors that broadcast together.

    Args:
        decay: Any pairwise decay.

    Returns:
        A function of score, batch, head, query index and key index, which gives the score with the decay added.
    """
    layout = decay.layout
    num_prefix, known = layout.num_prefix_tokens, layout.known
    # Inductor cannot build its kernel for the CPU over strided views (torch 2.15).
    of_queries = tuple(at_least_float32(x).contiguous() for x in decay.numbers)
    # FlexAttention refuses to index one tensor twice where a gradient is asked for (and adds up captured
    # tensors' gradients by themselves), so that the key side has its own.
    of_keys = tuple(x.clone() for x in of_queries)
    positions = tuple(
        F.pad(axis, (num_prefix, 0)).reshape(-1, layout.num_tokens)
        for axis in layout.positions(device=of_queries[0].device, dtype=of_queries[0].dtype)
    )  # (B|1, L) each

    def add_decay(score: Tensor, batch: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        first = torch.zeros_like(batch)
        image = first if of_queries[0].shape[0] == 1 else batch
        place = first if positions[0].shape[0] == 1 else batch
        added = decay.pairwise(
            tuple(x[image, head, q_index] for x in of_queries),
            tuple(x[image, head, k_index] for x in of_keys),
            *(axis[place, k_index] - axis[place, q_index] for axis in positions),
        )
        if num_prefix:
            lie_somewhere = (q_index >= num_prefix) & (k_index >= num_prefix)
            added = torch.where(lie_somewhere, added, torch.zeros_like(added))
        elif known is not None:
            row = first if known.shape[0] == 1 else batch
            added = torch.where(known[row, q_index] & known[row, k_index], added, torch.zeros_like(added))
        return score + added.to(score.dtype)

    return add_decay
