"""What each stage of a hierarchical model has of its own: one value for all of them, or a list with one a stage."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeGuard, TypeVar, cast

__all__ = ["PerStage", "is_list", "num_stages", "per_stage"]

T = TypeVar("T")
PerStage: TypeAlias = T | Sequence[T]


def num_stages(**values: object) -> int:
    """How many stages the lists among these options say.

    Raises:
        ValueError: they do not agree, there is none, or a value that is neither.
    """
    lengths = {name: len(value) for name, value in values.items() if is_list(value)}
    for name, value in values.items():
        if lengths.get(name) == 0 or (isinstance(value, (str, Mapping)) and name != "decay"):
            raise ValueError(
                f"{name} must be one value for all stages, or a list with one value a stage: got {value!r}."
            )
    if len(set(lengths.values())) != 1:
        raise ValueError(
            "every per-stage list must have one value a stage: got "
            + (", ".join(f"{length} {name}" for name, length in lengths.items()) or "no list at all")
            + ". Pass lists of the same length, at least one; one value stands for all stages."
        )
    return next(iter(lengths.values()))


def per_stage(value: PerStage[T], count: int) -> list[T]:
    """One value a stage."""
    return list(cast(Sequence[T], value)) if is_list(value) else [cast(T, value)] * count


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a value is one for each stage."""
    return isinstance(value, Sequence) and not isinstance(value, str)
