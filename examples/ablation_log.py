"""What is in the log of ablation.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_log import Log, require_finite


@dataclass(frozen=True)
class Key:
    """What was measured."""

    model: str
    positions: str
    decay: str
    seed: int
    after: str  # what was trained, or how the decay was told of the size
    size: int  # of the test images, in pixels


@dataclass(frozen=True)
class Result:
    """What came of it."""

    accuracy: float  # percent
    loss: float  # mean of the last epoch, nats; of the training that was measured, nan without one
    seconds: float  # of training and measuring
    date: str
    torch: str
    machine: str

    def __post_init__(self) -> None:
        require_finite(accuracy=self.accuracy)


class RunLog(Log[Key, Result]):
    """See Log."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config, Key, Result)
