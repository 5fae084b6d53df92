"""The floors: imports go down only, and importing the package costs little, pulls in little and says nothing."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "spatial_decay"
# From the ground up.
FLOORS = [
    "precision",
    "values",
    "layout",
    "features",
    "decay",
    "ops",
    "layers",
    "models",
    "checkpoint",
    "folders",
    "swap",
]
ABOVE = ["integrations", "viz", "command", "__main__"]  # may import all of it, and nobody imports it


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Floors of ours that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        found += [name.split(".")[1] for name in names if name.startswith("spatial_decay.")]
    return found


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    floor = floor_of(path)
    if floor in ABOVE:
        return
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    assert set(imports_of(path)) <= set(allowed), f"{path} may import {allowed}"


def test_every_floor_is_known():
    assert {floor_of(path) for path in FILES} <= {*FLOORS, *ABOVE}


def test_the_package_itself_exports_without_the_extras():
    assert not set(ABOVE) & set(imports_of(PACKAGE / "__init__.py"))


def run(code: str) -> str:
    """Run code in a new interpreter, with every warning an error; what it prints.

    Resource warnings are torch's: releases before 2.7 leave a temporary folder to the interpreter's end.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


HEAVY = [
    *("triton", "matplotlib", "timm", "transformers", "diffusers", "huggingface_hub", "safetensors", "onnx"),
    *("sklearn", "torchvision", "open_clip", "vit_pytorch", "sympy.core"),
]


def test_import_pulls_in_nothing_heavy_and_reads_no_environment_variable():
    code = (
        "import os, json, sys, torch, einops, typing_extensions; before = set(sys.modules)\n"
        "class Watched(dict):\n"
        "    def __getitem__(self, key): raise AssertionError(key)\n"
        "    def get(self, key, default=None): raise AssertionError(key)\n"
        "    def __contains__(self, key): raise AssertionError(key)\n"
        "real, os.environ = os.environ, Watched()\n"
        "import spatial_decay\n"
        "os.environ = real\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    new = json.loads(run(code))
    roots = {name.split(".")[0] for name in new}
    assert not roots & set(HEAVY)
    # The standard library aside, torch, einops and typing_extensions are all that it needs.
    assert roots - set(sys.stdlib_module_names) <= {"spatial_decay", "torch", "einops", "typing_extensions"}


def test_where_the_extras_are_missing_import_works_and_prints_nothing_and_integrations_say_which_they_need():
    blocked = "".join(
        f"sys.modules[{name!r}] = None; " for name in ("triton", "timm", "matplotlib", "numpy", "sklearn")
    )
    # numpy is torch's own option: block it after torch has looked for it.
    code = (
        f"import sys, torch; {blocked}import spatial_decay as sd; sd.SDTBlock(8, 2)(torch.zeros(1, 2, 2, 8))\n"
        "print('imported')\n"
        "try:\n    import spatial_decay.integrations.timm\n"
        "except ImportError as error: print(error)\n"
        "try:\n    import spatial_decay.viz\n"
        "except ImportError as error: print(error)"
    )
    imported, of_timm, of_viz = run(code).splitlines()
    assert imported == "imported"
    assert of_timm.endswith("pip install spatial-decay[timm]")
    assert of_viz.endswith('pip install "spatial-decay[viz]"')


def test_every_public_name_is_there_and_documented():
    import spatial_decay

    for name in spatial_decay.__all__:
        assert getattr(spatial_decay, name).__doc__, name
