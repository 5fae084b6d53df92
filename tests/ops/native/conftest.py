"""A room: a folder such as ops/native, with a small kernel, and compilers that are shell scripts."""

import os
import shutil
from pathlib import Path

import pytest

from spatial_decay.ops.native import build

SOURCE = """
#include <stdint.h>
#define NAME_(variant) spatial_decay_attention_##variant
#define NAME(variant) NAME_(variant)
extern "C" __attribute__((visibility("default"))) int64_t NAME(VARIANT)(const void*, void*, int64_t is_backward) {
  return 40 + is_backward;
}
"""
# Enough of a compiler for build.py: what it compiles is the source itself with \0 for ", what it links is all of that.
GOOD = """
while [ $# -gt 0 ]; do
  case "$1" in
    --version) echo "stub 1.0"; exit 0;;
    -o) out=$2; shift;;
    -l*|-shared|-Wl,*) ;;
    *.cpp|*.o) from="$from $1";;
  esac
  shift
done
cat $from | tr '"' '\\0' >"$out.whole"
mv "$out.whole" "$out"
"""


@pytest.fixture
def room(tmp_path: Path) -> Path:
    folder = tmp_path / "native"
    (folder / "source").mkdir(parents=True)
    (folder / "source" / "attention.cpp").write_text(SOURCE)
    (folder / "source" / "products.h").write_text("// products\n")
    shutil.copy(build.FOLDER / "build.py", folder)
    return folder


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a shell script on PATH as the C++ compiler; None: no compiler at all."""
    if os.name != "posix":
        pytest.skip("shell scripts stand for compilers (needs POSIX)")

    def use(script: str | None) -> Path:
        folder = tmp_path / "compilers"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(folder))
        if script is not None:
            for tool in ("cat", "mv", "tr", "sleep"):
                (folder / tool).symlink_to(shutil.which(tool, path="/usr/bin:/bin"))
            path = folder / "c++"
            path.write_text(f"#!/bin/sh\n{script}")
            path.chmod(0o755)
        return folder

    return use
