"""Results of several seeds: mean, standard deviation, and the difference to another row seed by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit


@dataclass(frozen=True)
class Difference:
    """Of two results seed by seed: the mean over seeds, and how far its 95 % interval reaches on both sides."""

    mean: float
    margin: float  # inf of one seed

    def __str__(self) -> str:
        if math.isinf(self.margin):
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} [{self.mean - self.margin:+.2f}, {self.mean + self.margin:+.2f}]"


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """ours - theirs, over the seeds of both, with Student's t; None without such a seed."""
    differences = [ours[seed] - theirs[seed] for seed in sorted({*ours} & {*theirs})]
    if not differences:
        return None
    count = len(differences)
    margin = math.inf
    if count > 1:
        quantile = float(stdtrit(count - 1, 0.975))  # of Student's t
        margin = quantile * statistics.stdev(differences) / math.sqrt(count)
    return Difference(statistics.mean(differences), margin)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (number of seeds)."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} ({len(values)})"
