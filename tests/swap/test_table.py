"""The table of the hosts: each has its row on the page, and a check that fails is a row too."""

import pytest

from tests.swap import table
from tests.swap.hosts import HOSTS


def rows_of_page():
    begin, end = table.MARKERS
    between = table.PAGE.read_text().partition(begin)[2].partition(end)[0]
    return [line.strip("| ").split(" | ") for line in between.splitlines() if line.startswith("| ")]


def test_the_page_has_a_row_of_each_host_and_every_check_holds():
    """After a new row of HOSTS: python -m tests.swap.table --write."""
    header, *rows = rows_of_page()
    assert tuple(header) == table.COLUMNS
    assert [row[0] for row in rows] == [host.name for host in HOSTS]
    for name, _, same_bits, error, gradients, one_graph in rows:
        assert (same_bits, gradients) == ("yes", "yes"), name
        assert float(error) < 2e-6, name
        assert not one_graph.startswith("no: "), name


def test_a_check_that_fails_is_told():
    def fails():
        raise ValueError("on | two\nlines")

    assert table.told(fails) == "no: ValueError, on / two lines"
    assert table.told(lambda: None) == "yes"
    assert (table.told(lambda: 3.21e-7), table.told(lambda: 0.0)) == ("3e-07", "0")


@pytest.mark.slow  # it asks every package that is installed
def test_the_versions_are_those_of_the_hosts_libraries():
    assert table.libraries_of(HOSTS[0].build())[0] == "timm"
    own = next(host for host in HOSTS if host.name == "a DiT of timm's layers")
    assert table.libraries_of(own.build())[0] == "timm"


def test_write_replaces_what_is_between_the_markers(tmp_path, monkeypatch):
    page = tmp_path / "hosts.md"
    page.write_text("before\n\n{}\n\nold\n\n{}\n\nafter\n".format(*table.MARKERS))
    monkeypatch.setattr(table, "PAGE", page)
    for new in ("one", "two"):
        table.write(new)
        assert page.read_text() == f"before\n\n{table.MARKERS[0]}\n\n{new}\n\n{table.MARKERS[1]}\n\nafter\n"
