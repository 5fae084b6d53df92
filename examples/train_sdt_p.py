"""Train SDT-P on latents of ImageNet by the paper's recipe: AdamW, 1e-4, batch 256, EMA 0.9999, 400,000 steps.

    python examples/train_sdt_p.py --latents latents/ --out runs/small                    # one process
    torchrun --nproc-per-node 8 examples/train_sdt_p.py --latents latents/ --out runs/xl --model sdt_p_xlarge \\
        --parallel fsdp --grad-checkpointing --compile --resume                           # FSDP2 instead of DDP
    ... --parallel fsdp --tensor-parallel 4                # besides, heads and MLPs split over 4 processes

latent_folder.py says what the folder of latents holds. They are trained on as they are: multiply those of Stable
Diffusion's VAE by 0.18215 when you write them. All is checked before anything is trained or written.

--resume goes on from the newest complete checkpoint in --out, on any number of processes, split in any way; without one
it starts from the beginning, so that a job which is started again may always pass it. Other settings are an error, and
so are a checkpoint that is not as it was written and a second run in the same --out: nothing is changed then.

Which latents, noise, timesteps and dropped labels a step sees depends on the seed, the step and the place in the
global batch alone. So the losses are the same on one process and on many, under DDP and FSDP2 (to rounding), and on a
CPU a run that was killed and resumed on as many processes repeats the unbroken one bit for bit.

Differs from DiT, whose recipe this is: the model predicts the noise alone (learn_sigma=False), by the plain mean
squared error. DiT also learns variances, by a variational bound whose gradient stops at the predicted noise: leaving
them out leaves the noise's own objective as it is, and a sampler must take a fixed variance.

Needs the extra [demo]. Run so far on CPU with gloo only: the paths for CUDA and NCCL have not been run.
"""

import argparse
import copy
import functools
import json
import math
import os
import time
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

import checkpoint_folder
from checkpoint_folder import Checkpoint
from command_line import at_least, folder, number
from latent_folder import NUM_TIMESTEPS, LatentFolder, load_batches
from spatial_decay import SDTP, kinds, sdt_p_base, sdt_p_large, sdt_p_small, sdt_p_xlarge
from spatial_decay.integrations.parallel import sharding_plan, tensor_plan

MODELS = {build.__name__: build for build in (sdt_p_small, sdt_p_base, sdt_p_large, sdt_p_xlarge)}


def build_model(arguments: argparse.Namespace, latent_shape: Sequence[int]) -> SDTP:
    """The same weights on every process."""
    channels, height, width = latent_shape
    if height % arguments.patch_size or width % arguments.patch_size:
        raise ValueError(
            f"height and width of latents must be multiples of --patch-size {arguments.patch_size}: got {height} x "
            f"{width}. Pass another, or write other latents."
        )
    torch.manual_seed(arguments.seed)
    size = {name: getattr(arguments, name) for name in ("dim", "depth", "num_heads")}
    model = MODELS[arguments.model](
        (height, width),
        arguments.patch_size,
        channels,
        arguments.num_classes,
        decay=arguments.decay,
        class_dropout_prob=arguments.class_dropout_prob,
        learn_sigma=False,
        **{name: value for name, value in size.items() if value is not None},
    )
    model.class_dropout_prob = 0.0  # Places drops labels, the same on any number of processes
    return model


def parallelize(model: SDTP, arguments: argparse.Namespace, device: torch.device) -> nn.Module:
    """What to call in the model's place: it has the same parameters (DDP), or is the model, now sharded (FSDP2)
    and, with --tensor-parallel, with its heads split over so many processes."""
    if arguments.parallel == "ddp":
        return DistributedDataParallel(model.to(device), device_ids=[device] if device.type == "cuda" else None)
    # The model's output is a view, which nothing here changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    tensor = arguments.tensor_parallel
    mesh = init_device_mesh(device.type, (dist.get_world_size() // tensor, tensor), mesh_dim_names=("dp", "tp"))
    if tensor > 1:
        parallelize_module(model, mesh["tp"], tensor_plan(model, mesh["tp"]))
    for modules, policy in sharding_plan(model, param_dtype=torch.bfloat16 if arguments.precision == "bf16" else None):
        fully_shard(modules, mesh=mesh["dp"], mp_policy=policy)
    return model


def start_processes() -> torch.device:
    """Join the processes that torchrun started, or be the only one; the device of this one."""
    alone: dict[str, Any] = {}
    if "RANK" not in os.environ:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", **alone)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, **alone)
    return device


def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Weights of ema <- decay * themselves + (1 - decay) * the model's; each process those of its own shards."""
    old, new = (
        [p.to_local() if isinstance(p, DTensor) else p for p in map(Tensor.detach, module.parameters())]
        for module in (ema, model)
    )
    get_ema_multi_avg_fn(decay)(old, new, 0)


def training_state(model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """By the names of SDTP, whatever wraps it."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "ema": get_model_state_dict(ema)}


def load_training_state(
    checkpoint: Checkpoint, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """From however many processes wrote it."""
    state = training_state(model, ema, optimizer)
    checkpoint_folder.load(checkpoint, state)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    set_model_state_dict(ema, state["ema"])


def newest_checkpoint(arguments: argparse.Namespace, settings: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint to go on from; None to start from the beginning."""
    out = arguments.out
    paths = checkpoint_folder.complete(out)
    before = [*paths[-1:], *filter(Path.exists, (out / "ema.safetensors", out / "losses.csv"))]
    if before and not arguments.resume:
        raise ValueError(f"--out must be new: got a run with {before[0]}. Pass --resume to go on, or another --out.")
    newest = checkpoint_folder.newest(out)
    if newest is None:
        if (out / "ema.safetensors").exists():
            raise ValueError(
                f"{out} must have checkpoints to go on from: got a finished run without any. Pass another --out."
            )
        return None
    if newest.step > arguments.steps:
        raise ValueError(
            f"--steps must be >= {newest.step}, where {newest.path} is already: got {arguments.steps}. Pass more."
        )
    saved = newest.settings
    names = [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
    if names:
        changed = "; ".join(f"{name}: {saved.get(name)!r} there, {settings.get(name)!r} here" for name in names)
        raise ValueError(
            f"a run must be resumed with its own settings: {newest.path} has others: {changed}. Pass those, or another "
            "--out."
        )
    return newest


def prepare_output(out: Path, losses: list[float], every: int) -> None:
    """Leave nothing behind of what came after the checkpoint."""
    (out / "checkpoints").mkdir(exist_ok=True)
    checkpoint_folder.clean(out)
    incomplete = out / "losses.incomplete"
    checkpoint_folder.write_losses(incomplete, losses, every)
    incomplete.replace(out / "losses.csv")


def save_ema(path: Path, ema: SDTP) -> None:
    """Whole, for spatial_decay.load_checkpoint, with the arguments of SDTP as "config" in the metadata."""
    state = get_model_state_dict(ema, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        incomplete = path.with_suffix(".incomplete")
        weights = {name: weight.contiguous() for name, weight in state.items() if isinstance(weight, Tensor)}
        save_file(weights, incomplete, metadata={"config": json.dumps(ema.config)})
        incomplete.replace(path)
    dist.barrier()


def train(arguments: argparse.Namespace, latents: LatentFolder, model: SDTP, device: torch.device) -> None:
    """Steps, losses.csv and checkpoints until --steps, then ema.safetensors."""
    rank, world, out, every = dist.get_rank(), dist.get_world_size(), arguments.out, arguments.log_every
    same = ("precision", "batch_size", "lr", "weight_decay", "ema_decay", "log_every", "seed")
    settings = {name: getattr(arguments, name) for name in same} | model.config
    settings |= {
        "latents": [len(latents), *latents.shape],
        "labels_crc32": zlib.crc32(latents.labels.numpy().tobytes()),
    }
    resumed = checkpoint_folder.on_first_process(lambda: newest_checkpoint(arguments, settings))
    start, losses = (resumed.step, resumed.losses) if resumed else (0, [])

    ema = copy.deepcopy(model).requires_grad_(requires_grad=False)
    parallelize(ema, arguments, device) if arguments.parallel == "fsdp" else ema.to(device)
    model.set_grad_checkpointing(arguments.grad_checkpointing)
    if arguments.compile:
        for block in model.blocks:  # the forward alone: FSDP2's hooks stay outside
            block.forward = torch.compile(block.forward)
    parallel = parallelize(model, arguments, device).train()
    groups = param_groups_weight_decay(model, arguments.weight_decay)  # not of biases and norms
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr)
    if resumed:
        if rank == 0:
            print(f"{resumed.path / '.metadata'} is a pickle: what no checkpoint needs is not read from it", flush=True)
        load_training_state(resumed, parallel, ema, optimizer)
    if rank == 0:
        prepare_output(out, losses, every)
        print(f"resumed from {resumed.path}" if resumed else "starting from the beginning", flush=True)
        print(f"{world} x {device.type}, {arguments.parallel}, {arguments.precision}", flush=True)

    shares = world // arguments.tensor_parallel  # processes that split heads have the same latents
    size, place = arguments.batch_size // shares, rank // arguments.tensor_parallel
    steps = range(start, arguments.steps)
    batches = load_batches(latents, arguments, range(place * size, (place + 1) * size), steps)
    scheduler = DDPMScheduler(NUM_TIMESTEPS, beta_schedule="linear")
    is_autocast = arguments.precision == "bf16" and arguments.parallel == "ddp"  # FSDP2 has its policy
    total, began = torch.zeros((), device=device), time.perf_counter()
    for step, batch in zip(steps, batches, strict=True):
        x, noise, timesteps, labels = (part.to(device, non_blocking=True) for part in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_autocast):
            predicted = parallel(scheduler.add_noise(x, noise, timesteps), timesteps, labels)
        loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, arguments.ema_decay)
        total += loss.detach() / (world * every)
        done = step + 1
        if done % every == 0:
            dist.all_reduce(total)
            mean = total.item()
            total.zero_()
            if not math.isfinite(mean):
                raise RuntimeError(
                    f"the loss must be finite: got {mean} between steps {done - every + 1} and {done}. Start again "
                    "with a smaller --lr or --precision fp32."
                )
            losses.append(mean)
            if rank == 0:
                with (out / "losses.csv").open("a", encoding="utf-8") as file:
                    file.write(f"{done},{mean!r}\n")
                speed = (done - start) / (time.perf_counter() - began)
                print(f"step {done} of {arguments.steps}, loss {mean:.4f}, {speed:.2f} steps/s", flush=True)
        if done % arguments.checkpoint_every == 0 or done == arguments.steps:
            checkpoint_folder.save(out, done, training_state(parallel, ema, optimizer), settings, losses)
    save_ema(out / "ema.safetensors", ema)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    count, share = at_least(1), functools.partial(number, below=1.0)
    parser = argparse.ArgumentParser(description="Train SDT-P on a folder of latents.")
    parser.add_argument("--latents", type=Path, required=True, help="folder of NAME.npy or NAME.safetensors")
    parser.add_argument(
        "--out", type=folder, required=True, help="folder for losses, checkpoints and EMA weights, of one run"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest complete checkpoint, if any; no code in it is run"
    )
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="(default: ddp)")
    parser.add_argument("--tensor-parallel", type=count, default=1, help="processes that split heads (default: 1)")
    parser.add_argument("--model", choices=MODELS, default="sdt_p_small", help="(default: sdt_p_small)")
    parser.add_argument("--decay", choices=kinds.KINDS, default="full", help="kind of decay (default: full)")
    parser.add_argument("--patch-size", type=count, default=2, help="(default: 2)")
    parser.add_argument("--num-classes", type=count, default=1000, help="(default: 1000)")
    for name in ("dim", "depth", "num-heads"):
        parser.add_argument(f"--{name}", type=count, help="instead of the model's own")
    parser.add_argument("--class-dropout-prob", type=share, default=0.1, help="labels dropped (default: 0.1)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="(default: bf16 on CUDA, else fp32)")
    parser.add_argument("--grad-checkpointing", action="store_true", help="trade time for memory")
    parser.add_argument("--compile", action="store_true", help="the blocks, with torch.compile")
    parser.add_argument("--steps", type=count, default=400_000, help="in all (default: 400000)")
    parser.add_argument("--batch-size", type=count, default=256, help="of all processes together (default: 256)")
    parser.add_argument("--workers", type=at_least(0), default=4, help="of each process, for batches (default: 4)")
    parser.add_argument("--lr", type=number, default=1e-4, help="(default: 1e-4)")
    parser.add_argument("--weight-decay", type=number, default=0.0, help="(default: 0)")
    parser.add_argument("--ema-decay", type=share, default=0.9999, help="(default: 0.9999)")
    parser.add_argument("--checkpoint-every", type=count, default=10_000, help="steps (default: 10000)")
    parser.add_argument("--log-every", type=count, default=100, help="steps, whose mean is logged (default: 100)")
    parser.add_argument("--seed", type=count, default=1, help="(default: 1)")
    arguments = parser.parse_args(argv)
    arguments.precision = arguments.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    for name in ("steps", "checkpoint_every"):
        if getattr(arguments, name) % arguments.log_every:
            parser.error(
                f"--{name.replace('_', '-')} must be a multiple of --log-every {arguments.log_every}: "
                f"got {getattr(arguments, name)}"
            )
    if arguments.parallel == "fsdp" and not (torch.cuda.is_available() or hasattr(torch.cpu.Stream, "record_event")):
        parser.error(f"--parallel fsdp needs torch >= 2.7 on a CPU: got {torch.__version__}. Pass --parallel ddp")
    world, tensor = int(os.environ.get("WORLD_SIZE", "1")), arguments.tensor_parallel
    if world % tensor or (tensor > 1 and arguments.parallel == "ddp"):
        parser.error(
            f"--tensor-parallel must divide the {world} processes, with --parallel fsdp: got {tensor} and "
            f"{arguments.parallel}"
        )
    if arguments.batch_size % (world // tensor):
        parser.error(f"--batch-size must be a multiple of the {world // tensor} processes: got {arguments.batch_size}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = parse_arguments(argv)
    latents = LatentFolder(arguments.latents, arguments.num_classes)
    model = build_model(arguments, latents.shape)
    device = start_processes()
    try:
        with checkpoint_folder.held(arguments.out):
            train(arguments, latents, model, device)
    finally:
        time.sleep(0.1)  # before torch 2.8 it deadlocks if gloo's threads still hold tensors (pytorch/pytorch#154976)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
