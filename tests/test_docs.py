"""Every Python block of the README and the docs runs as written, and every docstring's example gives what it says."""

import doctest
import importlib
import re
import textwrap
from pathlib import Path

import pytest
import torch

import spatial_decay

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spatial_decay"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOW = {"export.md": pytest.mark.slow, "gallery.md": pytest.mark.slow}  # three exports; a figure for each plot


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=SLOW.get(page.name, ())) for page in PAGES], ids=lambda page: page.name
)
def test_blocks_of_a_page_run_one_after_the_other(page):
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    namespace = {"__name__": "page"}
    for _, block in blocks:
        exec(compile(textwrap.dedent(block), str(page), "exec"), namespace)


MODULES = [
    f"spatial_decay.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}".removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
]
# They have no examples, and are imported by ops/test_triton.py alone: see conftest.py.
KERNELS = "spatial_decay.ops.triton.kernels"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith(KERNELS)])
def test_docstring_examples(name):
    module = importlib.import_module(name)
    rooms = (spatial_decay, spatial_decay.decay, spatial_decay.layers, spatial_decay.models)
    names = {public: getattr(room, public) for room in rooms for public in room.__all__} | {"torch": torch}
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_the_readme_has_its_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert 'pip install -e ".[demo]" && python examples/digits.py' in readme
    assert 'pip install -e ".[test]" && pytest' in readme


def test_pages_and_examples_that_are_named_are_there():
    named = set()
    for page in (*PAGES, ROOT / "CHANGELOG.md"):
        named |= set(re.findall(r"\b(?:docs|examples|tests|benchmarks)/[\w/]+\.(?:md|py|sh)\b", page.read_text()))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = {page.name for page in PAGES[1:]} - {"from_readme.md"}  # which waits to be moved into other pages
    assert [page for page in sorted(pages) if f": {page}\n" not in nav] == []  # --strict does not mind


def test_the_readmes_sizes_are_the_tested_ones():
    readme = (ROOT / "README.md").read_text()
    for build in (spatial_decay.sdt_h_tiny, spatial_decay.sdt_h_small, spatial_decay.sdt_h_base):
        with torch.device("meta"):
            millions = sum(parameter.numel() for parameter in build().parameters()) / 1e6
        assert f"| `{build.__name__}` | {millions:.2f} M |" in readme


def test_the_readme_is_read_in_two_minutes():
    words = re.findall(r"\S*\w\S*", (ROOT / "README.md").read_text())  # not the lines of tables
    assert len(words) < 700


def test_the_readmes_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\"]+)", readme)
    places = [link.partition("#") for link in links if "://" not in link]
    assert len(places) > 10
    for path, _, anchor in places:
        page = ROOT / (path or "README.md")
        assert page.is_file(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor


def test_the_readmes_first_block_prints_what_is_shown(capsys):
    readme = (ROOT / "README.md").read_text()
    block, language, shown = re.findall(r"```python\n(.*?)```\s+```(\w+)\n(.*?)```", readme, re.DOTALL)[0]
    assert language == "text"
    exec(compile(block, "README.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == shown
