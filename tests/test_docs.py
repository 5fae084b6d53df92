"""README and docs: Python blocks run and print what is shown, links lead somewhere, lines fit; docstrings' examples."""

import contextlib
import doctest
import importlib
import io
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import spatial_decay
from spatial_decay.layers.kind import OnReferenceGrid

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "spatial_decay"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SLOW = {"gallery.md", "guides/dense.md", "guides/export.md"}  # a figure for each plot; four frameworks; three exports
SHOWN = doctest.OutputChecker()  # `...` stands for any text, and where lines are broken does not matter


def name_of(page):
    return str(page.relative_to(DOCS)) if page.is_relative_to(DOCS) else page.name


def as_parameter(page):
    marks = pytest.mark.slow if name_of(page) in SLOW else ()
    return pytest.param(page, marks=marks, id=name_of(page))


class Block(NamedTuple):
    language: str
    text: str
    shown: str | None  # what a block of Python is said to print, by the block of text right behind it


def blocks_of(page):
    found = list(re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", page.read_text(), re.DOTALL | re.MULTILINE))
    for block, after in zip(found, [*found[1:], None], strict=False):
        is_shown = after and after[2] == "text" and not page.read_text()[block.end() : after.start()].strip()
        yield Block(block[2], textwrap.dedent(block[3]), textwrap.dedent(after[3]) if is_shown else None)


@pytest.mark.parametrize("page", [as_parameter(page) for page in PAGES if "```python" in page.read_text()])
def test_blocks_of_a_page_run_one_after_the_other_and_print_what_is_shown(page):
    namespace = {"__name__": "page"}
    for block in blocks_of(page):
        if block.language != "python":
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block.text, str(page), "exec"), namespace)
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert SHOWN.check_output(block.shown or "", printed.getvalue(), flags), (block.text, printed.getvalue())


def test_a_kind_written_out_in_the_docs_hears_its_options():
    """One that inherits reference_grid measures by it."""
    page = DOCS / "project" / "extending.md"
    namespace = {"__name__": "page"}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks_of(page):
            if block.language == "python":
                exec(compile(block.text, str(page), "exec"), namespace)
    kinds = [x for x in namespace.values() if isinstance(x, type) and issubclass(x, OnReferenceGrid)]
    assert kinds
    x = torch.randn(1, 6, 8, 16)
    for kind in kinds:
        of_steps, halved = (
            spatial_decay.SpatialDecayMask(16, 2, decay=kind(reference_grid=size)) for size in (None, (3, 4))
        )
        halved.load_state_dict(of_steps.state_dict())
        torch.testing.assert_close(2 * halved(x), of_steps(x))


def test_code_is_at_most_80_columns_wide():
    lines = [(name_of(page), line) for page in PAGES for block in blocks_of(page) for line in block.text.splitlines()]
    assert len(lines) > 500
    assert [(page, line) for page, line in lines if len(line) > 80] == []


PAPERS = {
    "SDT": "2508.09525",
    "RMT": "2309.11523",
    "LocAtViT": "2603.04892",
    "DiT": "2212.09748",
    "RoPE": "2104.09864",
    "ALiBi": "2108.12409",
}


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in PAGES])
def test_methods_are_linked_where_a_page_names_them_first(page):
    prose = re.sub(r"^( *)```.*?^\1```$|`[^`]*`|^#.*?$|^:::.*?$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for name, paper in PAPERS.items():
        first = re.search(rf"(?<![\w/-]){name}(?![\w-]).*", prose)  # not SDT-H, facebookresearch/DiT
        assert first is None or first[0].startswith(f"{name}](https://arxiv.org/abs/{paper})"), first[0]


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
    examples = [example for test in doctest.DocTestFinder().find(module) for example in test.examples]
    lines = [">>> " + line for example in examples for line in (example.source + example.want).splitlines()]
    assert [line for line in lines if len(line) > 80] == []  # they stand on the pages of the API


def test_the_readme_has_its_commands():
    readme = (ROOT / "README.md").read_text()
    assert 'pip install -e ".[demo]" && python examples/photo.py' in readme
    assert 'pip install -e ".[demo]" && python examples/digits.py' in readme
    assert 'pip install -e ".[test]" && pytest' in readme


def test_a_clone_is_installed_as_editable():
    # Python that is started in the clone imports the clone's code, where only pip install -e compiles the kernel.
    found = {name_of(page) for page in PAGES if re.search(r'pip install "?\.', page.read_text())}
    assert found == {"performance/compile.md"}  # its table has both


def test_pages_and_examples_that_are_named_are_there():
    named = set()
    for page in (*PAGES, ROOT / "CHANGELOG.md"):
        named |= set(re.findall(r"\b(?:docs|examples|tests|benchmarks)/[\w/]+\.(?:md|py|sh)\b", page.read_text()))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    nav = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in PAGES[1:] if f": {name_of(page)}\n" not in nav] == []  # --strict does not mind


def test_the_readmes_sizes_are_the_tested_ones():
    readme = (ROOT / "README.md").read_text()
    for build in (spatial_decay.sdt_h_tiny, spatial_decay.sdt_h_small, spatial_decay.sdt_h_base):
        with torch.device("meta"):
            millions = sum(parameter.numel() for parameter in build().parameters()) / 1e6
        assert f"| `{build.__name__}` | {millions:.2f} M |" in readme


def test_the_readme_is_read_in_two_minutes():
    words = re.findall(r"\S*\w\S*", (ROOT / "README.md").read_text())  # not the lines of tables
    assert len(words) < 700


def anchors_of(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    documented = re.findall(r"^::: (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings} | {*documented}


def links_of(page):
    """Where a page leads within the repository, as (path, anchor)."""
    prose = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"|^\[[^]]+\]: (\S+)$", prose, re.MULTILINE)
    places = ["".join(link).partition("#") for link in links if "://" not in "".join(link)]
    return [(page.parent / path if path else page, anchor) for path, _, anchor in places]


def test_links_lead_somewhere():
    links = [(page, *link) for page in (*PAGES, ROOT / "CONTRIBUTING.md") for link in links_of(page)]
    assert len(links) > 150
    for page, target, anchor in links:
        assert target.is_file(), (page, target)
        if anchor and target.suffix == ".md":
            assert anchor in anchors_of(target), (page, target, anchor)
