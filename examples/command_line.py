"""What the examples' command lines have in common: what argparse calls to read a value, or to say what it must be."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def at_least(low: int) -> Callable[[str], int]:
    """Of a whole number that is no smaller."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {low}: got {text!r}")
        return int(text)

    return parse


def number(text: str, below: float = math.inf) -> float:
    """Of a number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < below:
        raise argparse.ArgumentTypeError(f"must be a number, 0 <= number < {below:g}: got {text!r}")
    return value


def folder(text: str) -> Path:
    """Of a folder for results."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, or not be there yet: got the file {path}")
    return path
