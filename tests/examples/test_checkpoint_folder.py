"""Checkpoints of train_sdt_p: damaged, hostile or lost, of killed runs and of two at once. Whole, or refused."""

import contextlib
import gc
import hashlib
import io
import itertools
import os
import pickle
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch.distributed.checkpoint import FileSystemReader

from examples import train_sdt_p
from tests.faults import damaged, killed

SUMS = "SHA256SUMS"
NUM_DAMAGED, NUM_KILLS, MOMENTS = 100, 10, 25  # 1,000, 100 and every moment: nothing lost, nothing half loaded
OPTIONS = {
    "num-classes": 10,
    "dim": 8,
    "depth": 1,
    "num-heads": 1,
    "batch-size": 2,
    "lr": 0.01,
    "ema-decay": 0.9,
    "log-every": 1,
    "checkpoint-every": 4,
    "steps": 16,
    "workers": 0,
}


@pytest.fixture(scope="module", autouse=True)
def _without_rests(one_cpu):
    with pytest.MonkeyPatch.context() as patch:
        if torch.__version__ >= "2.8":  # whose gloo needs none
            patch.setattr(train_sdt_p.time, "sleep", lambda seconds: None)
        yield


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    generator = np.random.default_rng(0)
    np.save(folder / "a.npy", generator.standard_normal((9, 4, 4, 4), dtype=np.float32))
    np.save(folder / "a.labels.npy", generator.integers(10, size=9))
    return folder


def train(latents, out, *flags, **options):
    named = OPTIONS | {"latents": latents, "out": out} | {name.replace("_", "-"): v for name, v in options.items()}
    train_sdt_p.main([*(f"--{name}={value}" for name, value in named.items()), *flags])


def files(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def results(out):
    """But for what has the name of a run, or of this moment, in it."""
    return {path: content for path, content in files(out).items() if path.name not in (".metadata", SUMS)}


def seal(folder):
    """Make the sums anew, as anybody can who has changed a file."""
    (folder / SUMS).unlink(missing_ok=True)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(lines))


@pytest.fixture(scope="module")
def unbroken(latents, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    train(latents, out)
    return out


@pytest.fixture
def run(unbroken, tmp_path):
    """A finished run of its own, to spoil."""
    return shutil.copytree(unbroken, tmp_path / "run")


@pytest.fixture
def newest(run):
    return run / "checkpoints" / "step-00000016"


@pytest.fixture
def refused(run, latents):
    """Resumes, and holds that nothing was changed."""

    def check(message, *flags):
        before = files(run)
        with pytest.raises((RuntimeError, ValueError), match=message):
            train(latents, run, *(flags or ["--resume"]))
        assert files(run) == before

    return check


GO_BACK = r"Nothing was changed. The last whole one is \S+step-00000012: remove \S+step-00000016 to go on from there"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "losses.csv", "settings.json", SUMS])
def test_one_other_bit_is_refused(name, newest, refused, run, latents, unbroken):
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    refused(rf"step-00000016 must hold the files that its SHA256SUMS lists, as they were written: .*{GO_BACK}")
    if name == ".metadata":  # the advice is right
        shutil.rmtree(newest)
        train(latents, run, "--resume")
        assert results(run) == results(unbroken)


def test_a_folder_of_a_step_that_is_empty_or_no_folder(run, refused):
    empty = run / "checkpoints" / "step-00000020"
    empty.mkdir()
    advice = r"The last whole one is \S+step-00000016: remove \S+step-00000020 to go on"
    refused(rf"step-00000020 must be a folder of files that its SHA256SUMS lists: .*{advice}")
    empty.rmdir()
    empty.touch()
    refused(rf"step-00000020 must be a folder of files .*{advice}")


def test_none_is_whole(run, refused):
    for path in (run / "checkpoints").iterdir():
        (path / "losses.csv").unlink()
    refused("losses.csv is missing, changed or not listed. Nothing was changed. There is no whole one. Pass another")


def test_a_copy_of_another_name_is_no_checkpoint(newest, run, latents, unbroken):
    newest.rename(newest.with_name("step-00000016-old"))
    train(latents, run, "--resume")
    assert newest.with_name("step-00000016-old").exists()
    assert {path: content for path, content in results(run).items() if "-old" not in str(path)} == results(unbroken)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "losses.csv",
            "\n16,",
            "\n17,",
            r"losses.csv must have a finite loss for every 1 steps up to 16, 16 rows: got 16",
        ),
        ("losses.csv", "\n5,", "\n5,nan #", "losses.csv must have rows of a step and a loss: could not convert"),
        ("losses.csv", "step,loss\n", "", "losses.csv must have a finite loss .*: got 15"),
        ("settings.json", '"step": 16', '"step": 12', 'settings.json must be a mapping with "step": 16 and'),
        ("settings.json", '"log_every": 1', '"log_every": 0', 'must be a mapping with .*"log_every" >= 1'),
        ("settings.json", "{", "[", "settings.json must be the JSON of a run's settings"),
        ("settings.json", "{", "[" * 10**5, "settings.json must be the JSON of a run's settings"),
    ],
)
def test_sealed_nonsense(name, old, new, message, newest, refused):
    text = (newest / name).read_text()
    assert text.count(old) >= 1
    (newest / name).write_text(text.replace(old, new, 1))
    seal(newest)
    refused(f"{message}(.|\n)*{GO_BACK}")


class Harmful:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_metadata_that_is_code_is_not_run(newest, refused, tmp_path):
    (newest / ".metadata").write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    seal(newest)
    refused(rf"\.metadata is a pickle, which can run code. .*: got \w+\.mkdir, which was not run.*{GO_BACK}")
    assert not (tmp_path / "harm").exists()
    with contextlib.suppress(AttributeError):
        FileSystemReader(newest).read_metadata()
    mended = (
        "mended upstream, see pytorch/pytorch#189308: remove _Unpickler and _Reader of examples/checkpoint_folder.py"
    )
    assert (tmp_path / "harm").exists(), mended


def test_a_number_that_is_code_is_not_run(run, latents, monkeypatch, tmp_path):
    training_state = train_sdt_p.training_state

    def with_harm(*parts):
        state = training_state(*parts)
        state["optimizer"]["param_groups"][0]["lr"] = Harmful(tmp_path / "harm")
        return state

    with monkeypatch.context() as patch:
        patch.setattr(train_sdt_p, "training_state", with_harm)
        train(latents, tmp_path / "harmful")
    with pytest.raises(RuntimeError, match=r"step-00000016 must hold the state of this model(.|\n)*mkdir"):
        train(latents, tmp_path / "harmful", "--resume")
    assert not (tmp_path / "harm").exists()


def test_metadata_that_points_elsewhere(newest, refused):
    content = (newest / ".metadata").read_bytes()
    (newest / ".metadata").write_bytes(content.replace(b"__0_0.distcp", b"../0.distcp_"))
    seal(newest)
    refused(rf"\.metadata must be what torch.distributed.checkpoint wrote: .*\.\./0.distcp_.*{GO_BACK}")


def test_a_second_run_in_one_folder(run, refused):
    with FileLock(run / ".lock"):
        refused("--out must belong to one run at a time: another one is at work in")


def test_a_finished_run_without_checkpoints_is_not_written_over(run, refused):
    shutil.rmtree(run / "checkpoints")
    refused("must have checkpoints to go on from: got a finished run without")
    refused(r"--out must be new: got a run with \S+ema.safetensors", "--seed=1")


def test_losses_that_somebody_takes_away_are_in_the_checkpoints(unbroken, latents, tmp_path, monkeypatch):
    out = tmp_path / "run"
    steps = iter(range(16))

    def update_ema(*arguments, update=train_sdt_p.update_ema):
        update(*arguments)
        if next(steps) == 5:
            (out / "losses.csv").write_text("step,loss\n")

    monkeypatch.setattr(train_sdt_p, "update_ema", update_ema)
    train(latents, out)
    assert results(out / "checkpoints") == results(unbroken / "checkpoints")
    train(latents, out, "--resume")
    assert results(out) == results(unbroken)


@pytest.mark.slow
def test_damaged_files_are_refused(run, newest, unbroken, latents):
    rng, whole, counts = random.Random(0), files(run), Counter()
    names = sorted(path.name for path in newest.iterdir())
    for name in (names * NUM_DAMAGED)[:NUM_DAMAGED]:
        path = newest / name
        content = path.read_bytes()
        path.write_bytes(damaged(content, rng))
        before = files(run)
        try:
            train(latents, run, "--resume")
        except RuntimeError as error:
            message = str(error)
            counts[name, "refused"] += "step-00000016" in message and "The last whole one is" in message
            assert files(run) == before
        else:  # a newline less in the list of sums
            counts[name, "unharmed"] += 1
            assert {**files(run), path.relative_to(run): content} == whole
        path.write_bytes(content)
    assert counts.total() == NUM_DAMAGED
    assert {name for name, outcome in counts if outcome == "unharmed"} <= {SUMS}


def go_on_killed(out, unbroken, latents, **moment):
    """Whether it was killed; then the same command goes on."""

    def work():
        with contextlib.redirect_stdout(io.StringIO()):
            train(latents, out, "--resume")

    gc.collect()  # the groups of runs before: their threads are not in the copy, which would wait for them
    was_killed = killed(work, **moment)
    train(latents, out, "--resume")
    assert results(out) == results(unbroken)
    shutil.rmtree(out)
    return was_killed


@pytest.mark.slow
def test_killed_runs_end_as_the_unbroken_one(unbroken, latents, tmp_path):
    rng, out = random.Random(0), tmp_path / "run"
    kills = sum(go_on_killed(out, unbroken, latents, after=rng.uniform(0, 0.5)) for _ in range(NUM_KILLS))
    assert kills > NUM_KILLS // 2
    moments = next(at for at in itertools.count(step=MOMENTS) if not go_on_killed(out, unbroken, latents, at=at))
    assert moments > 50
