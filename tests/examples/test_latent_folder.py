"""Folders of latents: shards as one sequence, and what a folder that cannot be trained on says."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from examples.latent_folder import LatentFolder


def write_npy(folder, name, latents, labels):
    np.save(folder / f"{name}.npy", latents)
    if labels is not None:
        np.save(folder / f"{name}.labels.npy", labels)


@pytest.fixture
def folder(tmp_path):
    """a.npy with 3 latents and b.safetensors with 2; all of latent i is i."""
    values = np.arange(5, dtype=np.float16)[:, None, None, None] + np.zeros((1, 4, 2, 6), np.float16)
    write_npy(tmp_path, "a", values[:3], np.array([3, 1, 4]))
    rest = {"latents": torch.from_numpy(values[3:]).bfloat16(), "labels": torch.tensor([1, 5], dtype=torch.int32)}
    save_file(rest, tmp_path / "b.safetensors")
    return tmp_path


def test_shards_are_one_sequence(folder):
    latents = LatentFolder(folder, num_classes=6)
    assert len(latents) == 5
    assert latents.shape == (4, 2, 6)
    assert latents.labels.tolist() == [3, 1, 4, 1, 5]
    for i in range(5):
        assert latents[i].dtype == torch.float32
        assert torch.equal(latents[i], torch.full((4, 2, 6), float(i)))


def test_a_copy_for_another_process_opens_the_files_itself(folder):
    latents = pickle.loads(pickle.dumps(LatentFolder(folder, num_classes=6)))
    assert [latents[i].mean().item() for i in range(5)] == [0, 1, 2, 3, 4]


def test_other_files_are_left_alone(folder):
    (folder / "README.md").write_text("about")
    (folder / "more").mkdir()
    assert len(LatentFolder(folder, num_classes=6)) == 5


def test_an_empty_and_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"must hold latents, NAME.npy .*: got none of these"):
        LatentFolder(tmp_path, num_classes=6)
    with pytest.raises(ValueError, match="got no such folder"):
        LatentFolder(tmp_path / "nowhere", num_classes=6)


GOOD = np.zeros((3, 4, 2, 6), np.float32)
LABELS = np.array([0, 1, 2])


@pytest.mark.parametrize(
    ("latents", "labels", "message"),
    [
        pytest.param(GOOD, None, r"c.npy cannot be read: .*c.labels.npy", id="no labels"),
        pytest.param(GOOD, LABELS[:2], r"whole numbers, one a latent, \(3,\): got \(2,\)", id="too few labels"),
        pytest.param(GOOD, LABELS / 1.0, r"whole numbers, .*got \(3,\), torch.float64", id="labels are float"),
        pytest.param(GOOD, LABELS + 4, r"labels must be 0 .. 5: got 4 .. 6 for .*c.npy", id="label too large"),
        pytest.param(GOOD, LABELS - 1, r"labels must be 0 .. 5: got -1 .. 1", id="negative label"),
        pytest.param(GOOD[:, :3], LABELS, r"one shape .*\(4, 2, 6\) in .*a.npy, \(3, 2, 6\) in .*c.npy", id="shape"),
        pytest.param(GOOD[0], LABELS, r"must be \(n, C, H, W\), .*got \(4, 2, 6\)", id="three dimensions"),
        pytest.param(GOOD.astype(np.uint8), LABELS, r"floating point: got .*torch.uint8 in", id="whole numbers"),
        pytest.param(np.array([None]), LABELS, r"c.npy cannot be read", id="objects"),
    ],
)
def test_bad_shards(folder, latents, labels, message):
    write_npy(folder, "c", latents, labels)
    with pytest.raises(ValueError, match=message):
        LatentFolder(folder, num_classes=6)


@pytest.mark.parametrize("name", ["a.npy", "a.labels.npy", "b.safetensors"])
@pytest.mark.parametrize("size", [0, 50, -1])
def test_truncated_files(folder, name, size):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:size])
    with pytest.raises(ValueError, match="cannot be read: .*It must be whole"):
        LatentFolder(folder, num_classes=6)


def test_labels_whose_latents_are_gone(folder):
    (folder / "a.npy").unlink()
    with pytest.raises(ValueError, match=r"a.labels.npy must stand beside its latents, NAME.npy: got none"):
        LatentFolder(folder, num_classes=6)


@pytest.mark.parametrize("missing", ["latents", "labels"])
def test_safetensors_without_one_of_its_tensors(folder, missing):
    tensors = {"latents": torch.zeros(2, 4, 2, 6), "labels": torch.tensor([0, 1])}
    del tensors[missing]
    save_file(tensors, folder / "b.safetensors")
    with pytest.raises(ValueError, match=f"b.safetensors cannot be read: .*{missing}"):
        LatentFolder(folder, num_classes=6)


def test_latents_that_are_not_finite_are_named(folder):
    values = GOOD.copy()
    values[1, 0, 0, 0] = np.nan
    write_npy(folder, "c", values, LABELS)
    latents = LatentFolder(folder, num_classes=6)
    assert torch.equal(latents[5], torch.zeros(4, 2, 6))
    with pytest.raises(ValueError, match=r"must be finite: got nan or inf in latent 1 of .*c.npy"):
        latents[6]
