"""load_checkpoint and files: damaged ones, those that say too much, and several threads that read at once."""

import argparse
import io
import pickle
import random
import threading
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save

import spatial_decay as sd
from tests.faults import damaged, killed


def small():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def saved(found, **options):
    file = io.BytesIO()
    torch.save(found, file, **options)
    return file.getvalue()


def changed_archive(content, change):
    """A copy of a zip archive, its sums made anew, with other records."""
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file := io.BytesIO(), "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return file.getvalue()


ARGS = argparse.Namespace(lr=0.1, of=["argparse Namespace", argparse.Namespace(text="cargparse\nNamespace\n")])


@pytest.mark.parametrize("older", [False, True], ids=["zip", "older file"])
def test_command_lines_are_left_out(older, tmp_path):
    """Of the published files: pickled classes that PyTorch does not allow; text that looks like them stays."""
    model, other = small(), small()
    found = {"note": ARGS.of[1].text, "args": ARGS, "model": other.state_dict(), "again": [ARGS, ARGS]}
    path = tmp_path / "rmt.pth"
    path.write_bytes(saved(found, _use_new_zipfile_serialization=not older))
    assert sd.load_checkpoint(model, path).is_complete
    assert same(model.state_dict(), other.state_dict())
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_threads_do_not_allow_each_other_anything(tmp_path):
    """What one thread's torch.load may read does not depend on another thread's load_checkpoint."""
    source, path = state_of(small()), tmp_path / "rmt.pth"
    torch.save({"model": source, "args": ARGS}, path)
    wrong, start = [], threading.Barrier(6)

    def ours():
        model = small()
        sd.load_checkpoint(model, path)
        if not same(model.state_dict(), source):
            raise ValueError("other values were loaded")

    def theirs():
        with pytest.raises(pickle.UnpicklingError, match="argparse.Namespace"):
            torch.load(path, weights_only=True)

    def again(work):
        start.wait()
        for _ in range(20):
            try:
                work()
            except BaseException as error:  # noqa: PERF203  each call is counted
                wrong.append(f"{work.__name__}: {error}"[:200])

    threads = [threading.Thread(target=again, args=(work,)) for work in (ours, theirs) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, (len(wrong), set(wrong))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_safe_globals_are_those_of_all_threads(tmp_path):
    """Why load_checkpoint does not use them."""
    torch.save({"args": argparse.Namespace()}, tmp_path / "args.pt")
    loaded = []
    thread = threading.Thread(target=lambda: loaded.append(torch.load(tmp_path / "args.pt", weights_only=True)))
    with torch.serialization.safe_globals([argparse.Namespace]):
        thread.start()
        thread.join()
    assert loaded, "mended upstream: safe_globals are a thread's own, and could replace files._without"


def test_a_flipped_bit_in_the_weights(tmp_path):
    """torch.load does not look at the sums that torch.save writes."""
    model, other, path = small(), small(), tmp_path / "own.pt"
    content = bytearray(saved(other.state_dict()))
    content[content.find(other[0].weight.detach().numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)
    before = state_of(model)
    loaded = torch.load(path, weights_only=True)
    assert not torch.equal(loaded["0.weight"], other[0].weight), "mended upstream: torch.load checks the sums itself"
    with pytest.raises(ValueError, match=r"can be read safely: Bad CRC-32 for file 'archive/data/0'"):
        sd.load_checkpoint(model, path)
    assert same(model.state_dict(), before)


def test_archives_without_sums(tmp_path):
    model, other, path = small(), small(), tmp_path / "own.pt"
    torch.serialization.set_crc32_options(False)
    try:
        path.write_bytes(saved(other.state_dict()))
    finally:
        torch.serialization.set_crc32_options(True)
    assert sd.load_checkpoint(model, path).is_complete
    assert same(model.state_dict(), other.state_dict())


def test_archives_that_grow(tmp_path):
    """A few kilobytes that unpack to a gigabyte."""
    path = tmp_path / "bomb.pt"
    content = saved({"w": torch.zeros(2**22)})
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"its parts would take 16777\d+ bytes, and the file has \d{5};"):
        sd.load_checkpoint(small(), path)


@pytest.mark.parametrize("what", ["tensor", "storage"])
def test_crafted_sizes(what, tmp_path):
    """A tensor that is larger than its storage, and a storage that is larger than its record."""
    path = tmp_path / "crafted.pt"
    old = {"tensor": b"K\x06\x85", "storage": b"K\x06tq"}[what]
    new = b"J" + (2**28).to_bytes(4, "little") + old[2:]
    path.write_bytes(changed_archive(saved({"w": torch.arange(6.0)}), lambda _, part: part.replace(old, new)))
    try:
        torch.load(path, weights_only=True)
    except RuntimeError:
        assert not killed(lambda: refused(path))
    else:
        pytest.skip("this release of PyTorch believes what a crafted file says of its storages")


def test_an_empty_file(tmp_path):
    """Python's error for it has no text."""
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ValueError, match=r"can be read safely: \S"):
        sd.load_checkpoint(small(), tmp_path / "empty.pt")


def refused(path):
    with pytest.raises(ValueError, match="not a checkpoint that can be read safely"):
        sd.load_checkpoint(small(), path)


def outcomes(content, suffix, count, seed, folder):
    """What load_checkpoint does with damaged files: how many it refuses, loads as they were, and loads as damaged."""
    rng, path = random.Random(seed), folder / f"damaged{suffix}"
    path.write_bytes(content)
    sd.load_checkpoint(whole := small(), path)
    whole, counts = state_of(whole), {"refused": 0, "loaded whole": 0, "loaded as damaged": 0}
    start = {name: torch.full_like(value, 7) for name, value in whole.items()}
    for _ in range(count):
        path.write_bytes(damaged(content, rng))
        model = small()
        model.load_state_dict(start)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch's, of kinds of tensors
                assert sd.load_checkpoint(model, path).is_complete
        except ValueError:
            assert same(model.state_dict(), start)
            counts["refused"] += 1
        else:
            is_whole = same(model.state_dict(), whole)
            # Not one tensor is left as it was: there is no half.
            assert not any(torch.equal(value, start[name]) for name, value in model.state_dict().items())
            counts["loaded whole" if is_whole else "loaded as damaged"] += 1
    return counts


FORMS = {
    "zip": (".pt", lambda state: saved(state)),
    "zip with a command line": (".pt", lambda state: saved({"model": state, "args": ARGS})),
    "older file": (".pt", lambda state: saved(state, _use_new_zipfile_serialization=False)),
    "safetensors": (".safetensors", save),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_files(form, count, tmp_path):
    """Refused, or loaded whole. Damage inside the numbers of files without sums cannot be seen."""
    suffix, make = FORMS[form]
    counts = outcomes(make(state_of(small())), suffix, count, 14, tmp_path)
    assert counts["refused"] > count / 3, counts
    if form.startswith("zip"):
        assert not counts["loaded as damaged"], counts
