"""What pip does with the tree: editable installations, wheels and the sdist, with and without a compiler on PATH."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from spatial_decay.ops.native import build
from tests.ops.native.conftest import SOURCE
from tests.ops.native.test_build import needs_compiler

pytestmark = pytest.mark.slow
pytest.importorskip("hatchling", reason="the build backend (pip install hatchling editables)")

ROOT = Path(__file__).parents[3]
NATIVE = "spatial_decay/ops/native"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is built, with a kernel that compiles at once."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore", "hatch_build.py"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "*kernels.*")
    shutil.copytree(ROOT / "spatial_decay", folder / "spatial_decay", ignore=ignored)
    for path in (folder / NATIVE / "source").iterdir():
        path.unlink()
    (folder / NATIVE / "source" / "attention.cpp").write_text(SOURCE)
    (folder / NATIVE / "source" / "products.h").write_text("// products\n")
    return folder


def start(tree: Path, hook: str, **environment: str) -> subprocess.Popen:
    """One call of the build backend, as pip does it; it prints the name of what it made."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import hatchling.build as backend; print(backend.build_{hook}('../dist'))"],
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def finish(done: subprocess.Popen) -> str:
    out, error = done.communicate()
    assert done.returncode == 0, error
    return out


def make(tree: Path, hook: str, **environment: str) -> Path:
    (tree.parent / "dist").mkdir(exist_ok=True)
    return tree.parent / "dist" / finish(start(tree, hook, **environment)).splitlines()[-1]


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix(f"{NATIVE}/") for name in archive.namelist() if name.startswith(NATIVE)}
    return {name for name in names if not name.endswith(".py")}


SOURCES = {"source/attention.cpp", "source/products.h"}


@needs_compiler
def test_wheel_for_this_platform_in_an_environment_without_a_compiler(tree, tmp_path):
    sdist = make(tree, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = tmp_path / "unpacked" / sdist.name.removesuffix(".tar.gz")
    wheel = make(unpacked.rename(tmp_path / "from_sdist"), "wheel")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert not wheel.name.endswith("-any.whl")
    assert contents(wheel) == {*SOURCES, build.OBJECT, build.RECORD}
    with zipfile.ZipFile(wheel) as archive:
        about = next(name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(about).decode()

    fresh = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True)
    scripts = fresh / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True)
    code = (
        f"import sys; sys.path.append({str(Path(torch.__file__).parents[1])!r})\n"
        "from spatial_decay.ops.native import library\n"
        "assert 'site-packages' in library.__file__ and library.FOLDER.is_relative_to(sys.prefix)\n"
        "assert library.reason() is None or 'torch' in library.reason(), library.reason()\n"
        "assert library.reason() or library.kernel()(None, None, 1) == 41\n"
    )
    subprocess.run([python, "-W", "error", "-c", code], check=True, cwd=tmp_path, env={"PATH": str(scripts)})


def test_without_a_compiler_the_wheel_is_for_any_platform(tree, compiler):
    compiler(None)
    wheel = make(tree, "wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert contents(wheel) == {*SOURCES, build.RECORD}
    with zipfile.ZipFile(wheel) as archive:
        assert json.loads(archive.read(f"{NATIVE}/{build.RECORD}"))["why"].startswith("no C++ compiler was found")


def test_without_hooks_the_wheel_is_for_any_platform(tree):
    wheel = make(tree, "wheel", HATCH_BUILD_NO_HOOKS="true")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert contents(wheel) == SOURCES


@needs_compiler
def test_what_an_editable_installation_compiled_goes_into_no_archive(tree):
    make(tree, "editable")
    assert build.fault(tree / NATIVE) is None
    assert contents(make(tree, "wheel", HATCH_BUILD_NO_HOOKS="true")) == SOURCES
    with tarfile.open(make(tree, "sdist")) as archive:
        assert not [name for name in archive.getnames() if "kernels." in name]


@needs_compiler
def test_an_editable_installation_without_a_compiler_leaves_another_ones_kernel(tree, compiler):
    make(tree, "editable")
    compiler(None)
    make(tree, "editable")
    assert build.fault(tree / NATIVE) is None


def test_an_editable_installation_without_a_compiler_goes_through(tree, compiler):
    compiler(None)
    make(tree, "editable")
    assert "no C++ compiler was found" in build.fault(tree / NATIVE)


@needs_compiler
def test_two_installations_at_once(tree):
    """Of one tree, by compilers that make different objects; nobody sees anything half."""
    (tree.parent / "dist").mkdir()
    for round_ in range(3):
        (tree / NATIVE / "source" / "products.h").write_text(f"// products {round_}\n")
        for done in [start(tree, "editable", CXX=compiler) for compiler in ("c++", "c++ -g")]:
            finish(done)
        assert build.fault(tree / NATIVE) is None


@needs_compiler
def test_two_compilations_at_once(room):
    """The same by the command, which keeps nothing."""
    for _ in range(5):
        both = [
            subprocess.Popen(
                [sys.executable, str(room / "build.py")],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "CXX": compiler},
            )
            for compiler in ("c++", "c++ -g")
        ]
        for done in both:
            finish(done)
        assert build.fault(room) is None
