"""What is installed here: versions, devices, the kernel for CPUs, and which backend runs where, and why not."""

import platform
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

import spatial_decay
from spatial_decay.command.check import devices, example
from spatial_decay.ops import explain_backend
from spatial_decay.ops.native import library

__all__ = ["lines"]

_OTHERS = ("einops", "triton", "timm", "transformers", "diffusers", "safetensors", "matplotlib")


def lines() -> Iterator[str]:
    """The report, to read and to put into bug reports; nothing in it tells of files or of users."""
    yield f"spatial-decay {spatial_decay.__version__}"
    yield f"Python {platform.python_version()}, {sys.platform} {platform.machine()}"
    yield ", ".join(f"{name} {_version(name)}" for name in ("torch", *_OTHERS))
    yield ""
    yield "Devices"
    yield f"  cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    yield f"  cuda: {_cuda()}"
    if torch.backends.mps.is_available():
        yield "  mps: Apple's GPU"
    yield ""
    yield "Kernel of backend native"
    yield f"  {library.reason() or 'is there; taken is the last of ' + ', '.join(library.variants())}"
    for device in devices():
        yield ""
        yield f"Backends on {device}, for 14 x 10 tokens in float32 with a gradient: auto takes"
        yield textwrap.indent(_explain(device), "  ")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return "; ".join(f"{one.name}, compute capability {one.major}.{one.minor}" for one in found)
    return "this torch was built without it" if torch.version.cuda is None else "torch sees no device"


def _explain(device: torch.device) -> str:
    q, k, v, decay, _ = example("full", torch.float32, device)
    return explain_backend(q, k, v, decay)
