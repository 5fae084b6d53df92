"""Why there is no kernel here, asked in the order of what is to be done, and the functions where there is one."""

import ctypes
import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spatial_decay.ops.native import build, library
from tests.ops.native.conftest import GOOD

HAS_NEW_TORCH = library.parallel_for() is not None
needs_new_torch = pytest.mark.skipif(not HAS_NEW_TORCH, reason="torch has no torch_parallel_for (needs 2.10 or newer)")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on PATH (needs c++)")


def forget() -> None:
    for function in (library._load, library.kernel, library.parallel_for):
        function.cache_clear()


@pytest.fixture
def room(room, monkeypatch):
    """The library looks there, and has been asked nothing yet."""
    monkeypatch.setattr(library, "FOLDER", room)
    forget()
    yield room
    monkeypatch.undo()
    forget()


def test_a_torch_without_the_parallel_loop_is_asked_first(room, monkeypatch):
    other = next(Path(torch.__file__).parent.glob("lib/*c10.*"))
    monkeypatch.setattr(torch._C, "__file__", str(other))
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    assert library.reason() == "torch 2.6.0 has no torch_parallel_for: install torch 2.10 or newer"
    with pytest.raises(NotImplementedError, match=r"^There is no native kernel here: torch 2\.6\.0 has no"):
        library.kernel()


@needs_new_torch
def test_the_reason_is_what_build_says(room, compiler):
    compiler(None)
    assert library.reason() == build.fault(room)
    assert library.reason().startswith("the kernel was not compiled for this copy of the package; ")
    build.build(room)
    assert library.reason().startswith("the kernel was not compiled for this copy")  # asked once a process
    forget()
    assert library.reason() == build.fault(room)
    with pytest.raises(NotImplementedError, match="no C"):
        library.kernel()


@needs_new_torch
def test_what_cannot_be_loaded(room, compiler):
    compiler(GOOD)  # what the stub makes is no shared object, but says what it should
    build.build(room)
    why = library.reason()
    path = room / build.OBJECT
    assert why.startswith(f"{path} cannot be loaded (")
    assert why.endswith(f"): run: {build.rebuild_command(room)}")


@needs_new_torch
def test_what_has_a_fault_is_not_loaded(room, compiler, monkeypatch):
    compiler(GOOD)
    build.build(room)
    content = (room / build.OBJECT).read_bytes().replace(build.machine().encode(), b"linux-riscv64")
    (room / build.OBJECT).write_bytes(content)
    record = json.loads((room / build.RECORD).read_text())
    (room / build.RECORD).write_text(json.dumps({**record, "sha256": hashlib.sha256(content).hexdigest()}))
    loaded, load = [], ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: loaded.append(path) or load(path))
    assert "was compiled for linux-riscv64" in library.reason()
    assert str(room / build.OBJECT) not in loaded


@needs_new_torch
def test_an_object_that_is_replaced_at_this_moment_is_asked_again(room, compiler, monkeypatch):
    compiler(GOOD)
    build.build(room)
    record = (room / build.RECORD).read_bytes()
    (room / build.RECORD).write_bytes(record.replace(b'"sha256": "', b'"sha256": "0'))
    monkeypatch.setattr(library.time, "sleep", lambda seconds: (room / build.RECORD).write_bytes(record))
    assert "cannot be loaded" in library.reason()  # the stub's, so the files were found to agree


@needs_new_torch
@needs_compiler
def test_every_variant_that_the_processor_has(room):
    assert build.build(room)["built"]
    assert library.reason() is None
    assert library.kernel() is library.kernel()
    with ThreadPoolExecutor(8) as pool:
        assert len({id(function) for function in pool.map(lambda _: library._load()[0], range(8))}) == 1
    for variant in (None, *library.variants()):
        assert library.kernel(variant)(None, library.parallel_for(), 1) == 41


X86 = ("DEFAULT", "AVX2", "AVX512", "AMX")


@pytest.mark.parametrize(
    ("capability", "has_tiles", "variants"),
    [
        ("AVX512", True, X86 if sys.platform == "linux" else X86[:3]),
        ("AVX512", False, X86[:3]),
        ("AVX2", True, X86[:2]),
        ("NO AVX", False, X86[:1]),
        ("SVE256", False, X86[:1]),
    ],
)
def test_variants_are_those_of_the_capability(room, monkeypatch, capability, has_tiles, variants):
    has_all(monkeypatch)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: has_tiles)
    assert library.variants() == variants
    for other in {*X86, "SVE256"} - {*variants}:
        with pytest.raises(ValueError, match="capability must be one of DEFAULT.* on this processor: got "):
            library.kernel(other)


def has_all(monkeypatch) -> None:
    """A processor and an object that have all."""
    monkeypatch.setattr(
        library, "_load", lambda: (SimpleNamespace(**{library._SYMBOL + name: 0 for name in X86}), None)
    )
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    tiles = {"amx_tile": True, "amx_bf16": True, "avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: tiles, raising=False)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True, raising=False)


@pytest.mark.parametrize("name", ["get_capabilities", "_init_amx"])
def test_a_torch_that_cannot_be_asked_for_tiles(monkeypatch, name):
    has_all(monkeypatch)
    monkeypatch.delattr(torch.cpu, name)
    assert library.variants() == X86[:3]


@pytest.mark.parametrize("name", ["amx_tile", "amx_bf16", "avx512_bf16"])
def test_a_processor_that_has_not_all_that_tiles_need(monkeypatch, name):
    has_all(monkeypatch)
    torch.cpu.get_capabilities()[name] = False
    assert library.variants() == X86[:3]


@needs_new_torch
@needs_compiler
def test_an_object_that_has_less_than_the_processor(room, monkeypatch):
    """As by a compiler that knows no AMX."""
    monkeypatch.setitem(build._VARIANTS, build.machine(), {"DEFAULT": []})
    assert build.build(room)["built"]
    assert library.variants() == ("DEFAULT",)
    assert library.kernel()(None, None, 0) == 40
    with pytest.raises(ValueError, match="capability must be one of DEFAULT on this processor: got 'AVX2'"):
        library.kernel("AVX2")


@needs_new_torch
def test_the_parallel_loop_is_libtorchs():
    body = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    loop = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, body, ctypes.c_void_p)
    seen = []
    assert loop(library.parallel_for())(0, 10, 1, body(lambda begin, end, _: seen.extend(range(begin, end))), None) == 0
    assert sorted(seen) == list(range(10))


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_reason_is_a_constant_to_the_compiler():
    run(
        "import torch\n"
        "from spatial_decay.ops.native import library\n"
        "f = torch.compile(lambda x: x + 1 if library.reason() is None else x - 1, backend='eager', fullgraph=True)\n"
        "assert f(torch.zeros(1)).item() == (1 if library.reason() is None else -1)\n"
    )


@pytest.mark.slow
def test_a_process_that_forks():
    run(
        "import os\n"
        "from spatial_decay.ops.native import library\n"
        "why = library.reason()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if library.reason() == why and (why or library.kernel()) else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )


@pytest.mark.slow
def test_the_command_as_a_module_warns_of_nothing(tmp_path):
    """`python -m spatial_decay.ops.native.build`, on a copy of the package."""
    package = Path(build.FOLDER).parents[1]
    shutil.copytree(package, tmp_path / "spatial_decay", ignore=shutil.ignore_patterns("__pycache__", "*kernels.*"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "spatial_decay.ops.native.build"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    folder = tmp_path / "spatial_decay" / "ops" / "native"
    if done.returncode == 0:
        assert not done.stderr
        assert build.fault(folder) is None
    else:
        assert "The kernel was not compiled: " in done.stderr
        assert (folder / build.RECORD).exists()
