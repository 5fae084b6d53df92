"""Labelled images from IDX files and from folders, and what a folder that cannot be trained on says."""

import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from examples import image_folder
from examples.image_folder import DataError, Images, LabelledImages


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes())


def write_fashion(folder, *, num_train=30, num_test=10, size=8, num_classes=3, suffix=".gz"):
    """Class k is a bright square whose place depends on k."""
    generator = np.random.default_rng(0)
    for name, count in (("train", num_train), ("t10k", num_test)):
        labels = np.arange(count, dtype=np.uint8) % num_classes
        images = generator.integers(0, 60, (count, size, size)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 3, 2 * label : 2 * label + 3] += 150
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", labels)


@pytest.fixture
def photos(tmp_path):
    """Two classes of 3 + 2 images, 12 rows and 8 columns; image i of a class has the value 10 * i, or 100 + 10 * i."""
    for part, count in (("train", 3), ("test", 2)):
        for name, first in (("cats", 0), ("dogs", 100)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((12, 8), first + 10 * i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_idx_files(tmp_path):
    write_fashion(tmp_path)
    data = image_folder.load(tmp_path, 8)
    assert data.train.pixels.shape == (30, 1, 8, 8)
    assert data.test.pixels.shape == (10, 1, 8, 8)
    assert data.train.pixels.dtype == torch.uint8
    assert data.num_classes == 3
    for pixels, label in zip(data.train.pixels[:, 0], data.train.labels.tolist(), strict=True):
        assert (pixels > 100).nonzero()[0].tolist() == [2 * label, 2 * label]  # mixed, with their labels
    assert data.train.labels.tolist() != sorted(data.train.labels.tolist())
    assert data.fingerprint == image_folder.load(tmp_path, 8).fingerprint
    first = data.train.first(4)
    assert len(first) == 4
    assert torch.equal(first.pixels, data.train.pixels[:4])


def test_where_torchvision_puts_them_unpacked(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    write_fashion(raw, suffix="")
    assert len(image_folder.load(tmp_path, 8).train) == 30


def test_mean_and_standard_deviation():
    pixels = torch.tensor([[0, 255], [255, 255]], dtype=torch.uint8).view(2, 1, 1, 2)
    images = Images(pixels, torch.tensor([0, 1]))
    mean, std = LabelledImages(images, images, 2).mean_std
    assert mean == pytest.approx(0.75)
    assert std == pytest.approx(0.1875**0.5)


def test_class_folders_are_grey_and_cut_to_a_square(photos):
    data = image_folder.load(photos, 4)
    assert data.train.pixels.shape == (6, 1, 4, 4)
    assert data.test.pixels.shape == (4, 1, 4, 4)
    values = data.train.pixels.flatten(1)
    assert (values == values[:, :1]).all()
    assert sorted(zip(data.train.labels.tolist(), values[:, 0].tolist(), strict=True)) == [
        *((0, value) for value in (0, 10, 20)),
        *((1, value) for value in (100, 110, 120)),
    ]


def test_one_image_in_colour_makes_all_so(photos):
    Image.new("RGB", (8, 8), (1, 2, 3)).save(photos / "train" / "cats" / "red.png")
    data = image_folder.load(photos, 8)
    assert data.train.pixels.shape == (7, 3, 8, 8)
    assert [1, 2, 3] in data.train.pixels[:, :, 0, 0].tolist()


def test_the_middle_is_kept(photos):
    """12 rows by 8 columns at their own width: rows 2 to 9 are left."""
    pixels = np.arange(12, dtype=np.uint8).repeat(8).reshape(12, 8)
    Image.fromarray(pixels).save(photos / "test" / "dogs" / "rows.png")
    data = image_folder.load(photos, 8)
    (rows,) = [image[0, :, 0].tolist() for image in data.test.pixels if image.float().std() > 0]
    assert rows == list(range(2, 10))


def test_no_folder_and_nothing_in_it(tmp_path):
    with pytest.raises(DataError, match=r"nowhere must hold Fashion-MNIST .* got no such folder"):
        image_folder.load(tmp_path / "nowhere", 8)
    with pytest.raises(DataError, match=r"got none of these. .*torchvision.datasets.FashionMNIST"):
        image_folder.load(tmp_path, 8)


def test_broken_idx_files_are_named(tmp_path):
    write_fashion(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    for content in (
        b"",
        whole[:-9],
        b"nonsense",
        gzip.compress(b"\0\0\x08\x03"),
        gzip.compress(b"\0\0\x08\x01\0\0\0\x0a12"),
    ):
        labels.write_bytes(content)
        with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz must be a whole IDX file"):
            image_folder.load(tmp_path, 8)
    write_idx(labels, np.zeros(9, np.uint8))
    with pytest.raises(DataError, match="got 10 images and 9 labels in t10k"):
        image_folder.load(tmp_path, 8)
    write_idx(labels, np.full(10, 7, np.uint8))
    with pytest.raises(DataError, match="test labels must be below 3, as those for training are: 10 are not"):
        image_folder.load(tmp_path, 8)
    labels.unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte, with or without .gz, is missing"):
        image_folder.load(tmp_path, 8)


def test_broken_images_are_named(photos):
    whole = (photos / "train" / "cats" / "0.png").read_bytes()
    (photos / "train" / "dogs" / "cut.png").write_bytes(whole[:40])
    (photos / "test" / "cats" / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"images must be whole, .*: got .*cut.png .*text.jpg .*\. Convert") as raised:
        image_folder.load(photos, 8)
    assert "0.png" not in str(raised.value)


def test_images_that_are_too_large_are_named(photos, monkeypatch):
    Image.new("L", (20, 20)).save(photos / "train" / "dogs" / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r": got \S*large.png \(Image size \(400 pixels\) exceeds"):
        image_folder.load(photos, 8)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_images_of_more_than_8_bits_are_named(photos, name):
    """Their values are in [0, 65535], or in no known range: as 8 bits nearly all of them would be white."""
    pixels = np.arange(96).reshape(12, 8) * 600
    deep = pixels.astype(np.uint16) if name == "deep.png" else pixels.astype(np.float32)
    Image.fromarray(deep).save(photos / "test" / "cats" / name)
    with pytest.raises(DataError, match=rf"of mode 1, L, .*: got \S*{name} \(mode (I;16|I|F)\)\. Convert"):
        image_folder.load(photos, 8)


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("LA", 1), ("L", 1), ("P", 3)])
def test_what_is_transparent_is_white(photos, mode, channels):
    """A drawing in grey 40 in the upper half, and black that cannot be seen below."""
    drawn = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawn.paste((40, 40, 40, 255), (0, 0, 8, 4))
    drawn = drawn.convert(mode)
    options = {} if mode.endswith("A") else {"transparency": drawn.getpixel((0, 7))}  # the value that is not seen
    drawn.save(photos / "test" / "cats" / "drawn.png", **options)
    pixels = image_folder.load(photos, 8).test.pixels
    assert pixels.shape == (5, channels, 8, 8)
    (found,) = [image for image in pixels if image.float().std() > 0]
    assert (found[:, :4] == 40).all()
    assert (found[:, 4:] == 255).all()


def test_images_that_show_nothing_are_refused(tmp_path):
    write_fashion(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.full((30, 8, 8), 255, np.uint8))
    with pytest.raises(DataError, match="must show something: got 255 in every pixel of all 30. Look"):
        image_folder.load(tmp_path, 8)


def test_images_in_folders_below_a_class_are_its_own(photos):
    before = image_folder.load(photos, 8)
    cats = photos / "train" / "cats"
    for name in ("z", "a.png"):  # a folder may have any name
        (cats / name / "2026").mkdir(parents=True)
        Image.new("L", (8, 8), 50).save(cats / name / "2026" / "0.PNG")
    data = image_folder.load(photos, 8)
    assert len(data.train) == len(before.train) + 2
    assert data.train.labels[(data.train.pixels == 50).flatten(1).all(1)].tolist() == [0, 0]
    assert data.fingerprint == image_folder.load(photos, 8).fingerprint


def test_empty_and_odd_class_folders_are_named(photos):
    (photos / "train" / "birds").mkdir()
    with pytest.raises(DataError, match=r"test must have the classes of train/: birds are in one only"):
        image_folder.load(photos, 8)
    (photos / "test" / "birds").mkdir()
    (photos / "test" / "birds" / "list.txt").write_text("no image")
    with pytest.raises(DataError, match=r"train.birds must hold images \(.bmp, .*\): got none"):
        image_folder.load(photos, 8)


def test_one_class_and_no_test_images(tmp_path):
    (tmp_path / "train" / "cats").mkdir(parents=True)
    with pytest.raises(DataError, match=r"must hold test/CLASS/NAME.png .* got neither"):
        image_folder.load(tmp_path, 8)
    (tmp_path / "val" / "cats").mkdir(parents=True)
    with pytest.raises(DataError, match=r"a folder for each of two classes or more: got 1"):
        image_folder.load(tmp_path, 8)
