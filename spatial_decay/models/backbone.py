"""What the image backbones share: a classifier and its pooling, as timm's models have them, and features by number."""

from collections.abc import Sequence
from typing import ClassVar, TypeAlias, TypedDict

from torch import nn

from spatial_decay.models.common import Model, check_whole, init_linear

__all__ = ["Backbone", "FeatureInfo", "Groups", "block_numbers"]

Groups: TypeAlias = dict[str, str | list[tuple[str, tuple[int] | None]]]
"""Patterns of parameter names by depth, in timm's form."""


class FeatureInfo(TypedDict):
    """A map of forward_intermediates, in timm's words.

    Attributes:
        module: Name of the module that gives it.
        num_chs: Its channels.
        reduction: Its stride.
    """

    module: str
    num_chs: int
    reduction: int


class Backbone(Model):
    """An image backbone with a classifier, with the attributes and methods that timm's models have.

    Attributes:
        num_classes: Outputs of the classifier; 0: none.
        in_chans: Channels of the image.
        num_features: D of what forward_features gives.
        head_hidden_size: Width of what the classifier reads.
        global_pool: What the classifier reads, one of pools; "": nothing is pooled.
        feature_info: Of each map of forward_intermediates.
    """

    pools: ClassVar[tuple[str, ...]]
    num_features: int
    head_hidden_size: int
    feature_info: list[FeatureInfo]

    def __init__(self, in_chans: int, *, drop_rate: float) -> None:
        super().__init__()
        check_whole(1, in_chans=in_chans)
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate must satisfy 0 <= drop_rate < 1: got {drop_rate}.")
        self.in_chans = in_chans
        self.head_drop = nn.Dropout(drop_rate)

    def get_classifier(self) -> nn.Module:
        """The last layer: nn.Linear, or nn.Identity where num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, freshly initialised, on the device and in the dtype of the model.

        Args:
            num_classes: Its outputs; 0 leaves it out, and forward gives what it would have read.
            global_pool: Another pooling, "" for none (then num_classes must be 0); None keeps the present one.

        Raises:
            ValueError: a number of classes or a pooling that cannot be; the model is as it was.
        """
        self._set_classifier(num_classes, self.global_pool if global_pool is None else global_pool)
        self._note_in_config(num_classes=self.num_classes, global_pool=self.global_pool)
        like = next(self.parameters())
        self.head.to(device=like.device, dtype=like.dtype).apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser should not decay: biases, norms and LayerScale."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def _set_classifier(self, num_classes: int, global_pool: str) -> None:
        check_whole(0, num_classes=num_classes)
        self._check_pool(num_classes, global_pool)
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head: nn.Module = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def _check_pool(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in self.pools:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, self.pools))}: got {global_pool!r}.")
        if num_classes and not global_pool:
            raise ValueError(
                f"global_pool='' needs num_classes=0, it reads pooled features: got num_classes={num_classes}."
            )


def block_numbers(indices: int | Sequence[int] | None, count: int, what: str) -> list[int]:
    """Which of count stages or blocks, ascending: all (None), the last so many (a number), or those named, -1 the last.

    Raises:
        ValueError: there are no such ones.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"indices, as a number, means the last so many {what}, 1 to {count}: got {indices}.")
        return list(range(count - indices, count))
    if not indices or any(not -count <= i < count for i in indices):
        raise ValueError(f"indices must name {what} from 0 to {count - 1} (or negative): got {list(indices)}.")
    return sorted({i % count for i in indices})
