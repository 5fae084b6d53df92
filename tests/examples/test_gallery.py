"""The gallery: the script draws every picture that the page shows, and no others lie in the folder."""

import re
from pathlib import Path

import pytest
from PIL import Image

from examples import gallery

DOCS = Path(__file__).parents[2] / "docs"


def pictures_of_the_page():
    return set(re.findall(r"pictures/(gallery-[\w-]+\.\w+)", (DOCS / "gallery.md").read_text()))


def test_the_pages_pictures_are_there_and_small():
    paths = {path.name: path for path in (DOCS / "pictures").glob("gallery-*")}
    assert set(paths) == pictures_of_the_page()
    assert [name for name, path in paths.items() if path.stat().st_size > 700_000] == []


def test_a_loop_stays_on_the_grid():
    path = gallery.loop(24)
    assert len(set(path)) == 24
    assert all(0 <= h < 56 and 0 <= w < 80 for h, w in path)


@pytest.mark.slow
def test_the_gallery_is_made_anew(tmp_path, capsys):
    gallery.main(["--output", str(tmp_path), "--steps", "2", "--steps-of-kinds", "1", "--frames", "2"])
    made = {path.name: path for path in tmp_path.iterdir()}
    assert set(made) == pictures_of_the_page()
    for name, path in made.items():
        with Image.open(path) as new, Image.open(DOCS / "pictures" / name) as old:
            # Labels of colour bars are as wide as their numbers.
            assert max(abs(x - y) for x, y in zip(new.size, old.size, strict=True)) <= 40, name
    assert "blocks.2.attn/gate/std_tokens" in capsys.readouterr().out
