"""Compiles the kernel in `source/` into one shared object, and says whether the one that is there may be loaded.

    python -m spatial_decay.ops.native.build      # or, where torch is not installed: python PATH/build.py

It needs the standard library and a C++ compiler with GCC's vector types: GCC, Clang or clang-cl. hatch_build.py loads
this file by its path and runs it at installation. Two files are left beside it: the object, and a record of what
happened, which says why not where there is no object. A failed or killed build leaves no half file.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = [
    "OBJECT",
    "RECORD",
    "CompileError",
    "attempt",
    "build",
    "compile_object",
    "fault",
    "machine",
    "rebuild_command",
]

FOLDER = Path(__file__).resolve().parent
OBJECT = "kernels" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
RECORD = "kernels.json"

_IS_WINDOWS = sys.platform == "win32"
# What each instruction set adds to the flags. Its name is the macro VARIANT, and what torch calls it in
# torch.backends.cpu.get_cpu_capability(), which knows AMX as AVX512. A machine that is not listed has DEFAULT alone;
# on arm64 that is NEON.
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
_X86 = {"AVX512": _AVX512, "AVX2": ["-mavx2", "-mfma", "-mf16c"], "DEFAULT": []}
_AMX = [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
_OPTIONAL = ("AMX",)  # left out where a compiler or its assembler does not know the instructions
_VARIANTS: dict[str, dict[str, list[str]]] = {
    "linux-x86_64": {"AMX": _AMX, **_X86},  # other systems have another way to ask for the tiles
    "windows-x86_64": _X86,
    "darwin-x86_64": _X86,
}
_FAST = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
if _IS_WINDOWS:
    _COMPILERS = ["clang-cl"]  # MSVC's own compiler has no vector types
    _COMPILE = ["/nologo", "/c", "/std:c++17", "/O2", "/MT", "/GR-", *(f"/clang:{flag}" for flag in ("-O3", *_FAST))]
    _LINK = ["/nologo", "/LD", "/MT"]
else:
    _COMPILERS = ["c++", "g++", "clang++"]
    _COMPILE = ["-c", "-std=c++17", "-O3", *_FAST, "-fno-exceptions", "-fno-rtti", "-fPIC", "-fvisibility=hidden"]
    # As needed: the driver names the C++ library to the linker, and the kernel uses nothing of it.
    _LINK = ["-shared"] if sys.platform == "darwin" else ["-shared", "-Wl,--as-needed"]

_TEXT = re.compile(rb"spatial-decay native kernel: source ([0-9a-f]{64}) machine ([\w.-]+) variants ([\w,]+)\0")


class CompileError(RuntimeError):
    """Why there is no object, in one line; `output` is all that the compiler said."""

    def __init__(self, why: str, output: str = ""):
        super().__init__(why)
        self.output = output


def machine() -> str:
    """System and processor that this Python runs on, such as linux-x86_64."""
    # On Windows platform.machine() is the processor itself, also where it emulates another one for this Python.
    processor = sysconfig.get_platform().removeprefix("win-") if _IS_WINDOWS else platform.machine()
    processor = {"amd64": "x86_64", "arm64": "aarch64"}.get(processor.lower(), processor.lower())
    return f"{'windows' if _IS_WINDOWS else sys.platform}-{processor}"


def _variants() -> dict[str, list[str]]:
    return _VARIANTS.get(machine(), {"DEFAULT": []})


def _source_hash(folder: Path) -> str:
    """Of the names and contents of the source files, and of the flags."""
    digest = hashlib.sha256(json.dumps([_COMPILE, _LINK, _variants()]).encode())
    for path in sorted((folder / "source").glob("*")):
        if path.suffix in (".cpp", ".h"):
            content = path.read_bytes()
            digest.update(f"\n{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def rebuild_command(folder: Path = FOLDER) -> str:
    """What compiles the kernel of this copy of the package anew."""
    command = ["python", str(folder / "build.py")]
    return subprocess.list2cmdline(command) if _IS_WINDOWS else shlex.join(command)


def fault(folder: Path = FOLDER) -> str | None:
    """Why the object in the folder may not be loaded, and what to do; None where it may. Nothing of it is run."""
    path, again = folder / OBJECT, f"run: {rebuild_command(folder)}"
    compile_it = f"with a C++ compiler on PATH or in CXX, {again}"
    try:
        record = json.loads((folder / RECORD).read_bytes())
        is_built, why, expected = record["built"], record.get("why"), record.get("sha256")
    except FileNotFoundError:
        if not path.exists():
            return f"the kernel was not compiled for this copy of the package; {compile_it}"
        return f"{RECORD} is missing beside {path}: {again}"
    except NotADirectoryError:
        return f"{folder} is inside an archive, which no shared object is loaded from: install the package with pip"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / RECORD} cannot be read ({type(error).__name__}: {error}): {again}"
    if not is_built:
        return f"the kernel was not compiled at installation: {why}; {compile_it}"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return f"{path} is missing, though the installation compiled it: {again}"
    except OSError as error:
        return f"{path} cannot be read ({error}): {again}"
    text = _TEXT.search(content)
    if text is None:
        return f"{path} is damaged (it does not say what it was compiled from): {again}"
    source, built_for, _ = (part.decode() for part in text.groups())
    if built_for != machine():
        return f"{path} was compiled for {built_for}, and this is {machine()}: {again}"
    if source != (current := _source_hash(folder)):
        return f"{path} was compiled from other source files ({source[:8]}, and here are {current[:8]}): {again}"
    if hashlib.sha256(content).hexdigest() != expected:
        return f"{path} is damaged (its sha256 is not the one in {RECORD}): {again}"
    return None


def _compiler() -> list[str]:
    """The command of the C++ compiler: CXX, else the first on PATH."""
    try:
        named = shlex.split(os.environ.get("CXX", ""), posix=not _IS_WINDOWS)
    except ValueError as error:  # a quotation mark too few
        raise CompileError(f"CXX is not a command ({error}): {os.environ['CXX']}") from error
    if _IS_WINDOWS:
        named = [part.strip('"') for part in named]
    if named:
        if shutil.which(named[0]) is None:
            raise CompileError(f"the compiler that CXX names was not found: {named[0]}")
        return named
    for name in _COMPILERS:
        if shutil.which(name):
            return [name]
    raise CompileError(f"no C++ compiler was found (looked on PATH for {', '.join(_COMPILERS)})")


def _run(command: Sequence[str]) -> str:
    """What a command says; a command that fails raises CompileError with its first error."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "LC_ALL": "C"},  # errors are looked for in English
        )
    except OSError as error:
        raise CompileError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    first = (errors or lines or [ended])[0][:300]
    raise CompileError(f"{command[0]} failed: {first}", f"{shlex.join(command)}\n{done.stdout}\n{ended}")


def _to(windows: str, path: str) -> list[str]:
    """How a compiler is told what to write."""
    return [windows + path] if _IS_WINDOWS else ["-o", path]


def compile_object(target: Path, folder: Path = FOLDER, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Compile the variants of this processor side by side and link them.

    Args:
        target: The shared object to write.
        folder: Where `source/` is.
        flags: For the compiler besides its own, at compiling and linking, such as -fsanitize=address.

    Returns:
        The record of it: compiler, variants, why others were left out, hashes.

    Raises:
        CompileError: there is no compiler, or it failed.
    """
    compiler, variants, source = _compiler(), _variants(), _source_hash(folder)
    export = "__declspec(dllexport)" if _IS_WINDOWS else '__attribute__((visibility("default")))'
    version = (_run([*compiler, "--version"]).splitlines() or ["unknown"])[0]
    with tempfile.TemporaryDirectory(prefix="spatial-decay-") as scratch:

        def compiled(name: str, *arguments: str) -> str:
            path = str(Path(scratch, f"{name}.o"))
            _run([*compiler, *_COMPILE, *flags, *arguments, *_to("/Fo", path)])
            return path

        kernel = str(folder / "source" / "attention.cpp")
        with ThreadPoolExecutor(len(variants)) as pool:
            tried = {
                name: pool.submit(compiled, name, *those, f"-DVARIANT={name}", kernel)
                for name, those in variants.items()
            }
        failed = {name: trial.exception() for name, trial in tried.items()}
        left_out = {name: str(failed[name]) for name in _OPTIONAL if isinstance(failed.get(name), CompileError)}
        objects = {name: trial.result() for name, trial in tried.items() if name not in left_out}
        text = f"spatial-decay native kernel: source {source} machine {machine()} variants {','.join(objects)}"
        says, linked = Path(scratch, "text.cpp"), Path(scratch, OBJECT)
        says.write_text(f'extern "C" {{ {export} extern const char spatial_decay_build[] = "{text}"; }}\n')
        parts = [compiled("text", str(says)), *objects.values(), *([] if _IS_WINDOWS else ["-lm"])]
        _run([*compiler, *_LINK, *flags, *parts, *_to("/Fe", str(linked))])
        content = linked.read_bytes() if linked.exists() else b""
        if _TEXT.search(content) is None:
            raise CompileError(f"{compiler[0]} made no usable object: it does not hold the text {text!r}")
    _write(target, content)
    sha256 = hashlib.sha256(content).hexdigest()
    about = {"compiler": version, "variants": list(objects), "left_out": left_out}
    return {"built": True, **about, "source": source, "sha256": sha256}


def build(folder: Path = FOLDER, *, keeps_current: bool = False) -> dict[str, Any]:
    """Compile the kernel into its folder, and leave a record of that or of why not.

    An object that may be loaded stays where a new build fails: two installations may share one folder, and only one of
    them a compiler. One that may not be loaded goes.

    Args:
        folder: Where this file and `source/` are.
        keeps_current: Compile only where what is there may not be loaded.

    Returns:
        The record: "built", and "why" where not.

    Raises:
        OSError: the folder cannot be written.
    """
    if keeps_current and fault(folder) is None:
        return json.loads((folder / RECORD).read_bytes())
    with tempfile.TemporaryDirectory(prefix="spatial-decay-") as scratch:
        compiled = Path(scratch, OBJECT)
        record = attempt(compiled, folder)
        with _alone(folder):
            if record["built"]:
                _write(folder / OBJECT, compiled.read_bytes())
            elif fault(folder) is None:
                return record
            else:
                (folder / OBJECT).unlink(missing_ok=True)
            _write(folder / RECORD, json.dumps(record, indent=2).encode() + b"\n")
    return record


def attempt(target: Path, folder: Path = FOLDER) -> dict[str, Any]:
    """compile_object, with its error as a record too."""
    try:
        return compile_object(target, folder)
    except CompileError as error:
        return {"built": False, "why": str(error), "output": error.output}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, so that object and record are of one build. A process that ends has no lock."""
    # A file that is there anyway, and is not written: a file of its own would be left when the package is uninstalled.
    with open(folder / "build.py", "r+b") as file:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # behind its end: nobody may read what is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all; who has loaded the old file keeps it."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def main() -> int:
    """Compile the kernel anew; 0 where that worked."""
    try:
        record = build()
    except OSError as error:  # on Windows also where a running process has loaded the old object
        print(f"{FOLDER} cannot be written: {error}", file=sys.stderr)
        return 1
    if not record["built"]:
        print(f"{record['output']}\nThe kernel was not compiled: {record['why']}", file=sys.stderr)
        return 1
    print(f"{FOLDER / OBJECT}: {', '.join(record['variants'])}, by {record['compiler']}")
    for name, why in record["left_out"].items():
        print(f"Left out: {name}, {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
