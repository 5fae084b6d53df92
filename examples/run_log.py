"""A CSV with one row for each result as it ends, which several processes may write at a time: of whole runs.

runs.csv       the results, each with the hash of its configuration
config.json    the configuration, for the error that says what differs
locks/         a file for each run; the system drops the lock on it when its process ends, however that ends
weights/       of runs that are done, so that they can be measured in further ways
"""

import csv
import datetime
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

KeyT = TypeVar("KeyT", bound="DataclassInstance")
ResultT = TypeVar("ResultT", bound="DataclassInstance")


def stamp(device: torch.device | None = None) -> dict[str, str]:
    """When and where, for a row: date, torch and machine; a device other than the CPU is named."""
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    if device is not None and device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "machine": machine}


class LogError(ValueError):
    """A log that this run cannot go on with."""


class Log(Generic[KeyT, ResultT]):
    """Results by key, in a folder.

    Args:
        folder: Made if it is not there.
        config: All that the results depend on but the key, JSON values.
        key: Dataclass of what was measured: strings and numbers.
        result: Dataclass of what came of it: strings and numbers.

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
            is_new = not self.path.exists() or not self.path.stat().st_size
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                if is_new:
                    writer.writerow(self.columns)
                writer.writerow([self.hash, *asdict(key).values(), *asdict(result).values()])
                file.flush()
                os.fsync(file.fileno())

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """True while this process alone has the run of that name; False where another one has it."""
        try:
            with FileLock(self.folder / "locks" / name, timeout=0):
                yield True
        except Timeout:
            yield False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with FileLock(self.folder / "locks" / "log", timeout=60):
            yield

    def _check_config(self) -> None:
        path = self.folder / "config.json"
        if not path.exists():
            return
        try:
            theirs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LogError(f"{path} must be as it was written: {error}. {self._remedy}") from error
        names = [name for name in {**self.config, **theirs} if self.config.get(name) != theirs.get(name)]
        if names:
            differ = "; ".join(f"{name}: {theirs.get(name)} there, {self.config.get(name)} here" for name in names)
            raise LogError(
                f"{self.folder} must have results of this configuration: got others, {differ}. {self._remedy}"
            )

    def _read(self) -> dict[KeyT, ResultT]:
        """A line that a killed process has left unfinished is cut off first."""
        if not self.path.exists():
            return {}
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            content = content[: content.rfind(b"\n") + 1]
            write_whole(self.path, lambda part: part.write_bytes(content))
        lines = list(csv.reader(content.decode("utf-8").splitlines()))
        if not lines:
            return {}
        if lines[0] != self.columns or any(len(line) != len(self.columns) for line in lines):
            wanted = ", ".join(self.columns)
            raise LogError(f"{self.path} must have the columns {wanted}: got {lines[0]}. {self._remedy}")
        results: dict[KeyT, ResultT] = {}
        for line in lines[1:]:
            row = dict(zip(self.columns, line, strict=True))
            if row["config"] != self.hash:
                raise LogError(
                    f"{self.path} must have results of this configuration, {self.hash}: got {row['config']}. "
                    f"{self._remedy}"
                )
            try:
                results[_parse(self.key, row)] = _parse(self.result, row)
            except ValueError as error:
                raise LogError(f"{self.path} must have numbers where they belong: {error}. {self._remedy}") from error
        return results

    @property
    def _remedy(self) -> str:
        return "Give the same arguments and data, or choose another --output."


def _parse(made: type, row: Mapping[str, str]) -> Any:
    return made(**{field.name: field.type(row[field.name]) for field in fields(made)})  # type: ignore[operator]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The new file, or what was there before. Whoever writes it holds a lock, so that what is left over is replaced."""
    part = path.with_name(path.name + ".incomplete")
    write(part)
    os.replace(part, path)
