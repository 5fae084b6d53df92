"""What the plans for several processes divide: numbers of a process and of a layer by count, and peak memory.

    python -m benchmarks.parallel             # counts, for one process of many; nothing is sent
    python -m benchmarks.parallel --memory    # runs one step of training on 1, 2 and 4 processes with gloo

Memory is the peak of resident memory above that of the process before it builds the model (Linux).
"""

import argparse
import ctypes
import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import spatial_decay as sd
from spatial_decay.integrations.parallel import sharding_plan, tensor_plan

MESHES = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 4: [(1, 4), (4, 1), (2, 2)], 8: [(1, 8), (8, 1), (2, 4)]}
"""Number of processes -> (shards, parts of heads)."""


def on_mesh(model: nn.Module, dp: int, tp: int) -> nn.Module:
    """Split over tp processes, then sharded over dp."""
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    if tp > 1:
        parallelize_module(model, mesh["tp"], tensor_plan(model, mesh["tp"]))
    if dp > 1:
        for modules, policy in sharding_plan(model):
            fully_shard(modules, mesh=mesh["dp"], mp_policy=policy)
    return model


def own_numbers(model: nn.Module) -> int:
    """Parameters that lie on this process."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())


def count(models: list[str]) -> None:
    """A table of parameters a process; weights, gradients and AdamW's moments are four numbers of 4 bytes each."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    print("| model | shards x parts of heads | million parameters a process | GB with gradients and moments |")
    print("|---|---|---|---|")
    for name in models:
        for world, meshes in MESHES.items():
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
            for dp, tp in meshes:
                with torch.device("meta"):
                    model = getattr(sd, name)()
                number = own_numbers(on_mesh(model, dp, tp))
                print(f"| `{name}` | {dp} x {tp} | {number / 1e6:.1f} | {number * 16 / 1e9:.2f} |")
            dist.destroy_process_group()


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def step(folder: str, rank: int, dp: int, tp: int) -> int:
    """Peak memory of one step of training on this process, above that before."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=dp * tp)
    before = status("VmRSS")
    with torch.device("meta"):
        model = sd.SDTP(32, num_classes=10, dim=512, depth=6, num_heads=8, class_dropout_prob=0.0)
    on_mesh(model, dp, tp).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).fill_(0.01)
    model.set_grad_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    size = 4 // dp
    for _ in range(2):  # AdamW makes its moments in the first
        x, t, y = torch.zeros(size, 4, 32, 32), torch.zeros(size), torch.zeros(size, dtype=torch.long)
        model(x, t, y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    peak = status("VmHWM") - before
    dist.destroy_process_group()
    return peak


def measure() -> None:
    """A table of peak memory a process, the largest of all."""
    print("| processes: shards x parts of heads | peak memory a process, MB |")
    print("|---|---|")
    for world in (1, 2, 4):
        for dp, tp in MESHES[world]:
            with tempfile.TemporaryDirectory() as folder:
                children = []
                for rank in range(world):
                    children.append(os.fork())
                    if not children[-1]:
                        Path(folder, f"{rank}.txt").write_text(str(step(folder, rank, dp, tp)))
                        os._exit(0)
                if any([os.waitpid(child, 0)[1] for child in children]):  # noqa: C419  all must end
                    raise SystemExit(1)
                peak = max(int(path.read_text()) for path in Path(folder).glob("*.txt"))
            print(f"| {dp} x {tp} | {peak / 1e6:.0f} |", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Counts and memory of the plans for several processes.")
    parser.add_argument("--memory", action="store_true", help="measure a step, rather than count")
    parser.add_argument("--models", nargs="+", default=["sdt_p_xlarge"], help="of spatial_decay, to count")
    arguments = parser.parse_args()
    if arguments.memory:
        measure()
    else:
        count(arguments.models)


if __name__ == "__main__":
    main()
