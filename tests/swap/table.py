"""Run the checks of every host and print their table: python -m tests.swap.table [--write] [word ...].

Words choose hosts by their names. With --write the table goes into docs/guides/hosts.md, in place of the one there.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; asked on import

from tests.swap.checks import check_compiled, check_compiles, check_full, check_gradients, check_no_decay
from tests.swap.hosts import HOSTS, HostModel

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "hosts.md"
MARKERS = ("<!-- begin: python -m tests.swap.table --write -->", "<!-- end -->")
COLUMNS = ("model", "sizes", "`none`: same bits", "`full`: error", "gates: gradients", "one graph: error")


def libraries_of(model: nn.Module) -> list[str]:
    """The distribution that the model's classes are from, ours and torch's left out; the first is its own."""
    distributions = importlib.metadata.packages_distributions()
    packages = [type(module).__module__.partition(".")[0] for module in model.modules()]
    return [distributions[package][0] for package in packages if package not in ("torch", "tests", "spatial_decay")]


def told(check: Callable[[], float | None]) -> str:
    """Of a check: yes, its number, or why not."""
    try:
        number = check()
    except Exception as error:  # whatever it is, it is a line of the table
        said = str(error).strip() or "an assertion"
        return f"no: {type(error).__name__}, {' '.join(said.split())[:100]}".replace("|", "/")
    return "yes" if number is None else f"{number:.0e}" if number else "0"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries warn of: the tests look at it."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def row_of(host: HostModel, backend: str) -> tuple[str, ...]:
    """The cells of a host."""
    sizes = list(dict.fromkeys(host.sizes))
    compiled = told(lambda: check_compiled(host, backend))
    if compiled.startswith("no") and told(lambda: check_compiles(host)).startswith("no"):
        compiled = "no, nor without decay"
    return (
        host.name,
        ", ".join(f"{height} x {width}" for height, width in sizes),
        told(lambda: check_no_decay(host)),
        told(lambda: check_full(host)),
        told(lambda: check_gradients(host)),
        compiled,
    )


def table_of(hosts: list[HostModel], backend: str) -> tuple[str, bool]:
    """Markdown with the date and the versions, and whether every check holds."""
    rows, libraries = [], {"torch"}
    for host in hosts:
        start = time.perf_counter()
        with quiet():
            libraries.add(libraries_of(host.build())[0])
            rows.append(row_of(host, backend))
        print(" | ".join(rows[-1]), f"({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(libraries, key=str.lower))
    where = f"{platform.machine()}, Python {platform.python_version()}, {versions}"
    when = f"{datetime.date.today().isoformat()}, {where}; compiled by {backend}:"
    rule = "|" + "|".join(["---"] * len(COLUMNS)) + "|"
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, *rows)]
    table = "\n".join([when, "", lines[0], rule, *lines[1:]])
    return table, not any(cell.startswith("no: ") for row in rows for cell in row)


def write(table: str) -> None:
    """Put it between the markers of the page."""
    begin, end = MARKERS
    before, _, rest = PAGE.read_text().partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n\n{table}\n\n{end}{after}")


def main() -> int:
    """Print the table; the exit code says whether a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="parts of names of hosts; none: all")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile; inductor takes a minute a host")
    arguments = parser.parse_args()
    if arguments.write and arguments.words:
        parser.error("--write needs every host: leave the words out")
    words = [word.lower() for word in arguments.words]
    hosts = [host for host in HOSTS if not words or any(word in host.name.lower() for word in words)]
    table, all_hold = table_of(hosts, arguments.backend)
    print(table)
    if arguments.write:
        write(table)
    return int(not all_hold)


if __name__ == "__main__":
    sys.exit(main())
