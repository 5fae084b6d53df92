"""A release in one piece: its version stands in three files, its Pythons in two; the sdist holds what users need."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import spatial_decay

ROOT = Path(__file__).parents[1]


def test_version_and_date_are_those_of_the_changelog_and_the_citation():
    heads = re.findall(r"^## \[(.*?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert heads[0] == ("Unreleased", "")
    citation = (ROOT / "CITATION.cff").read_text()
    cited = tuple(
        re.search(rf"^{key}: (\S+)$", citation, flags=re.MULTILINE)[1] for key in ("version", "date-released")
    )
    assert heads[1] == cited
    assert cited[0] == spatial_decay.__version__


def test_ci_runs_the_pythons_that_are_claimed():
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    matrix = re.search(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())[1]
    assert re.findall(r"3\.\d+", matrix) == claimed
    assert f'requires-python = ">={claimed[0]}"' in (ROOT / "pyproject.toml").read_text()


def test_workflows_are_yaml_with_jobs():
    yaml = pytest.importorskip("yaml", reason="comes with huggingface_hub")
    for path in sorted((ROOT / ".github").rglob("*.yml")):
        found = yaml.safe_load(path.read_text())
        assert isinstance(found, dict), path
        if path.parent.name == "workflows":
            assert all("runs-on" in job or "uses" in job for job in found["jobs"].values()), path


@pytest.mark.slow
def test_the_sdist_is_small_and_whole(tmp_path):
    pytest.importorskip("hatchling", reason="the build backend")
    code = f"import hatchling.build as backend; print(backend.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    path = tmp_path / done.stdout.split()[-1]
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"spatial_decay/__main__.py", "spatial_decay/py.typed", "hatch_build.py", "CITATION.cff", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/", ".")) and name != ".gitignore"]
    assert path.stat().st_size < 400_000
