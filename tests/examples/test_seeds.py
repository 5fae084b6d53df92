"""Statistics over seeds, against values worked out by hand."""

import math

import pytest

from seeds import mean_and_spread, paired_difference


def test_paired_difference_by_hand():
    """Differences 1, 2, 6: mean 3, standard deviation sqrt(7); t(0.975, 2) = 4.302653."""
    found = paired_difference({0: 71.0, 1: 72.0, 2: 76.0, 3: 99.0}, {0: 70.0, 1: 70.0, 2: 70.0, 9: 0.0})
    assert found.mean == pytest.approx(3)
    assert found.margin == pytest.approx(4.302653 * math.sqrt(7) / math.sqrt(3), rel=1e-6)
    assert str(found) == "+3.00 [-3.57, +9.57]"


def test_paired_difference_of_two_seeds_of_one_and_of_none():
    """t(0.975, 1) = 12.706205: differences 1 and 2 have sqrt(1/2) / sqrt(2) = 1/2 as the error of their mean."""
    two = paired_difference({0: 2.0, 1: 4.0}, {0: 1.0, 1: 2.0})
    assert two.margin == pytest.approx(12.706205 / 2, rel=1e-6)
    one = paired_difference({0: 2.0}, {0: 1.5, 1: 3.0})
    assert str(one) == "+0.50"
    assert paired_difference({0: 2.0}, {1: 1.5}) is None


def test_mean_and_spread():
    assert mean_and_spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00 (3)"
    assert mean_and_spread([1.5]) == "1.50 (1)"
    assert mean_and_spread([]) == "-"
