"""Hatchling's build hook: compiles the kernel for CPUs where there is a C++ compiler, and never fails without one.

An editable installation has the object beside the Python files, a wheel carries it and is one for this platform. How it
is compiled says spatial_decay/ops/native/build.py. HATCH_BUILD_NO_HOOKS=true makes a wheel for any platform.
"""

import importlib.util
import json
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "spatial_decay/ops/native"


def _load_build(path: Path) -> ModuleType:
    """build.py by its path: the package itself needs torch, which is not installed here."""
    spec = importlib.util.spec_from_file_location("spatial_decay_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NativeKernelHook(BuildHookInterface):
    """For the target wheel, which an editable installation makes too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile: "editable" into the source tree, "standard" into the wheel."""
        folder = Path(self.root, FOLDER)
        build = _load_build(folder / "build.py")
        if version == "editable":
            try:
                record = build.build(folder, keeps_current=True)
            except OSError as error:
                record = {"built": False, "why": f"{error}", "output": ""}
        else:
            self.scratch = tempfile.TemporaryDirectory(prefix="spatial-decay-")
            compiled, written = Path(self.scratch.name, build.OBJECT), Path(self.scratch.name, build.RECORD)
            record = build.attempt(compiled, folder)
            written.write_text(json.dumps(record, indent=2) + "\n")
            build_data["force_include"][str(written)] = f"{FOLDER}/{build.RECORD}"
            if record["built"]:
                build_data["force_include"][str(compiled)] = f"{FOLDER}/{build.OBJECT}"
                build_data["pure_python"] = False
                # For every Python and torch: the object knows neither.
                platform = self.build_config.builder.get_best_matching_tag().split("-")[-1]
                build_data["tag"] = f"py3-none-{platform}"
        if record["built"]:
            self.app.display_info(f"Compiled the kernel for CPUs: {', '.join(record['variants'])}")
        else:
            self.app.display_warning(f"{record['output']}\nNo kernel for CPUs: {record['why']}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The wheel holds what was compiled."""
        if version != "editable":
            self.scratch.cleanup()
