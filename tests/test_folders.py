"""Folders are written whole or not at all, and what does not belong together is refused: both writers, all moments."""

import os
import random
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import spatial_decay as sd
from spatial_decay import folders
from spatial_decay.integrations import hub
from tests.faults import damaged, killed


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars():
    """Their lock is shared with the processes that are killed, and one that dies with it would hold it for ever."""
    was_on = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    yield
    if was_on:
        transformers.logging.enable_progress_bar()


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def swapped(seed: int) -> nn.Module:
    """Of the same shapes for every seed, so that parts of two of them fit each other."""
    torch.manual_seed(seed)
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=32, patch_size=16)).eval()
    sd.swap_attention(model, sd.kinds.Full(alpha=seed / 10))
    return livened(model)


def vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return livened(hub.ViT(4, img_size=32, dim=24, depth=2, num_heads=2, decay=sd.kinds.Full(alpha=seed / 10)).eval())


def livened(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    return model


@dataclass(frozen=True)
class Writer:
    """Who writes a folder, and the files in it that its loader reads."""

    name: str
    make: Callable[[int], nn.Module]
    save: Callable[[nn.Module, Path], Any]
    load: Callable[[Path], nn.Module]
    files: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


WRITERS = [
    Writer(
        "save_swapped",
        swapped,
        sd.save_swapped,
        lambda folder: sd.load_swapped(transformers.ViTModel, folder),
        ("spatial_decay.json", "spatial_decay.safetensors", "model.safetensors"),
    ),
    Writer("hub", vit, hub.save_pretrained, hub.from_pretrained, ("config.json", "model.safetensors")),
]


def is_same(model: nn.Module, other: nn.Module) -> bool:
    """Bit for bit, with the options of the decay."""
    state, theirs = model.state_dict(), other.state_dict()
    alphas = [[module.alpha for module in m.modules() if hasattr(module, "alpha")] for m in (model, other)]
    kinds = [[module.kind for module in m.modules() if hasattr(module, "kind")] for m in (model, other)]
    return (
        state.keys() == theirs.keys()
        and all(torch.equal(value, theirs[name]) for name, value in state.items())
        and alphas[0] == alphas[1]
        and kinds[0] == kinds[1]
    )


def which(writer: Writer, folder: Path, models: dict[str, nn.Module]) -> str:
    """The name of the model that a folder gives, of those given; else what it gives."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is read from its .spatial_decay-sealed")
            found = writer.load(folder)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return next((name for name, model in models.items() if is_same(model, found)), "a mixture")


def visible(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def kill_everywhere(writer: Writer, folder: Path, *, at_any_time: int) -> Counter[tuple[str, str]]:
    """How often a folder of the old model gave which model after a save of the new one was killed.

    At each event of the file system once; then, between those, at any time, so often.
    """
    models = {"old": writer.make(1), "new": writer.make(2)}
    writer.save(models["old"], folder / "old")
    (folder / "old" / "notes.txt").write_text("of the user")
    counts: Counter[tuple[str, str]] = Counter()
    seconds = []

    def one(**moment: Any) -> bool:
        target = shutil.copytree(folder / "old", folder / "target")
        was_killed = killed(lambda: writer.save(models["new"], target), **moment)
        result = which(writer, target, models)
        counts[next(iter(moment)), result] += was_killed
        assert was_killed or result == "new", (moment, result)
        # The next save heals the folder, with nothing left over.
        start = time.perf_counter()
        writer.save(models["new"], target)
        seconds.append(time.perf_counter() - start)
        assert which(writer, target, models) == "new", moment
        assert not left_over(target)
        assert (target / "notes.txt").read_text() == "of the user"
        shutil.rmtree(target)
        return was_killed

    at = 0
    while one(at=at):
        at += 1
    rng, longest = random.Random(0), 2 * min(seconds)  # in a copy, whose memory is still shared, it takes longer
    for _ in range(10 * at_any_time):
        if counts["after", "old"] + counts["after", "new"] < at_any_time:
            one(after=rng.uniform(0, longest))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS, ids=str)
def test_killed_at_any_moment_the_old_or_the_new_model_loads(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill takes nothing from the system's memory
    counts = kill_everywhere(writer, tmp_path, at_any_time=20)
    assert {result for _, result in counts} == {"old", "new"}, counts
    assert counts["at", "old"] + counts["at", "new"] >= 30, counts
    assert counts["after", "old"] + counts["after", "new"] >= 20, counts


@pytest.mark.parametrize("writer", WRITERS, ids=str)
@pytest.mark.parametrize("valid", [pytest.param("old", marks=pytest.mark.slow), "new"])
def test_one_rename_makes_a_save_valid_and_loading_writes_nothing(writer, valid, tmp_path):
    models = {"old": writer.make(1), "new": writer.make(2)}
    writer.save(models["old"], tmp_path)
    before = visible(tmp_path)

    def rename_and_die(path: Path, target: Path) -> None:
        if valid == "new":
            os.rename(path, target)
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        Path.rename = rename_and_die  # of the process that is killed
        writer.save(models["new"], tmp_path)

    assert killed(work)
    assert visible(tmp_path) == before
    os.chmod(tmp_path, 0o555)
    try:
        assert which(writer, tmp_path, models) == valid
    finally:
        os.chmod(tmp_path, 0o755)
    assert visible(tmp_path) == before
    assert len(left_over(tmp_path)) == 1
    with pytest.raises(ZeroDivisionError), folders.writing(tmp_path):  # a save that fails
        raise ZeroDivisionError
    assert which(writer, tmp_path, models) == valid
    writer.save(models["old"], tmp_path)
    assert which(writer, tmp_path, models) == "old"
    assert not left_over(tmp_path)


def damage_count(writer: Writer, folder: Path, count: int) -> dict[str, int]:
    """How often a damaged folder was refused, gave the saved model, or another one."""
    model, rng = writer.make(1), random.Random(0)
    writer.save(model, folder)
    whole = {name: (folder / name).read_bytes() for name in writer.files}
    counts = {"refused": 0, "same": 0}
    for _ in range(count):
        name = rng.choice(writer.files)
        (folder / name).write_bytes(damaged(whole[name], rng))
        result = which(writer, folder, {"same": model})
        if result != "same":
            assert name in result, f"{result} does not say which file, {name}"
            result = "refused"
        counts[result] = counts.get(result, 0) + 1
        (folder / name).write_bytes(whole[name])
    return counts


@pytest.mark.parametrize("writer", WRITERS, ids=str)
@pytest.mark.parametrize("count", [10, pytest.param(500, marks=pytest.mark.slow)])
def test_a_damaged_folder_is_refused_or_gives_the_same_model(writer, count, tmp_path):
    counts = damage_count(writer, tmp_path, count)
    assert set(counts) == {"refused", "same"}, counts
    assert sum(counts.values()) == count


@pytest.mark.parametrize("writer", WRITERS, ids=str)
def test_parts_of_two_models_are_refused(writer, tmp_path):
    old, new = writer.make(1), writer.make(2)
    writer.save(old, tmp_path / "old")
    writer.save(new, tmp_path / "new")
    for name in writer.files:
        mixed = visible(tmp_path / "new")[name]
        before = (tmp_path / "old" / name).read_bytes()
        (tmp_path / "old" / name).write_bytes(mixed)
        with pytest.raises(ValueError, match="belong together"):
            writer.load(tmp_path / "old")
        (tmp_path / "old" / name).write_bytes(before)
    assert is_same(writer.load(tmp_path / "old"), old)


@pytest.mark.parametrize("writer", WRITERS, ids=str)
def test_a_save_that_fails_changes_nothing(writer, tmp_path, monkeypatch):
    old, new = writer.make(1), writer.make(2)
    writer.save(old, tmp_path)
    before = visible(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        patch.setattr(hub, "save_model", full)
        with pytest.raises(OSError, match="No space left"):
            writer.save(new, tmp_path)
        with pytest.raises(OSError, match="No space left"):
            writer.save(new, tmp_path / "not" / "there")
    assert visible(tmp_path) == before
    assert not left_over(tmp_path)
    assert not (tmp_path / "not").exists()
    assert is_same(writer.load(tmp_path), old)


@pytest.mark.parametrize("writer", WRITERS, ids=str)
@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_two_saves_at_once_leave_one_of_them(writer, rounds, tmp_path):
    models = {str(seed): writer.make(seed) for seed in (1, 2, 3)}
    for i in range(rounds):
        folder, failed = tmp_path / str(i), []

        def save(model: nn.Module, folder: Path = folder, failed: list[BaseException] = failed) -> None:
            try:
                writer.save(model, folder)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=save, args=(model,)) for model in models.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert which(writer, folder, models) in models
        assert not left_over(folder)


@pytest.mark.parametrize("writer", WRITERS, ids=str)
def test_a_save_while_the_folder_is_read_is_noticed(writer, tmp_path):
    model = writer.make(1)
    writer.save(model, tmp_path)

    def read(error: Exception | None) -> None:
        with folders.reading(tmp_path, writer.files[0]):
            writer.save(model, tmp_path)
            if error:
                raise error

    for error in (None, ValueError("half a file")):
        with pytest.raises(OSError, match=r"another save has changed it\. Load it again") as raised:
            read(error)
        assert raised.value.__cause__ is error
    with folders.reading(tmp_path, writer.files[0]) as directory:
        (tmp_path / "log.txt").write_text("of another program")
        assert directory == tmp_path


def write(folder: Path, *names: str) -> None:
    with folders.writing(folder) as part:
        for name in names:
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_text(f"{names}")


def test_what_killed_saves_left_is_removed_and_what_is_being_written_stays(tmp_path):
    (tmp_path / ".spatial_decay-0.part").mkdir()
    (tmp_path / ".spatial_decay-0.part" / "half").touch()
    with folders.writing(tmp_path) as part:
        (part / "slow").touch()
        write(tmp_path, "quick", "code/quick")
        assert left_over(tmp_path) == [part.name]
    assert {path.name for path in tmp_path.iterdir()} == {"slow", "quick", "code"}
    assert (tmp_path / "code" / "quick").is_file()


def test_file_systems_without_links_or_locks(tmp_path, monkeypatch):
    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / ".spatial_decay-0.part").mkdir()
    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr("fcntl.flock", refused)
    monkeypatch.setattr(folders, "_unlock", lambda lock: None)
    write(tmp_path, "file")
    assert (tmp_path / "file").read_text() == "('file',)"
    assert left_over(tmp_path) == [".spatial_decay-0.part"]  # who knows whether that is being written


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"must be a folder, or not there yet: it is a file"):
        write(tmp_path / "file", "a")
    monkeypatch.setattr(folders, "_PATIENCE", 0.02)
    lock = folders._lock(tmp_path)
    with pytest.raises(TimeoutError, match=r"another process has been putting its files in place for 0 s"):
        write(tmp_path, "a")
    folders._unlock(lock)
    assert os.listdir(tmp_path) == ["file"]
    write(tmp_path, "a")
    with pytest.raises(OSError, match="too long"):
        write(tmp_path / "made" / ("x" * 300), "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "file"]


@pytest.mark.parametrize("writer", WRITERS, ids=str)
def test_files_that_somebody_copied_over_a_save_that_was_stopped_are_not_read_silently(writer, tmp_path):
    models = {"old": writer.make(1), "new": writer.make(2)}
    for place in ("backup", "folder"):
        writer.save(models["old"], tmp_path / place)

    def work() -> None:
        os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # of the process that is killed
        writer.save(models["new"], tmp_path / "folder")

    assert killed(work)
    shutil.copytree(tmp_path / "backup", tmp_path / "folder", dirs_exist_ok=True)
    with pytest.warns(UserWarning, match=r"read from its .spatial_decay-sealed, .* remove that directory, if other"):
        found = writer.load(tmp_path / "folder")
    assert is_same(found, models["new"])
    shutil.rmtree(tmp_path / "folder" / ".spatial_decay-sealed")
    assert which(writer, tmp_path / "folder", models) == "old"


def test_files_that_cannot_take_their_places_are_valid_all_the_same(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match=r"is saved, and loading finds .*: .*directory.* Remove what is in their places"):
        write(tmp_path, "a", "b", "c")
    with (
        pytest.warns(UserWarning, match=r"read from its .spatial_decay-sealed, which counts until a save puts it"),
        folders.reading(tmp_path, "a") as directory,
    ):
        assert sorted(path.name for path in directory.iterdir()) == ["a", "b", "c"]
    (tmp_path / "b").rmdir()
    write(tmp_path, "b")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a": "('a', 'b', 'c')",
        "b": "('b',)",
        "c": "('a', 'b', 'c')",
    }


@pytest.mark.parametrize(
    ("old", "new", "left"),
    [
        ("model.safetensors", "model-00001-of-00001.safetensors", []),
        ("model-00002-of-00002.safetensors", "model.safetensors", []),
        ("dit.safetensors.index.json", "dit.safetensors", []),
        ("model.safetensors", "other.safetensors", ["model.safetensors"]),
        ("model.bin", "model.safetensors", ["model.bin"]),
        ("model.fp16.safetensors", "model.safetensors", ["model.fp16.safetensors"]),
        ("model.txt", "model.safetensors", ["model.txt"]),
    ],
)
def test_weights_that_would_be_read_in_place_of_the_new_ones_go(old, new, left, tmp_path):
    write(tmp_path, old)
    write(tmp_path, new)
    assert sorted(os.listdir(tmp_path)) == sorted([new, *left])
