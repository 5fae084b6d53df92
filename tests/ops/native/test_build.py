"""How the kernel is compiled, what is left when it cannot be, and which objects are refused before they are loaded."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spatial_decay.ops.native import build
from tests.ops.native.conftest import GOOD

HAS_COMPILER = shutil.which("c++") is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on PATH (needs c++)")


def files(room: Path) -> set[str]:
    return {path.name for path in room.iterdir()} - {"source", "build.py", "__pycache__"}


def again(room: Path) -> str:
    return f"run: python {shlex.quote(str(room / 'build.py'))}"


def change(room: Path, old: bytes, new: bytes) -> None:
    """Another object, with a record that agrees with it."""
    content = (room / build.OBJECT).read_bytes()
    assert old in content
    content = content.replace(old, new)
    (room / build.OBJECT).write_bytes(content)
    record = json.loads((room / build.RECORD).read_text())
    (room / build.RECORD).write_text(json.dumps({**record, "sha256": hashlib.sha256(content).hexdigest()}))


def test_what_a_build_leaves(room, compiler):
    compiler(GOOD)
    record = build.build(room)
    assert files(room) == {build.OBJECT, build.RECORD}
    assert json.loads((room / build.RECORD).read_text()) == record
    content = (room / build.OBJECT).read_bytes()
    assert record["built"]
    assert record["compiler"] == "stub 1.0"
    assert record["sha256"] == hashlib.sha256(content).hexdigest()
    variants = ",".join(record["variants"])
    text = f"spatial-decay native kernel: source {record['source']} machine {build.machine()} variants {variants}"
    assert f"{text}\0".encode() in content
    assert build.fault(room) is None


def test_each_variant_has_its_flags_and_name(room, compiler):
    compiler(f'echo "$@" >>{shlex.quote(str(room.parent))}/calls\n{GOOD}')
    variants = build.build(room)["variants"]
    calls = (room.parent / "calls").read_text().splitlines()
    compiled = [call for call in calls if "attention.cpp" in call]
    assert sorted(re.search(r"-DVARIANT=(\S+)", call)[1] for call in compiled) == sorted(variants)
    assert all("-mavx512f" in call for call in compiled if "=AVX512" in call)
    if build.machine() == "linux-x86_64":
        assert variants == ["AMX", "AVX512", "AVX2", "DEFAULT"]


KNOWS_NO_AMX = """
case "$*" in *-mamx*) echo "c++: error: unrecognized command-line option '-mamx-tile'"; exit 1;; esac
"""


@pytest.mark.skipif(build.machine() != "linux-x86_64", reason="elsewhere no instruction set is optional")
def test_an_old_compiler_leaves_out_what_it_does_not_know(room, compiler):
    compiler(KNOWS_NO_AMX + GOOD)
    done = start(room)
    why = "c++ failed: c++: error: unrecognized command-line option '-mamx-tile'"
    assert done.communicate()[0].endswith(f"AVX512, AVX2, DEFAULT, by stub 1.0\nLeft out: AMX, {why}\n")
    assert done.returncode == 0
    assert b"variants AVX512,AVX2,DEFAULT\0" in (room / build.OBJECT).read_bytes()
    record = json.loads((room / build.RECORD).read_text())
    assert (record["variants"], record["left_out"]) == (["AVX512", "AVX2", "DEFAULT"], {"AMX": why})
    assert build.fault(room) is None


def test_no_compiler(room, compiler):
    compiler(None)
    why = "no C++ compiler was found (looked on PATH for c++, g++, clang++)"
    assert build.build(room) == {"built": False, "why": why, "output": ""}
    assert files(room) == {build.RECORD}
    assert build.fault(room) == (
        f"the kernel was not compiled at installation: {why}; with a C++ compiler on PATH or in CXX, {again(room)}"
    )


def test_a_compiler_that_cxx_names(room, compiler, monkeypatch):
    folder = compiler(GOOD)
    (folder / "c++").rename(folder / "other")
    monkeypatch.setenv("CXX", "other -DMINE")
    assert build.build(room)["built"]
    monkeypatch.setenv("CXX", "another")
    assert build.attempt(room / "x", room)["why"] == "the compiler that CXX names was not found: another"
    monkeypatch.setenv("CXX", "other 'half")
    assert build.attempt(room / "x", room)["why"] == "CXX is not a command (No closing quotation): other 'half"


def test_quotation_marks_on_windows(monkeypatch):
    monkeypatch.setattr(build, "_IS_WINDOWS", True)
    monkeypatch.setenv("CXX", r'"C:\Program Files\cl.exe" /x')
    with pytest.raises(
        build.CompileError, match=r"^the compiler that CXX names was not found: C:\\Program Files\\cl.exe$"
    ):
        build._compiler()
    assert build.rebuild_command(Path("a b")) == f'python "{Path("a b", "build.py")}"'


FAILS = """
[ "$1" = --version ] && exit 0
echo "attention.cpp: In function 'f':"
echo "attention.cpp:7:3: error: no such thing"
echo "attention.cpp:9:3: error: and no such thing"
exit 1
"""
KILLED = """
[ "$1" = --version ] && exit 0
while [ "$1" != -o ]; do shift; done
echo half >"$2"
kill -9 $$
"""
LINKS_NOTHING = GOOD.replace('mv "$out.whole" "$out"', 'case "$out" in *.o) mv "$out.whole" "$out";; *) exit 3;; esac')
FAILURES = {
    "fails": (FAILS, "c++ failed: attention.cpp:7:3: error: no such thing"),
    "killed": (KILLED, "c++ failed: killed by signal 9"),
    "linker": (LINKS_NOTHING, "c++ failed: exit status 3"),
    "nothing": (GOOD.replace('mv "$out.whole" "$out"', ""), "c++ made no usable object"),
    "rubbish": (GOOD.replace("cat $from", "echo rubbish"), "c++ made no usable object"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_compiler_that_fails(room, compiler, name):
    script, why = FAILURES[name]
    compiler(script)
    record = build.build(room)
    assert record["why"].startswith(why)
    assert json.loads((room / build.RECORD).read_text()) == record
    assert files(room) == {build.RECORD}
    assert why in build.fault(room)
    if name == "fails":
        assert record["output"].startswith("c++ -c -std=c++17")
        assert "and no such thing" in record["output"]


@pytest.mark.parametrize("script", [None, FAILS], ids=["none", "fails"])
def test_a_failed_build_takes_away_only_what_may_not_be_loaded(room, compiler, script):
    compiler(GOOD)
    build.build(room)
    before = {name: (room / name).read_bytes() for name in files(room)}
    compiler(script)
    assert not build.build(room)["built"]
    assert {name: (room / name).read_bytes() for name in files(room)} == before
    assert build.build(room, keeps_current=True)["built"]  # which compiles nothing

    (room / "source" / "products.h").write_text("// other products\n")
    assert not build.build(room, keeps_current=True)["built"]
    assert files(room) == {build.RECORD}


def test_faults_of_what_is_there(room, compiler):
    path, record = room / build.OBJECT, room / build.RECORD
    compile_it = f"with a C++ compiler on PATH or in CXX, {again(room)}"
    assert build.fault(room) == f"the kernel was not compiled for this copy of the package; {compile_it}"
    compiler(GOOD)
    build.build(room)
    content, said = path.read_bytes(), record.read_bytes()

    path.unlink()
    assert build.fault(room) == f"{path} is missing, though the installation compiled it: {again(room)}"
    path.write_bytes(content)
    record.unlink()
    assert build.fault(room) == f"{build.RECORD} is missing beside {path}: {again(room)}"
    for half in (b"", said[: len(said) // 2], b"[]", b"{}", b"\xff"):
        record.write_bytes(half)
        assert build.fault(room).startswith(f"{record} cannot be read (")
    record.write_bytes(said)

    path.write_bytes(content.replace(b"spatial-decay native", b""))
    assert build.fault(room) == f"{path} is damaged (it does not say what it was compiled from): {again(room)}"
    path.write_bytes(content + b"\0")
    assert build.fault(room) == (f"{path} is damaged (its sha256 is not the one in {build.RECORD}): {again(room)}")
    path.write_bytes(content)
    assert build.fault(room) is None


def test_a_package_inside_an_archive(tmp_path):
    archive = tmp_path / "package.zip"
    archive.touch()
    why = "is inside an archive, which no shared object is loaded from: install the package with pip"
    assert build.fault(archive / "native") == f"{archive / 'native'} {why}"


def test_another_machine(room, compiler):
    compiler(GOOD)
    build.build(room)
    change(room, f"machine {build.machine()} ".encode(), b"machine linux-riscv64 ")
    assert build.fault(room) == (
        f"{room / build.OBJECT} was compiled for linux-riscv64, and this is {build.machine()}: {again(room)}"
    )


CHANGES = {
    "content": lambda source: (source / "products.h").write_text("// products \n"),
    "name": lambda source: (source / "products.h").rename(source / "product.h"),
    "new": lambda source: (source / "a.h").touch(),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_source(room, compiler, name):
    compiler(GOOD)
    was = build.build(room)["source"][:8]
    CHANGES[name](room / "source")
    assert re.fullmatch(
        re.escape(f"{room / build.OBJECT} was compiled from other source files ({was}, and here are ")
        + "[0-9a-f]{8}"
        + re.escape(f"): {again(room)}"),
        build.fault(room),
    )


def test_other_flags(room, compiler, monkeypatch):
    compiler(GOOD)
    build.build(room)
    monkeypatch.setattr(build, "_COMPILE", [*build._COMPILE, "-O2"])
    assert "was compiled from other source files" in build.fault(room)


def start(room: Path) -> subprocess.Popen:
    """The documented command, without site-packages: it needs the standard library alone."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(room / "build.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_the_command_says_what_it_did(room, compiler):
    compiler(GOOD)
    done = start(room)
    assert done.communicate()[0].startswith(f"{room / build.OBJECT}: ")
    assert done.returncode == 0
    assert build.fault(room) is None
    compiler(FAILS)
    done = start(room)
    said = done.communicate()[0]
    assert done.returncode == 1
    assert said.startswith("c++ -c -std=c++17")
    assert said.endswith("The kernel was not compiled: c++ failed: attention.cpp:7:3: error: no such thing\n")


def test_a_build_that_is_killed_while_the_compiler_is_slow(room, compiler):
    compiler(GOOD)
    build.build(room)
    (room / "source" / "products.h").write_text("// other products\n")
    before = {name: (room / name).read_bytes() for name in files(room)}
    compiler(
        '[ "$1" = --version ] || { echo started >&3; sleep 60; }\n'.replace(">&3", f">{room.parent}/started") + GOOD
    )
    done = start(room)
    while not (room.parent / "started").exists():
        assert done.poll() is None
        time.sleep(0.01)
    os.killpg(done.pid, signal.SIGKILL)
    done.communicate()
    assert {name: (room / name).read_bytes() for name in files(room)} == before
    assert "was compiled from other source files" in build.fault(room)


def test_what_two_builds_made_is_put_in_place_one_after_the_other(room, compiler):
    compiler(f"{GOOD}\necho done >>{shlex.quote(str(room.parent))}/steps\n")
    with build._alone(room):
        done = start(room)
        while (
            not (room.parent / "steps").exists()
            or len((room.parent / "steps").read_text().splitlines()) < len(build._variants()) + 2
        ):
            time.sleep(0.01)  # the variants, the text, and what links them
        time.sleep(0.1)
        assert done.poll() is None
        assert not files(room)
    said = done.communicate()[0]
    assert done.returncode == 0, said
    assert build.fault(room) is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user who may not write everywhere")
def test_a_folder_that_cannot_be_written(room, compiler):
    compiler(GOOD)
    room.chmod(0o555)
    done = start(room)
    said = done.communicate()[0]
    room.chmod(0o755)
    assert done.returncode == 1
    assert said.startswith(f"{room} cannot be written: ")


@needs_compiler
def test_a_real_compiler_makes_what_needs_no_cpp_library(room):
    record = build.build(room)
    assert record["built"], record
    assert b"libstdc++" not in (room / build.OBJECT).read_bytes()
    assert build.fault(room) is None


@needs_compiler
@pytest.mark.slow
def test_a_build_that_is_killed_at_any_moment(room):
    build.build(room)
    took = time.perf_counter()
    build.build(room)
    took = time.perf_counter() - took
    steps = 40
    for step in range(steps):
        if step == steps // 2:  # from here on nothing is there before
            (room / build.OBJECT).unlink()
            (room / build.RECORD).unlink()
        done = start(room)
        time.sleep(2 * took * (step % (steps // 2)) / (steps // 2))
        os.killpg(done.pid, signal.SIGKILL)
        done.communicate()
        fault = build.fault(room)
        if step < steps // 2:
            assert fault is None
        else:
            assert fault is None or "was not compiled for this copy" in fault or "is missing beside" in fault
    assert build.build(room)["built"]
    assert build.fault(room) is None
