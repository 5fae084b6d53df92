"""Whole models, forward and training step, against the same model with other backends and without decay.

    python -m benchmarks.models               # 224 x 224, batch 8, CPU; results in outputs/benchmarks/models
    python -m benchmarks.models --profile     # and where the time of a training step goes, by operator

With timm installed, its vit_tiny_patch16_224 runs too: alongside sdt_h_tiny, for orientation, another model with plain
attention; and with decay put into it by swap_attention, against itself.
bfloat16 is under autocast.
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

from benchmarks.attention import AUTOTUNED
from benchmarks.report import DTYPES, Row, command_line, format_table, machine, timing_columns, write_results
from benchmarks.timing import Call, interleaved, reasons
from spatial_decay import models, sdt_h_tiny, sdt_p_small, swap_attention
from spatial_decay.decay import GaussianDecay, dense
from spatial_decay.layers.kinds import DecayLike
from spatial_decay.ops import BACKENDS
from spatial_decay.ops.inputs import Inputs

FLOOR = "decay none"
IN_ITS_PLACE = "plain SDPA in its place"
AUTHORS = "authors' formulas"
PEER = "timm vit_tiny_patch16_224"
SWAPPED = "timm_vit_tiny_swapped"
PASSES = ("forward", "training step")
NUM_CLASSES = 1000


class _Plain:
    """A backend that leaves the decay out: the price of gates, rows and columns, and nothing added to the scores."""

    def unsupported_reasons(self, inputs: Inputs) -> list[str]:  # noqa: ARG002
        return []

    avoid_reasons = unsupported_reasons

    def attention(self, inputs: Inputs) -> Tensor:
        return F.scaled_dot_product_attention(*inputs.sequences(), scale=inputs.scale)


class _Authors(_Plain):
    """The formulas step by step, as the authors' code has them: all L x L pairs, in memory.

    RMT: mask, sum, softmax, product. LocAtViT: an exponential for each query and key, then SDPA with that mask.
    """

    def attention(self, inputs: Inputs) -> Tensor:
        (q, k, v), decay = inputs.sequences(), inputs.decay
        assert decay is not None
        if isinstance(decay, GaussianDecay):
            mask = _gaussian_mask(decay)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), scale=inputs.scale)
        scores = (q * inputs.scale) @ k.transpose(-2, -1) + dense(decay, dtype=q.dtype)
        return scores.softmax(-1) @ v


def _gaussian_mask(decay: GaussianDecay) -> Tensor:
    grid = decay.layout.as_grid("LocAtViT's Gaussian")
    num_prefix = grid.num_prefix_tokens
    amplitude, *variances = (number[..., num_prefix:, None] for number in decay.numbers)  # (B, N, H*W, 1)
    position = torch.stack(grid.positions(device=amplitude.device, dtype=amplitude.dtype), -1)  # (H*W, 2)
    numerator = -0.5 * (position[:, None] - position) ** 2  # (H*W, H*W, 2)
    mask = amplitude * (numerator / torch.stack(variances, -1)).sum(-1).exp()
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
    model: nn.Module = importlib.import_module("timm").create_model(PEER[5:], num_classes=num_classes, **options)
    if decay != "none":
        swap_attention(model, decay, backend=backend)
    return model


@dataclass(frozen=True)
class Model:
    """How to build one, for a backend and without decay; quick: keywords that make it small."""

    build: Callable[..., nn.Module]
    without: dict[str, Any]
    quick: dict[str, Any]
    any_size: bool = True  # a ViT is told the image size
    run: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] = classify
    has_authors_code: bool = True


MODELS = {
    "sdt_h_tiny": Model(sdt_h_tiny, {"decay": ("none",) * 4}, {"depths": (1, 1, 1, 1)}, has_authors_code=False),
    "rmt_tiny": Model(models.rmt_tiny, {"decay": ("none",) * 4}, {"depths": (1, 1, 1, 1)}),
    "locatvit_tiny": Model(models.locatvit_tiny, {"decay": "none"}, {"depth": 1}, any_size=False),
    "sdt_p_small": Model(
        partial(sdt_p_small, 32, 2, 4), {"decay": "none"}, {"depth": 1}, run=denoise, has_authors_code=False
    ),
}
if importlib.util.find_spec("timm"):
    MODELS[SWAPPED] = Model(swapped_vit_tiny, {"decay": "none"}, {"depth": 1}, any_size=False, has_authors_code=False)


def builders(name: str, image_size: int, *, quick: bool) -> dict[str, Callable[[], nn.Module]]:
    """The contenders of one model, by name."""
    model = MODELS[name]
    options = (model.quick if quick else {}) | ({} if model.any_size else {"img_size": image_size})

    def build(**more: Any) -> Callable[[], nn.Module]:
        return lambda: model.build(NUM_CLASSES, **(options | more))

    found = {FLOOR: build(**model.without)} | {
        backend: build(backend=backend) for backend in ("auto", *BACKENDS) if backend not in AUTOTUNED
    }
    if not model.has_authors_code:
        found.pop(AUTHORS, None)
    if name == "sdt_h_tiny" and importlib.util.find_spec("timm"):
        timm = importlib.import_module("timm")
        found[PEER] = lambda: timm.create_model(PEER[5:], num_classes=NUM_CLASSES, img_size=image_size)
    return found


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
    contenders = builders(name, images.shape[-1], quick=quick)
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
    timings = interleaved(calls, FLOOR, rounds=rounds, device=images.device, warmup=warmup, min_seconds=0)
    rows: list[Row] = []
    for contender in contenders:
        timing = timings.get(contender)
        images_per_second = len(images) / timing.seconds if timing else None
        row: Row = {"model": name, "pass": which, "contender": contender, "images/s": images_per_second}
        rows.append(row | timing_columns(timing) | {"note": notes.get(contender, "")})
    if name == "sdt_h_tiny" and PEER not in contenders:
        row = {"model": name, "pass": which, "contender": PEER, "images/s": None}
        rows.append(row | timing_columns(None) | {"note": "timm is not installed"})
    return rows


def profile_step(images: Tensor, dtype: torch.dtype, *, quick: bool) -> str:
    """torch.profiler's table of a training step of sdt_h_tiny with backend auto, by operator."""
    build = builders("sdt_h_tiny", images.shape[-1], quick=quick)["auto"]
    step = make_call("sdt_h_tiny", build, PASSES[1], images, dtype)
    step()
    on_cuda = images.is_cuda
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_cuda
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if on_cuda:
            torch.cuda.synchronize(images.device)
    sort_by = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=sort_by, row_limit=20, max_name_column_width=60)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line; the rows of results.csv."""
    parser = command_line(__doc__.splitlines()[0], "models", rounds=7)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--profile", action="store_true", help="print and write where a training step's time goes")
    arguments = parser.parse_args(argv)
    names = arguments.models.split(",")
    if unknown := set(names) - set(MODELS):
        parser.error(f"argument --models: choose from {', '.join(MODELS)}: got {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    batch_size, size = (2, 64) if arguments.quick else (arguments.batch_size, arguments.image_size)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    images = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    where = machine(device, arguments.dtype) | {"images": f"{batch_size} of {size} x {size}"}
    rows: list[Row] = []
    BACKENDS[IN_ITS_PLACE], BACKENDS[AUTHORS] = (
        _Plain(),
        _Authors(),
    )  # behind the others, so that auto does not see them
    try:
        for name in names:
            for which in PASSES:
                new = measure(name, which, images, dtype, arguments)
                print(f"\n{format_table(new)}", flush=True)
                rows += new
    finally:
        del BACKENDS[IN_ITS_PLACE], BACKENDS[AUTHORS]
    write_results(arguments.output, "Whole models", ABOUT, rows, where, by=["model", "pass"])
    if arguments.profile:
        table = profile_step(images, dtype, quick=arguments.quick)
        print(table)
        (arguments.output / "profile.txt").write_text(table, encoding="utf-8")
    return rows


ABOUT = f"""`ratio` is to `{FLOOR}` in the same round: median (quartiles). That is the same model with kind `none` in
every stage, and so with attention over all tokens where the first two stages of sdt_h_tiny and rmt_tiny have rows, then
columns. `{IN_ITS_PLACE}` is the model as it is, gates, rows and columns included, with nothing added to the scores.
`{AUTHORS}`: written after RMT's and LocAtViT's code, all L x L pairs in memory; the layers around them are ours.
`sdt_p_small` denoises latents of 4 channels and 32 x 32, patch 2. `{SWAPPED}`: `{FLOOR}` is timm's model as it is.
A training step is forward, loss, backward and AdamW; forward is in eval mode without autograd."""

if __name__ == "__main__":
    main()
