"""What all tests share: a fixed seed, one thread a worker, Triton's interpreter, and why GPU tests did not run."""

import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.ptx.launch import Emulation

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    # When it is imported, Triton decides whether its own functions run in its interpreter. Whether ours do is decided
    # when they are imported, which is in ops/test_triton.py alone; tests/ptx imports both once more.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401  for what it does on import, see above

    del os.environ["TRITON_INTERPRET"]


# Workers of pytest-xdist share the cores, and so do the processes that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> "Callable[[int], Emulation]":
    """Makes backend="triton" run on CPU tensors as compiled for a GPU until the test ends: see tests/ptx.

    It takes the compute capability, 80 for 8.0.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install triton")
    from tests.ptx.launch import Emulation

    return lambda capability: Emulation(monkeypatch, capability)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
