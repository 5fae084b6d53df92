"""What swap_attention did, as a table to print."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from spatial_decay.layers.kinds import Kind, NoDecay

__all__ = ["SwapReport", "SwappedModule", "reasons", "shortened"]


@dataclass(frozen=True)
class SwappedModule:
    """An attention module that has a decay now.

    Args:
        name: Its name in the model.
        of_class: The name of its class.
        num_heads: N.
        num_parameters: How many weights are new in it.
        patch_embed: The name of the module that the grid of a call is read from.
    """

    name: str
    of_class: str
    num_heads: int
    num_parameters: int
    patch_embed: str


@dataclass(frozen=True, repr=False)
class SwapReport:
    """What swap_attention did; print it for a table.

    Args:
        kind: How features become a decay, with every option.
        modules: The attention modules that have it now, in the order of the model.
        left: Names of the other attention modules, and why each was left as it was.
    """

    kind: Kind
    modules: tuple[SwappedModule, ...]
    left: dict[str, str]

    @property
    def replaced(self) -> tuple[str, ...]:
        """The names of the attention modules that have a decay now."""
        return tuple(module.name for module in self.modules)

    @property
    def num_parameters(self) -> int:
        """How many weights are new in the model."""
        return sum(module.num_parameters for module in self.modules)

    def __repr__(self) -> str:
        return (
            f"SwapReport(kind={self.kind.name!r}, {len(self.modules)} replaced, {len(self.left)} left, "
            f"{self.num_parameters:,} new parameters)"
        )

    def __str__(self) -> str:
        rows = [("attention", "class", "heads", "new parameters", "grid from")]
        alike: dict[tuple[str, int, int, str], list[str]] = {}
        for module in self.modules:
            key = (module.of_class, module.num_heads, module.num_parameters, module.patch_embed)
            alike.setdefault(key, []).append(module.name)
        for (of_class, num_heads, num_parameters, embed), names in alike.items():
            for short, count in shortened(names).items():
                each = f"{count} x {num_parameters:,}" if count > 1 else f"{num_parameters:,}"
                rows.append((short, of_class, str(num_heads), each, embed or "the model"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(
                cell.rjust(width) if is_number else cell.ljust(width)
                for cell, width, is_number in zip(row, widths, (False, False, True, True, False), strict=True)
            ).rstrip()
            for row in rows
        ]
        some = f"{len(self.modules)} attention module{'s' * (len(self.modules) != 1)}"
        lines = [f"decay {self.kind.name!r} in {some}, {self.num_parameters:,} new parameters", *table]
        lines += [f"left as it was: {names}, because {reason}" for reason, names in reasons(self.left).items()]
        return "\n".join([*lines, f"next: {self._next()}"])

    def _next(self) -> str:
        if self.num_parameters:
            return 'train; the new weights have ".spatial_decay." in their names'
        if isinstance(self.kind, NoDecay):
            return "nothing; the model does what it did"
        return "fine-tune; the outputs have changed, and no weight is new"


def reasons(left: Mapping[str, str]) -> dict[str, str]:
    """Each reason once, with all names that it holds for."""
    of_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        of_reason.setdefault(reason, []).append(name)
    return {reason: ", ".join(shortened(names)) for reason, names in of_reason.items()}


def shortened(names: Iterable[str]) -> dict[str, int]:
    """Names that differ in a number are one, blocks.0-11.attn; and how many each stands for."""
    found: list[tuple[list[str], int]] = [(name.split("."), 1) for name in names]
    depth = max((len(parts) for parts, _ in found), default=0)
    for place in range(depth - 1, -1, -1):  # the last number of a name first: the others may be stages
        groups: dict[tuple[str, ...], list[tuple[list[str], int]]] = {}
        for parts, count in found:
            is_number = place < len(parts) and parts[place].isdecimal()
            key = (*parts[:place], "", *parts[place + 1 :]) if is_number else tuple(parts)
            groups.setdefault(key, []).append((parts, count))
        found = []
        for members in groups.values():
            (parts, count), *others = members
            if others:
                numbers = sorted(int(other[place]) for other, _ in members)
                parts = [*parts[:place], _ranges(numbers), *parts[place + 1 :]]
                count = sum(count for _, count in members)
            found.append((parts, count))
    return {".".join(parts): count for parts, count in found}


def _ranges(numbers: Sequence[int]) -> str:
    """0-2,5 for 0, 1, 2, 5."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
