"""Files of weights, read so that nothing in them is run, and so that damage that can be seen is seen."""

import importlib
import io
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["read"]

_ZIP = b"PK\x03\x04"  # how torch tells its zip archives from its older files
_NAMESPACE, _EMPTY = b"cargparse\nNamespace\n", b"ccollections\nOrderedDict\n"
_PICKLES_OF_OLDER_FILES = 4  # a magic number, the version, the machine, and what was saved; then storages


def read(path: Path) -> Mapping[str, Any]:
    """What a file holds, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is none that can be read safely, is damaged, or holds no dict.
        ImportError: .safetensors without the safetensors package.
    """
    if not path.is_file():
        raise FileNotFoundError(f"source must be a file of weights: there is none at {path}.")
    try:
        if path.suffix == ".safetensors":
            found = importlib.import_module("safetensors.torch").load_file(path)
        else:
            with path.open("rb") as file:
                found = _read_torch(file)
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs the safetensors package: pip install safetensors.") from error
    except Exception as error:  # zip, pickle and header errors are of many kinds, and safetensors has its own
        raise ValueError(
            f"{path} is not a checkpoint that can be read safely: {str(error) or type(error).__name__}. Download or "
            "save it again, and compare it with the hash that its authors give."
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold a dict of weights: got {type(found).__name__}.")
    return found


def _read_torch(file: IO[bytes]) -> object:
    is_zip = file.read(len(_ZIP)) == _ZIP
    file.seek(0)
    readable = _checked_archive(file) if is_zip else _checked_older_file(file)
    readable.seek(0)
    return torch.load(readable, map_location="cpu", weights_only=True)


def _checked_archive(file: IO[bytes]) -> IO[bytes]:
    """The archive, once its sums are found right; without the command line that RMT's files hold, see _without.

    torch.load checks no sums: github.com/pytorch/pytorch/issues/126952.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        size, unpacked = file.seek(0, io.SEEK_END), sum(record.file_size for record in records)
        if unpacked > size:
            raise ValueError(
                f"its parts would take {unpacked} bytes, and the file has {size}; torch.save compresses nothing."
            )
        for record in records:
            if not record.CRC:  # none is written under torch.serialization.set_crc32_options(False)
                del record.CRC
        pickled = [record for record in records if record.filename.endswith("/data.pkl")]
        if not any(_NAMESPACE in archive.read(record) for record in pickled):
            for record in records:
                with archive.open(record) as part:
                    while part.read(2**20):
                        pass
            return file
        with zipfile.ZipFile(copy := io.BytesIO(), "w") as changed:
            for record in records:
                content = archive.read(record)
                changed.writestr(record.filename, _without(io.BytesIO(content)) if record in pickled else content)
    return copy


def _checked_older_file(file: IO[bytes]) -> IO[bytes]:
    """The file, which has no sums; without command lines as well."""
    content = file.read()
    if _NAMESPACE not in content:
        return file
    copy = io.BytesIO(content)
    pickles = b"".join(_without(copy) for _ in range(_PICKLES_OF_OLDER_FILES))
    return io.BytesIO(pickles + copy.read())


def _without(pickled: IO[bytes]) -> bytes:
    """The next pickle, with an empty dict in place of every argparse.Namespace.

    torch.serialization.safe_globals would allow the class for all threads, and take it from one that still needs it:
    github.com/pytorch/pytorch/issues/134680.
    """
    start = pickled.tell()
    at = [
        i - start
        for code, argument, i in pickletools.genops(pickled)
        if argument == "argparse Namespace" and i is not None and code.name == "GLOBAL"
    ]
    end = pickled.tell()
    pickled.seek(start)
    content, new, done = pickled.read(end - start), b"", 0
    for i in at:
        new, done = new + content[done:i] + _EMPTY, i + len(_NAMESPACE)
    return new + content[done:]
