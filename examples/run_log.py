"""A CSV of the results of finished runs, which several processes may append to.

runs.csv       the results, each with the hash of its configuration
config.json    the configuration, for the error that says what differs
locks/         a file for each run; the system drops the lock on it when its process ends, however that ends
weights/       of runs that are done, so that they can be measured in further ways
"""

import csv
import datetime
import hashlib
import json
import math
import os
import platform
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

KeyT = TypeVar("KeyT", bound="DataclassInstance")
ResultT = TypeVar("ResultT", bound="DataclassInstance")

REMEDY = "Give the same arguments and data, or choose another --output."
MEND = "Mend or remove that line, or choose another --output."


def stamp(device: torch.device | None = None) -> dict[str, str]:
    """When and where, for a row: date, torch and machine; a device other than the CPU is named."""
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    if device is not None and device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "machine": machine}


def origin(results: Iterable[Any], *libraries: str) -> str:
    """When, by what and where results were made that have the fields of a stamp, and those of more libraries."""
    results = list(results)

    def all_of(name: str) -> list[str]:
        return sorted({getattr(result, name) for result in results})

    dates = all_of("date")
    versions = [f"{name} {', '.join(all_of(name))}" for name in ("torch", *libraries)]
    return ", ".join([" to ".join(dict.fromkeys((dates[0], dates[-1]))), *versions, "; ".join(all_of("machine"))])


class LogError(ValueError):
    """A log that this run cannot go on with."""


class TrainingError(ValueError):
    """A training that came to nothing."""


def check_loss(name: str, loss: float) -> None:
    """Before anything is kept of the training of that name.

    Raises:
        TrainingError: its loss is not finite.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss of {name} must be finite: got {loss}. Nothing of this training is kept. Look at the images, or "
            "lower the learning rate in the script."
        )


def require_finite(**values: float) -> None:
    """For the fields of a result that must be numbers.

    Raises:
        ValueError: one is not finite.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite: got {value}")


class Log(Generic[KeyT, ResultT]):
    """Results by key, in a folder.

    Args:
        folder: Made if it is not there.
        config: All that the results depend on but the key, JSON values.
        key: Dataclass of what was measured: strings and numbers.
        result: Dataclass of what came of it: strings and numbers. Its __post_init__ says which must be finite.

    Raises:
        LogError: the folder has results of another configuration, or a file that is not such a log.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], key: type[KeyT], result: type[ResultT]) -> None:
        self.folder, self.path = folder, folder / "runs.csv"
        self.key, self.result = key, result
        self.columns = ["config", *(field.name for field in (*fields(key), *fields(result)))]
        self.config = json.loads(json.dumps(config))
        self.hash = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:12]
        for part in ("locks", "weights"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._check_config()
            self._read()
            config_path = folder / "config.json"
            write_whole(config_path, lambda part: part.write_text(json.dumps(self.config, indent=1), encoding="utf-8"))

    def results(self) -> dict[KeyT, ResultT]:
        """All that is there now, of this process and of others."""
        with self._alone():
            return self._read()

    def add(self, key: KeyT, result: ResultT) -> None:
        """One more row; what is there already stays as it is."""
        with self._alone():
            if key in self._read():
                return
            content = self._whole_lines()
            if self.path.exists() and self.path.read_bytes() != content:
                write_whole(self.path, lambda part: part.write_bytes(content))
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                if not content:
                    writer.writerow(self.columns)
                writer.writerow([self.hash, *asdict(key).values(), *asdict(result).values()])
                file.flush()
                os.fsync(file.fileno())

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """True while this process alone has the run of that name; False where another one has it."""
        lock = FileLock(self.folder / "locks" / name)
        with suppress(Timeout):
            lock.acquire(timeout=0)
        try:
            yield lock.is_locked
        finally:
            lock.release()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with FileLock(self.folder / "locks" / "log", timeout=60):
            yield

    def _check_config(self) -> None:
        path = self.folder / "config.json"
        if not path.exists():
            return
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(theirs, dict):
                raise ValueError(f"it holds {type(theirs).__name__}, not dict")
        except ValueError as error:
            raise LogError(f"{path} must be as it was written: {error}. {REMEDY}") from error
        names = [name for name in {**self.config, **theirs} if self.config.get(name) != theirs.get(name)]
        if names:
            differ = "; ".join(f"{name}: {theirs.get(name)} there, {self.config.get(name)} here" for name in names)
            raise LogError(f"{self.folder} must have results of this configuration: got others, {differ}. {REMEDY}")

    def _read(self) -> dict[KeyT, ResultT]:
        lines = list(csv.reader(self._whole_lines().decode("utf-8").splitlines()))
        if not lines:
            return {}
        if lines[0] != self.columns:
            wanted = ", ".join(self.columns)
            raise LogError(f"{self.path} must have the columns {wanted}: got {', '.join(lines[0])}. {REMEDY}")
        results: dict[KeyT, ResultT] = {}
        for number, line in enumerate(lines[1:], 2):
            if len(line) != len(self.columns):
                raise LogError(
                    f"{self.path} must have {len(self.columns)} fields in each line: got {len(line)} in line {number}. "
                    f"{MEND}"
                )
            row = dict(zip(self.columns, line, strict=True))
            if row["config"] != self.hash:
                raise LogError(
                    f"{self.path} must have results of this configuration, {self.hash}: got {row['config']}. {REMEDY}"
                )
            try:
                results[_parse(self.key, row)] = _parse(self.result, row)
            except ValueError as error:
                raise LogError(
                    f"{self.path} must have numbers where they belong: line {number}, {error}. {MEND}"
                ) from error
        return results

    def _whole_lines(self) -> bytes:
        """What is in the CSV, but a last line that a killed process has left unfinished.

        That is one with too few fields, or whose last one is empty or not closed. A whole one may lack its end, as some
        editors save it.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        start = content.rfind(b"\n") + 1
        last = content[start:]
        if not last:
            return content
        if start:
            line = next(csv.reader([last.decode("utf-8", "replace")]))
            is_cut = len(line) < len(self.columns) or not line[-1] or last.count(b'"') % 2
        else:
            is_cut = ",".join(self.columns).encode().startswith(last)
        return content[:start] if is_cut else content + b"\n"


def _parse(made: type, row: Mapping[str, str]) -> Any:
    return made(**{field.name: field.type(row[field.name]) for field in fields(made)})  # type: ignore[operator]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The new file, or what was there before.

    Several processes may write one file at a time: each writes under a name of its own, and the last to end is kept.
    That name ends as the file's, by which savefig knows the format.
    """
    part = path.with_name(f"incomplete-{uuid.uuid4().hex}-{path.name}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
