"""Whole models, forward and training step, against the same model with other backends and without decay.

    python -m benchmarks.models               # 224 x 224, batch 8, CPU; results in outputs/benchmarks/models
    python -m benchmarks.models --profile     # and where the time of a training step goes, by operator
    python -m benchmarks.models --models sdt_h_tiny,sdt_p_small --backends auto,sdpa,flex

On two idle cores the first takes some 5 minutes. timm's vit_tiny_patch16_224, where timm is installed, gets its decay
by swap_attention and is held against itself. bfloat16 is under autocast.
"""

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import gaussian_mask
from benchmarks.report import DTYPES, Row, command_line, format_table, machine, timing_columns, write_results
from benchmarks.timing import Call, busy_seconds, interleaved, operator_table, reasons
from spatial_decay import models, sdt_h_tiny, sdt_p_small, swap_attention
from spatial_decay.decay import GaussianDecay, dense
from spatial_decay.layers.kinds import DecayLike
from spatial_decay.ops import BACKENDS
from spatial_decay.ops.inputs import Inputs

WITHOUT = "decay none"
IN_ITS_PLACE = "plain SDPA in its place"
AUTHORS = "authors' formulas"
SWAPPED = "timm_vit_tiny_swapped"
PASSES = ("forward", "training step")
NUM_CLASSES = 1000
BACKENDS_OF = {"cpu": "auto,native,tiled", "cuda": "auto,triton,sdpa,math"}


class Plain:
    """A backend that leaves the decay out: the price of gates, rows and columns, and nothing added to the scores."""

    def unsupported_reasons(self, inputs: Inputs) -> list[str]:  # noqa: ARG002
        return []

    avoid_reasons = unsupported_reasons

    def attention(self, inputs: Inputs) -> Tensor:
        return F.scaled_dot_product_attention(*inputs.sequences(), scale=inputs.scale)


class _Authors(Plain):
    """The formulas step by step, as the authors' code has them: all L x L pairs, in memory.

    RMT: mask, sum, softmax, product. LocAtViT: an exponential for each query and key, then SDPA with that mask.
    """

    def attention(self, inputs: Inputs) -> Tensor:
        (q, k, v), decay = inputs.sequences(), inputs.decay
        assert decay is not None
        if isinstance(decay, GaussianDecay):
            mask = _mask_of(decay)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), scale=inputs.scale)
        scores = (q * inputs.scale) @ k.transpose(-2, -1) + dense(decay, dtype=q.dtype)
        return scores.softmax(-1) @ v


def _mask_of(decay: GaussianDecay) -> Tensor:
    grid = decay.layout.as_grid("LocAtViT's Gaussian")
    num_prefix = grid.num_prefix_tokens
    numbers = tuple(number[..., num_prefix:] for number in decay.numbers)  # (B, N, H*W)
    position = torch.stack(grid.positions(device=numbers[0].device, dtype=numbers[0].dtype), -1)  # (H*W, 2)
    mask = gaussian_mask(numbers, -0.5 * (position[:, None] - position) ** 2)
    return F.pad(mask, (num_prefix, 0, num_prefix, 0))


def classify(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and loss."""
    logits = model(images)
    return logits, F.cross_entropy(logits, torch.arange(len(images), device=images.device) % NUM_CLASSES)


def denoise(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Noise and loss, on latents of 4 channels and 32 x 32, cut out of the images."""
    latents = F.pad(images[..., :32, :32], (0, 0, 0, 0, 0, 1))
    numbers = torch.arange(len(images), device=images.device)
    noise = model(latents, numbers, numbers % NUM_CLASSES)
    return noise, F.mse_loss(noise[:, :4].float(), latents)


def swapped_vit_tiny(
    num_classes: int, *, decay: DecayLike = "full", backend: Any = "auto", **options: Any
) -> nn.Module:
    """timm's ViT after swap_attention; with decay "none", before."""
    model: nn.Module = importlib.import_module("timm").create_model(
        "vit_tiny_patch16_224", num_classes=num_classes, **options
    )
    if decay != "none":
        swap_attention(model, decay, backend=backend)
    return model


@dataclass(frozen=True)
class Model:
    """How to build one for a backend, and what it is held against; quick: keywords that make it small."""

    build: Callable[..., nn.Module]
    floor: str
    quick: dict[str, Any]
    any_size: bool = True  # a ViT is told the image size
    run: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] = classify


_ONE_LAYER_A_STAGE = {"depths": (1, 1, 1, 1)}
MODELS = {
    SWAPPED: Model(swapped_vit_tiny, WITHOUT, {"depth": 1}, any_size=False),
    "sdt_h_tiny": Model(sdt_h_tiny, IN_ITS_PLACE, _ONE_LAYER_A_STAGE),
    "locatvit_tiny": Model(models.locatvit_tiny, AUTHORS, {"depth": 1}, any_size=False),
    "rmt_tiny": Model(models.rmt_tiny, AUTHORS, _ONE_LAYER_A_STAGE),
    "sdt_p_small": Model(partial(sdt_p_small, 32, 2, 4), IN_ITS_PLACE, {"depth": 1}, run=denoise),
}
if not importlib.util.find_spec("timm"):
    del MODELS[SWAPPED]


def builders(name: str, image_size: int, backends: Sequence[str], *, quick: bool) -> dict[str, Callable[[], nn.Module]]:
    """The contenders of one model, by name, the floor first."""
    model = MODELS[name]
    options = (model.quick if quick else {}) | ({} if model.any_size else {"img_size": image_size})

    def build(**more: Any) -> Callable[[], nn.Module]:
        return lambda: model.build(NUM_CLASSES, **(options | more))

    floor = build(decay="none") if model.floor == WITHOUT else build(backend=model.floor)
    others = [IN_ITS_PLACE] if model.floor == WITHOUT else []  # the price of gates alone
    return {model.floor: floor} | {backend: build(backend=backend) for backend in (*backends, *others)}


def make_call(name: str, build: Callable[[], nn.Module], which: str, images: Tensor, dtype: torch.dtype) -> Call:
    """One pass of a model of its own, from the same seed."""
    torch.manual_seed(0)
    model, run = build().to(images.device), MODELS[name].run
    autocast = torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def forward() -> Tensor:
        with torch.no_grad(), autocast:
            return run(model, images)[0]

    if which == PASSES[0]:
        model.eval()
        return forward
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        with autocast:
            _, loss = run(model, images)
        loss.backward()
        optimizer.step()

    return step


def measure(name: str, which: str, images: Tensor, dtype: torch.dtype, arguments: argparse.Namespace) -> list[Row]:
    """One pass of all contenders of a model; one that cannot run has a note in place of numbers."""
    quick = arguments.quick
    if not quick:
        torch.compiler.reset()  # a function is compiled for a few shapes only, then no more
    calls: dict[str, Call] = {}
    notes: dict[str, str] = {}
    floor, backends = MODELS[name].floor, arguments.backends.split(",")
    contenders = builders(name, images.shape[-1], backends, quick=quick)
    for contender, build in contenders.items():
        if quick and contender == "flex":
            notes[contender] = "left out by --quick"
            continue
        call = make_call(name, build, which, images, dtype)
        try:
            call()
        except Exception as error:  # a backend's reasons, out of memory, and whatever compilers raise
            notes[contender] = reasons(error)
        else:
            calls[contender] = call
    rounds, warmup = (1, 0) if quick else (arguments.rounds, 1)
    timings = interleaved(calls, floor, rounds=rounds, device=images.device, warmup=warmup, min_seconds=0)
    busy = {contender: busy_seconds(call, images.device) for contender, call in calls.items()}
    rows: list[Row] = []
    for contender in contenders:
        timing, of_gpu = timings.get(contender), busy.get(contender)
        images_per_second = len(images) / timing.seconds if timing else None
        row: Row = {"model": name, "pass": which, "contender": contender, "images/s": images_per_second}
        row |= timing_columns(timing) | {"GPU ms": of_gpu and 1000 * of_gpu}
        rows.append(row | {"note": notes.get(contender, "")})
    return rows


def profile_step(images: Tensor, dtype: torch.dtype, *, quick: bool) -> str:
    """torch.profiler's table of a training step of sdt_h_tiny with backend auto, by operator."""
    build = builders("sdt_h_tiny", images.shape[-1], ["auto"], quick=quick)["auto"]
    step = make_call("sdt_h_tiny", build, PASSES[1], images, dtype)
    step()
    return operator_table(step, images.device)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line; the rows of results.csv."""
    parser = command_line(__doc__.splitlines()[0], "models", rounds=5)
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--backends", help="comma-separated; where it is not given, those that matter on the device")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--profile", action="store_true", help="print and write where a training step's time goes")
    arguments = parser.parse_args(argv)
    names = arguments.models.split(",")
    if unknown := set(names) - set(MODELS):
        parser.error(f"argument --models: choose from {', '.join(MODELS)}: got {', '.join(sorted(unknown))}")
    arguments.backends = arguments.backends or BACKENDS_OF[arguments.device]
    if unknown := set(arguments.backends.split(",")) - {"auto", *BACKENDS}:
        known = ", ".join(["auto", *BACKENDS])
        parser.error(f"argument --backends: choose from {known}: got {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    batch_size, size = (2, 64) if arguments.quick else (arguments.batch_size, arguments.image_size)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    images = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    where = machine(device, arguments.dtype) | {"images": f"{batch_size} of {size} x {size}"}
    print("\n".join(f"{name}: {value}" for name, value in where.items()), flush=True)
    rows: list[Row] = []
    # Behind the others, so that auto does not see them.
    BACKENDS.update({IN_ITS_PLACE: Plain(), AUTHORS: _Authors()})
    try:
        for name in names:
            for which in PASSES:
                new = measure(name, which, images, dtype, arguments)
                print(f"\n{format_table(new)}", flush=True)
                rows += new
                write_results(arguments.output, "Whole models", ABOUT, rows, where, by=["model", "pass"])
    finally:
        del BACKENDS[IN_ITS_PLACE], BACKENDS[AUTHORS]
    if arguments.profile:
        table = profile_step(images, dtype, quick=arguments.quick)
        print(table)
        (arguments.output / "profile.txt").write_text(table, encoding="utf-8")
    return rows


ABOUT = f"""`ratio` is to the first contender in the same round: median (quartiles).
`{WITHOUT}`: timm's model as it is. `{IN_ITS_PLACE}`: the model as it is, gates, rows and columns included, with nothing
added to the scores. `{AUTHORS}`: written after RMT's and LocAtViT's code, all L x L pairs in memory; the layers around
them are ours. `sdt_p_small` denoises latents of 4 channels and 32 x 32, patch 2.
A training step is forward, loss, backward and AdamW; forward is in eval mode without autograd.
`GPU ms`: how long a GPU works at it. Where `ms` is far above, it waits for Python, which torch.compile's
mode="reduce-overhead" or a larger batch takes away."""

if __name__ == "__main__":
    main()
