"""Folders of checkpoints, for train_sdt_p.py: written whole or not at all, and checked to the last byte before loading.

OUT/checkpoints/step-00010000/   it gets this name when all of it is written
    .metadata, *.distcp          weights, moments and average, as torch.distributed.checkpoint writes them
    losses.csv                   step,loss: all so far
    settings.json                the step, and what the run was started with
    SHA256SUMS                   of these files; by hand: sha256sum -c SHA256SUMS

torch.distributed.checkpoint reads .metadata, and whatever is no tensor, with pickle. That runs code which somebody else
may have put there (https://github.com/pytorch/pytorch/issues/189308), so nothing here is read in that way: .metadata
may name the classes of METADATA alone, the rest is read by torch.load(weights_only=True).
"""

import hashlib
import io
import json
import math
import os
import pathlib
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.distributed.checkpoint import filesystem, metadata, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

NUM_KEPT = 2
SUMS = "SHA256SUMS"

T = TypeVar("T")

METADATA = {
    (getattr(module, name).__module__, name): getattr(module, name)
    for module, names in {
        metadata: (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        filesystem: ("_StorageInfo",),
        torch: ("Size",),
        torch.serialization: ("_get_layout",),
    }.items()
    for name in names
}
"""All that .metadata may name, but for dtypes, and paths, which become plain ones."""


class DamagedError(RuntimeError):
    """A checkpoint that is not as it was written."""


@dataclass(frozen=True)
class Checkpoint:
    """What a whole checkpoint holds beside its tensors."""

    path: Path
    step: int
    settings: dict[str, Any]
    losses: list[float]  # one for every settings["log_every"] steps


def on_first_process(work: Callable[[], T]) -> T:
    """Work on the first process, its result or error on all, because file systems of clusters lag."""
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = work()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


@contextmanager
def held(out: Path) -> Iterator[None]:
    """The folder of a run, for this run alone: two would mix their checkpoints.

    Raises:
        RuntimeError: another run has it.
    """
    lock = FileLock(out / ".lock")  # the system drops it when the process ends, however that ends

    def acquire() -> None:
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RuntimeError(
                f"--out must belong to one run at a time: another one is at work in {out}. Wait until it ends, or pass "
                "another --out."
            ) from error
        except NotImplementedError:
            print(f"{out} is on a file system without locks: see to it that no other run has it", flush=True)

    on_first_process(acquire)
    try:
        yield
    finally:
        lock.release()


def complete(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; whether they are still whole is not asked."""
    found = [path for path in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def write_losses(path: Path, losses: Iterable[float], every: int) -> None:
    """Write a row for every so many steps."""
    rows = [f"{(i + 1) * every},{loss!r}\n" for i, loss in enumerate(losses)]
    path.write_text("".join(["step,loss\n", *rows]), encoding="utf-8")


def save(out: Path, step: int, state: dict[str, Any], settings: dict[str, Any], losses: list[float]) -> None:
    """Write one of all processes, then remove those before the last NUM_KEPT."""
    path = out / "checkpoints" / f"step-{step:08d}"
    incomplete = path.with_suffix(".incomplete")
    state_dict_saver.save(state, checkpoint_id=incomplete)
    sums: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sums, _sums(incomplete.glob(f"__{dist.get_rank()}_*")))  # each its own, still in memory
    if dist.get_rank() == 0:
        others = [incomplete / name for name in (".metadata", "losses.csv", "settings.json")]
        write_losses(incomplete / "losses.csv", losses, settings["log_every"])
        (incomplete / "settings.json").write_text(json.dumps({"step": step, **settings}, indent=1), encoding="utf-8")
        lines = sorted(sum(sums, _sums(others)))
        (incomplete / SUMS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        incomplete.rename(path)
        clean(out)
    dist.barrier()


def clean(out: Path) -> None:
    """Remove what is incomplete, and what is older than the last NUM_KEPT."""
    for old in complete(out)[:-NUM_KEPT]:
        old.rename(old.with_suffix(".incomplete"))
    for incomplete in (out / "checkpoints").glob("step-*.incomplete"):
        shutil.rmtree(incomplete)


def newest(out: Path) -> Checkpoint | None:
    """The one to go on from; None if there is none.

    Raises:
        DamagedError: it is not whole. The last whole one is named; nothing is changed.
    """
    if not (paths := complete(out)):
        return None
    *older, path = paths
    try:
        return read(path)
    except DamagedError as error:
        spoilt = [path]
        for whole in reversed(older):
            with suppress(DamagedError):
                read(whole)
                remedy = f"The last whole one is {whole}: remove {' and '.join(map(str, spoilt))} to go on from there."
                break
            spoilt.append(whole)
        else:
            remedy = "There is no whole one. Pass another --out to start again."
        raise DamagedError(f"{error} Nothing was changed. {remedy}") from error


def read(path: Path) -> Checkpoint:
    """Check every file of a checkpoint, and what it holds beside its tensors.

    Raises:
        DamagedError: a file is missing, too many, or not as it was written; nothing was loaded.
    """
    try:
        stated = (path / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
        found = _sums(file for file in path.iterdir() if file.name != SUMS)
    except OSError as error:
        raise DamagedError(f"{path} must be a folder of files that its {SUMS} lists: {error}.") from error
    if wrong := sorted({line[66:] or line for line in {*stated} ^ {*found}}):
        raise DamagedError(
            f"{path} must hold the files that its {SUMS} lists, as they were written: "
            f"{', '.join(wrong)} is missing, changed or not listed."
        )
    read_metadata(path)
    settings = _read_settings(path / "settings.json", step=int(path.name[5:]))
    step, every = settings.pop("step"), settings["log_every"]
    return Checkpoint(path, step, settings, _read_losses(path / "losses.csv", step, every))


def load(checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """Fill a state, from however many processes wrote it.

    Raises:
        DamagedError: it does not fit the state.
    """
    path = checkpoint.path
    try:
        state_dict_loader.load(state, storage_reader=_Reader(path, read_metadata(path)), planner=_Planner())
    except CheckpointException as error:
        raise DamagedError(
            f"{path} must hold the state of this model: {error}\nStart again with another --out."
        ) from error


def read_metadata(path: Path) -> metadata.Metadata:
    """What .metadata of a checkpoint says, without running what it says.

    Raises:
        DamagedError: it is no metadata, or names something that metadata has no need of.
    """
    file = path / ".metadata"
    try:
        found = _Unpickler(io.BytesIO(file.read_bytes())).load()
        missing = {info.relative_path for info in found.storage_data.values()}.difference(os.listdir(path))
        if missing or not isinstance(found, metadata.Metadata):
            raise ValueError(f"{type(found).__name__} of {sorted(missing)}, which are not in the folder")
    except _ForbiddenError as error:
        raise DamagedError(
            f"{file} is a pickle, which can run code. It must name what a checkpoint needs, and nothing "
            f"else: got {error}, which was not run. Do not use this folder, unless you know who wrote it and why."
        ) from error
    except Exception as error:  # a damaged pickle can raise whatever it likes
        raise DamagedError(f"{file} must be what torch.distributed.checkpoint wrote: {error!r}.") from error
    return found


class _ForbiddenError(pickle.UnpicklingError):
    pass


class _Unpickler(pickle.Unpickler):
    """See https://docs.python.org/3/library/pickle.html#restricting-globals."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA:
            return METADATA[module, name]
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePath  # where it was written; not needed
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise _ForbiddenError(f"{module}.{name}")


def _memory_format(cls: object, name: str) -> metadata._MEM_FORMAT_ENCODING:
    """In place of getattr, by which Python before 3.11.4 pickles the members of an Enum."""
    if cls is not metadata._MEM_FORMAT_ENCODING:
        raise _ForbiddenError("builtins.getattr")
    return metadata._MEM_FORMAT_ENCODING[name]


class _Reader(filesystem.FileSystemReader):
    """Has its metadata already: it opens no pickle."""

    def __init__(self, path: Path, found: metadata.Metadata) -> None:
        super().__init__(path)
        self._found = found

    def read_metadata(self) -> metadata.Metadata:  # no more arguments, or torch looks for one of each process
        self._found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return self._found


class _Planner(DefaultLoadPlanner):
    """Passes on what is no tensor, such as learning rates, after torch.load(weights_only=True) has taken it."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        again = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), again)
        again.seek(0)
        super().load_bytes(read_item, again)


def _sums(files: Iterable[Path]) -> list[str]:
    """As sha256sum prints them."""
    lines = []
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        lines.append(f"{digest.hexdigest()}  {path.name}")
    return lines


def _read_settings(path: Path, step: int) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} must be the JSON of a run's settings: {error}.") from error
    every = settings.get("log_every") if isinstance(settings, dict) else None
    if not isinstance(every, int) or every < 1 or settings.get("step") != step:
        raise DamagedError(f'{path} must be a mapping with "step": {step} and "log_every" >= 1: got {settings!r}.')
    return settings


def _read_losses(path: Path, step: int, every: int) -> list[float]:
    try:
        header, *rows = path.read_text(encoding="utf-8").splitlines()
        steps, losses = [int(row.split(",")[0]) for row in rows], [float(row.split(",")[1]) for row in rows]
    except (OSError, ValueError, IndexError) as error:
        raise DamagedError(f"{path} must have rows of a step and a loss: {error}.") from error
    if header != "step,loss" or steps != [*range(every, step + 1, every)] or not all(map(math.isfinite, losses)):
        raise DamagedError(
            f"{path} must have a finite loss for every {every} steps up to {step}, {step // every} rows: got "
            f"{len(rows)}, from {rows[:1]} to {rows[-1:]}."
        )
    return losses
