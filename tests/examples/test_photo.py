"""The example that draws the README's picture: its maps, its command line, and the picture itself, made anew."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples import photo

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return photo.FillIn(torch.full((1, 3, 1, 1), 0.5), dim=24, num_heads=2, depth=2).eval()


def test_photos_and_their_patches():
    photos = photo.load_photos()
    assert photos.shape == (2, 3, 240, 360)
    assert photos.min() >= 0
    assert photos.max() <= 1
    patches = photo.patches(photos)
    assert patches.shape == (2, 30, 45, 192)
    assert torch.equal(patches[1, 2, 3].view(3, 8, 8), photos[1, :, 16:24, 24:32])


def test_model_fills_in_what_is_masked(model):
    images = torch.rand(1, 3, 24, 32)
    masked = torch.zeros(1, 3, 4, dtype=torch.bool)
    masked[0, 1, 2] = True
    other = images.clone()
    other[:, :, 8:16, 16:24] = 0  # the masked patch
    assert model(images, masked).shape == (1, 3, 4, 192)
    assert torch.equal(model(images, masked), model(other, masked))
    assert not torch.equal(model(images), model(other))


def test_views_hold_the_decay_of_the_head_that_tells_patches_apart_most(model):
    photos = torch.rand(2, 3, 160, 176)
    views = photo.look(model, photos)
    assert len(views) == 2
    mean = torch.stack([view.half for view in views]).log().mean().exp()  # of both photographs
    for view, query in zip(views, photo.QUERIES, strict=True):
        h, w = query.patch
        steps = (torch.arange(20)[:, None] - h).abs() + (torch.arange(22) - w).abs()
        rate = math.log(2) / view.half  # alpha |G|, nats per grid step
        assert torch.allclose(view.learned, torch.exp(-(rate + rate[h, w]) / 2 * steps), atol=1e-5)
        assert torch.allclose(view.fixed, 0.5 ** (steps / mean), atol=1e-5)


@pytest.mark.parametrize("steps", ["0", "many"])
def test_bad_arguments(steps, capsys):
    with pytest.raises(SystemExit) as stopped:
        photo.main(["--steps", steps])
    assert stopped.value.code == 2
    assert f"'{steps}'" in capsys.readouterr().err


@pytest.mark.slow
def test_main_makes_the_pictures_of_the_readme_anew(tmp_path, monkeypatch):
    seen = []
    look = photo.look
    monkeypatch.setattr(photo, "look", lambda *arguments: seen.extend(look(*arguments)) or seen)
    photo.main(["--output", str(tmp_path / "pictures")])
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == ["photo-dark.png", "photo-light.png"]
    for path in pictures:
        assert path.stat().st_size < 300_000
        with Image.open(path) as new, Image.open(PICTURES / path.name) as committed:
            assert new.size == committed.size
    for view in seen:  # the gates tell the parts of the photograph apart
        low, high = view.half.quantile(torch.tensor([0.1, 0.9]))
        assert high > 2 * low
