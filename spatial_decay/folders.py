"""Folders that are written whole or not at all, and whose files say that they belong together.

A save writes into a new directory inside the folder. One rename gives that directory the name _SEALED: before it the
folder's files are valid, and after it those of the sealed directory, which then take the places of the folder's one by
one. A process that is killed at any moment leaves one or the other whole; the next save ends what was begun.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["check_signed", "reading", "rivals", "signed", "weight_files", "writing"]

_SEALED, _PART = ".spatial_decay-sealed", ".spatial_decay-{}.part"
_WEIGHTS = re.compile(r"(?P<model>.+?)(-\d{5}-of-\d{5})?(?P<format>\.safetensors|\.bin)(\.index\.json)?")
_PATIENCE = 60.0
"""Seconds that a save waits while another one puts its files in place, which takes milliseconds."""


@contextmanager
def writing(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A new directory to write into; at the end its files are the folder's, all of them at once.

    Other files of the folder stay, but for weights that would be read in place of the new ones (see rivals). Where an
    error is raised inside, the folder is as it was. Of several saves at once the last one to end stays.

    On Windows, and on file systems without locks (flock), nobody may save into one folder at the same time, and what
    a killed process has left has to be removed by hand (`.spatial_decay-*.part`).

    Raises:
        NotADirectoryError: folder is a file.
        TimeoutError: another process has been putting its files in place for a minute.
        OSError: the folder cannot be written, and is as it was; or its new files are valid, as the error then says, and
            could not take the places of the old ones.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} must be a folder, or not there yet: it is a file. Save to another place.")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    part = folder / _PART.format(secrets.token_hex(8))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _remove_parts(folder)
            part.mkdir()
            lock = _lock(part)  # a part that nobody has locked is removed by the next save
        try:
            yield part
            for path in _files(part):
                _flush(path)
            _flush(part)
            with _locked(folder):
                _put_in_place(folder)  # what a killed save has sealed
                part.rename(folder / _SEALED)
                _flush(folder)
                _put_in_place(folder)
        finally:
            _unlock(lock)
            shutil.rmtree(part, ignore_errors=True)
    except BaseException:
        for path in made:
            with suppress(OSError):  # it holds something
                path.rmdir()
        raise


@contextmanager
def reading(folder: str | os.PathLike[str], manifest: str) -> Iterator[Path]:
    """The directory that holds the folder's valid files; nothing is written.

    Where a save was stopped before its files took their places, a warning says that it is not the folder itself:
    whoever has copied other files into it since does not get them.

    Args:
        folder: Of writing.
        manifest: Name of a file that every save writes.

    Raises:
        OSError: another save has changed the folder meanwhile.
    """
    before = _valid(Path(folder), manifest)
    error: Exception | None = None
    try:
        yield before[0]
    except Exception as raised:
        error = raised
    if _valid(Path(folder), manifest) != before:
        raise OSError(
            f"{folder} must stay as it is while it is read: another save has changed it. Load it again."
        ) from error
    if before[0] != Path(folder):
        warnings.warn(
            f"{folder} is read from its {_SEALED}, which counts until a save puts it in place: the last save was "
            "stopped before it could. Save again; or remove that directory, if other files are meant.",
            stacklevel=4,  # whoever loads
        )
    if error:
        raise error


def signed(content: Mapping[str, Any], files: Iterable[Path], *, editable: Iterable[Path] = ()) -> dict[str, Any]:
    """A manifest: what it is to say, with the hashes of the files that belong to it, and its own.

    Args:
        content: What goes through JSON.
        files: All in one directory.
        editable: Those that must be there too, whatever they hold.
    """
    hashes = {path.name: _hash_of(path) for path in files} | {path.name: None for path in editable}
    manifest = {**content, "files": hashes}
    return {**manifest, "sha256": _hash_of_json(manifest)}


def check_signed(manifest: Mapping[str, Any], name: str, files: Mapping[str, Path]) -> None:
    """Raise where a manifest or one of its files is not as it was when the manifest was signed.

    Args:
        manifest: As it was read.
        name: Of its file, for the error.
        files: By name, where each lies that the manifest may have.

    Raises:
        ValueError: what is said by the manifest's hashes is not so.
    """
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    hashes = content.get("files")
    if not isinstance(hashes, dict) or "sha256" not in manifest:
        raise ValueError(
            f'{name} must have "files" and "sha256", with which loading sees that it and the weights belong together: '
            "an older version has written it. Load it with that version, and save it again with this one."
        )
    different = [] if _hash_of_json(content) == manifest["sha256"] else [name]
    if not different:
        missing = sorted(file for file in hashes if file not in files or not files[file].is_file())
        different = missing or sorted(file for file, old in hashes.items() if old and _hash_of(files[file]) != old)
    if different:
        raise ValueError(
            f"{name} and the files that it names must belong together and be as they were saved: "
            f"{', '.join(different)} is missing, damaged, edited or from another save. Save the model again. To "
            "take single files as they are, build the model and use load_checkpoint."
        )


def weight_files(directory: Path) -> list[Path]:
    """The weights in a directory, with the indices of those that are in parts."""
    return sorted(path for path in directory.iterdir() if _WEIGHTS.fullmatch(path.name) and path.is_file())


def rivals(directory: Path, names: Iterable[str]) -> list[Path]:
    """Weights in a directory that a library may read in place of the named ones.

    They are of the same model and format, but whole where those are in parts, or in other parts.
    """
    known = set(names)
    models = {_model_and_format(name) for name in known}
    return [
        path for path in weight_files(directory) if path.name not in known and _model_and_format(path.name) in models
    ]


def _model_and_format(name: str) -> tuple[str, str] | None:
    match = _WEIGHTS.fullmatch(name)
    return match and (match["model"], match["format"])


def _valid(folder: Path, manifest: str) -> tuple[Path, tuple[int, ...]]:
    """The directory whose files are valid, and what tells its manifest from that of any other save."""
    directory = folder / _SEALED if (folder / _SEALED).is_dir() else folder
    try:
        found = (directory / manifest).stat()
    except OSError:
        return directory, ()
    return directory, (found.st_ino, found.st_mtime_ns, found.st_size)


def _put_in_place(folder: Path) -> None:
    """Give the files of the sealed directory, where there is one, their places; then the folder's own are valid."""
    sealed, part = folder / _SEALED, folder / _PART.format(secrets.token_hex(8))
    if not sealed.is_dir():
        return
    part.mkdir()
    try:
        for path in _files(sealed):
            target = folder / path.relative_to(sealed)
            if target.exists() and target.samefile(path):
                continue  # done before the process was killed
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, part / "new")
            except OSError:  # a file system without links
                shutil.copyfile(path, part / "new")
                _flush(part / "new")
            os.replace(part / "new", target)
        for path in rivals(folder, [path.name for path in _files(sealed)]):
            path.unlink()
        _flush(folder)
        sealed.rename(part / "old")
    except OSError as error:
        raise OSError(
            f"{folder} is saved, and loading finds the new files in {sealed.name}, but they could not take the places "
            f"of the old ones: {error}. Remove what is in their places, and save again."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _remove_parts(folder: Path) -> None:
    """What killed processes have left, and not what others are writing now."""
    for part in folder.glob(_PART.format("*")):
        with suppress(BlockingIOError):
            lock = _lock(part)
            if lock is not None:
                shutil.rmtree(part, ignore_errors=True)
                _unlock(lock)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _hash_of(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def _hash_of_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process and thread at a time gets in; others wait."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            lock = _lock(folder)
            break
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise TimeoutError(
                    f"{folder} must be free to be written: another process has been putting its files in place for "
                    f"{_PATIENCE:.0f} s. Save to another folder, or again when that process has ended."
                ) from error
            time.sleep(0.01)
    try:
        yield
    finally:
        _unlock(lock)


if sys.platform == "win32":

    def _lock(directory: Path) -> int | None:
        """Directories have no locks."""
        return None

    def _unlock(lock: int | None) -> None:
        """There is nothing to let go."""

    def _flush(path: Path) -> None:
        """See to it that a file is on the disk; Windows cannot do that for directories."""
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())

else:
    import fcntl

    def _lock(directory: Path) -> int | None:
        """Hold a directory until _unlock or the end of this process; None where the file system has no locks.

        Raises:
            BlockingIOError: another process or thread holds it.
        """
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise
            return None
        return descriptor

    def _unlock(lock: int | None) -> None:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_UN)  # also where a process that was forked meanwhile has it open
            os.close(lock)

    def _flush(path: Path) -> None:
        """See to it that a file or directory is on the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # which some file systems cannot flush
                raise
        finally:
            os.close(descriptor)
