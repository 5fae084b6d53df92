"""Composites: what is known of them by construction, and what a folder that cannot be used says."""

import numpy as np
import pytest
import torch

import dense_data
from dense_data import CLASSES, SIZE, Composites, Pieces
from image_folder import DataError
from tests.examples.test_image_folder import write_idx

NUM_TRAIN, NUM_TEST = 40, 20


def write_fashion(folder, *, num_classes=10, side=28):
    """Image i is a rectangle with a dark hole, as bright as i and the split say: none is like another."""
    for name, count, first in (("train", NUM_TRAIN, 100), ("t10k", NUM_TEST, 200)):
        images = np.zeros((count, side, side), np.uint8)
        images[:, 4:24, 8:20] = first + np.arange(count, dtype=np.uint8)[:, None, None]
        images[:, 10:14, 12:16] = 0
        labels = np.arange(count, dtype=np.uint8) % num_classes
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            write_idx(folder / f"{name}-{kind}-ubyte.gz", array)
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return dense_data.load_pieces(write_fashion(tmp_path_factory.mktemp("fashion")))


def test_training_and_test_share_nothing(pieces):
    train, test = pieces
    assert not {*dense_data.TRAIN_PHOTOS} & {*dense_data.TEST_PHOTOS}
    assert len(train.photos) == 7
    assert len(test.photos) == 4
    assert all(photo.dtype == torch.uint8 and photo.shape[0] == 3 for part in pieces for photo in part.photos)
    # Four of ten classes, each with as many images; all scans: 1,400 and 397.
    assert [len(part.things) for part in pieces] == [NUM_TRAIN * 4 // 10 + 1400, NUM_TEST * 4 // 10 + 397]
    assert [len(part.things) == len(part.labels) for part in pieces] == [True, True]
    seen = {thing.numpy().tobytes() for thing in train.things}
    assert not [thing for thing in test.things if thing.numpy().tobytes() in seen]


def test_labels_are_of_the_pieces(pieces):
    train, _ = pieces
    for thing, label in zip(train.things, train.labels, strict=True):
        if label < len(CLASSES) - 1:
            number = round(thing.max().item() * 255) - 100  # of the image
            assert dense_data.FASHION[number % 10] == CLASSES[label]
        else:
            assert thing.shape == (8, 8)


def test_boxes_and_masks_are_of_one_piece_each(pieces):
    data = dense_data.compose(pieces[1], 40, seed=3)
    assert data.images.shape == (40, 3, SIZE, SIZE)
    assert data.images.dtype == torch.uint8
    assert {len(labels) for labels in data.labels} == {1, 2, 3}
    for mask, boxes, labels in zip(data.masks, data.boxes, data.labels, strict=True):
        outside = mask.clone()
        for (x0, y0, x1, y1), label in zip(boxes.long().tolist(), labels.tolist(), strict=True):
            part = mask[y0:y1, x0:x1]
            assert set(part.unique().tolist()) <= {0, label}
            is_inside = part > 0
            edges = (is_inside[0], is_inside[-1], is_inside[:, 0], is_inside[:, -1])
            assert all(edge.any() for edge in edges)  # the box is as small as can be
            assert (outside[y0:y1, x0:x1] >= 0).all()  # boxes do not overlap
            outside[y0:y1, x0:x1] = -1
        assert (outside <= 0).all()


def test_a_hole_belongs_to_the_piece():
    thing = torch.zeros(28, 28)
    thing[4:24, 8:20] = 1
    thing[10:14, 12:16] = 0
    colours, inside = dense_data._cut_out(thing, (30, 30), np.random.default_rng(0))
    assert inside.all()
    assert colours.shape == (3, *inside.shape)
    assert inside.shape[0] > inside.shape[1]


def test_a_piece_lies_on_the_photograph_and_hides_nothing_else(pieces):
    grey = Pieces([torch.full((3, 300, 300), 77, dtype=torch.uint8)], pieces[0].things, pieces[0].labels)
    data = dense_data.compose(grey, 10, seed=0)
    background = (data.masks == 0)[:, None].expand_as(data.images)
    assert (data.images[background] == 77).all()
    assert (data.images[~background] == 77).float().mean() < 0.1


def test_the_seed_says_all(pieces):
    first, again, other = (dense_data.compose(pieces[0], 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.fingerprint.startswith("8 images")


def test_as_many_pieces_as_asked_for(pieces):
    data = dense_data.compose(pieces[0], 12, seed=0, num_pieces=(1, 1))
    assert [len(labels) for labels in data.labels] == [1] * 12


def test_without_room_a_piece_is_left_out():
    inside = torch.ones(20, 20, dtype=torch.bool)
    full = [(0, 0, SIZE, SIZE)]
    assert dense_data._find_room(inside, full, np.random.default_rng(0)) is None
    assert dense_data._find_room(inside, [], np.random.default_rng(0)) is not None


def test_normalised():
    assert dense_data.normalised(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"must hold Fashion-MNIST .*: got none of these"):
        dense_data.load_pieces(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        dense_data.load_pieces(tmp_path / "nowhere")


def test_other_images_than_fashion_mnist(tmp_path):
    with pytest.raises(DataError, match="must hold Fashion-MNIST, grey images of 10 classes: got 1 channels and 4"):
        dense_data.load_pieces(write_fashion(tmp_path, num_classes=4))


def test_composites_are_counted():
    assert len(Composites(torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2, SIZE, SIZE), [], [])) == 2
