"""sdt_h_tiny, forward and training step, against the same model with other backends and without decay.

    python -m benchmarks.models               # 224 x 224, batch 8, CPU; results in outputs/benchmarks/models
    python -m benchmarks.models --profile     # and where the time of a training step goes, by operator

With timm installed, vit_tiny_patch16_224 runs alongside, for orientation: another model, with plain attention.
bfloat16 is under autocast.
"""

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import DTYPES, Row, command_line, format_table, machine, timing_columns, write_results
from benchmarks.timing import Call, interleaved, reasons
from spatial_decay import sdt_h_tiny
from spatial_decay.models.sdt_h import SDTHOptions
from spatial_decay.ops import BACKENDS
from spatial_decay.ops.inputs import Inputs

FLOOR = "decays none"
SAME_LAYOUT = "plain SDPA in its place"
PEER = "vit_tiny_patch16_224"
QUICK: SDTHOptions = {"depths": (1, 1, 1, 1)}
PASSES = ("forward", "training step")
NUM_CLASSES = 1000


class _Plain:
    """A backend that leaves the decay out: the price of gates, rows and columns, and nothing added to the scores."""

    def unsupported_reasons(self, inputs: Inputs) -> list[str]:  # noqa: ARG002
        return []

    avoid_reasons = unsupported_reasons

    def attention(self, inputs: Inputs) -> Tensor:
        return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, scale=inputs.scale)


def builders(image_size: int, options: SDTHOptions) -> dict[str, Callable[[], nn.Module]]:
    """The models, by name; options are of all sdt_h_tiny."""

    def sdt(backend: str) -> Callable[[], nn.Module]:
        return lambda: sdt_h_tiny(NUM_CLASSES, **(options | {"backend": backend}))

    without: SDTHOptions = options | {"decays": ("none",) * 4}
    found: dict[str, Callable[[], nn.Module]] = {FLOOR: lambda: sdt_h_tiny(NUM_CLASSES, **without)}
    found |= {("sdt_h_tiny " + name): sdt(name) for name in ("auto", *BACKENDS) if name != SAME_LAYOUT}
    found[SAME_LAYOUT] = sdt(SAME_LAYOUT)
    if importlib.util.find_spec("timm"):
        timm = importlib.import_module("timm")
        found[f"timm {PEER}"] = lambda: timm.create_model(PEER, num_classes=NUM_CLASSES, img_size=image_size)
    return found


def make_call(build: Callable[[], nn.Module], which: str, images: Tensor, dtype: torch.dtype) -> Call:
    """One pass of a model of its own, from the same seed."""
    torch.manual_seed(0)
    model = build().to(images.device)
    labels = torch.arange(len(images), device=images.device) % NUM_CLASSES
    autocast = torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def forward() -> Tensor:
        with torch.no_grad(), autocast:
            return model(images)

    if which == PASSES[0]:
        model.eval()
        return forward
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def measure(which: str, images: Tensor, dtype: torch.dtype, arguments: argparse.Namespace) -> list[Row]:
    """One pass of all models; one that cannot run has a note in place of numbers."""
    quick = arguments.quick
    if not quick:
        torch.compiler.reset()  # a function is compiled for a few shapes only, then no more
    calls: dict[str, Call] = {}
    notes: dict[str, str] = {}
    models = builders(images.shape[-1], QUICK if quick else {})
    for name, build in models.items():
        if quick and name == "sdt_h_tiny flex":
            notes[name] = "left out by --quick"
            continue
        call = make_call(build, which, images, dtype)
        try:
            call()
        except RuntimeError as error:  # NotImplementedError, out of memory and failures to compile are among them
            notes[name] = reasons(error)
        else:
            calls[name] = call
    rounds, warmup = (1, 0) if quick else (arguments.rounds, 1)
    timings = interleaved(calls, FLOOR, rounds=rounds, device=images.device, warmup=warmup, min_seconds=0)
    rows: list[Row] = []
    for name in models:
        timing = timings.get(name)
        images_per_second = len(images) / timing.seconds if timing else None
        row: Row = {"pass": which, "model": name, "images/s": images_per_second}
        rows.append(row | timing_columns(timing) | {"note": notes.get(name, "")})
    if f"timm {PEER}" not in models:
        row = {"pass": which, "model": f"timm {PEER}", "images/s": None}
        rows.append(row | timing_columns(None) | {"note": "timm is not installed"})
    return rows


def profile_step(images: Tensor, dtype: torch.dtype) -> str:
    """torch.profiler's table of a training step of sdt_h_tiny with backend auto, by operator."""
    step = make_call(lambda: sdt_h_tiny(NUM_CLASSES), PASSES[1], images, dtype)
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
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--profile", action="store_true", help="print and write where a training step's time goes")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    batch_size, size = (2, 64) if arguments.quick else (arguments.batch_size, arguments.image_size)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    images = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    where = machine(device, arguments.dtype) | {"images": f"{batch_size} of {size} x {size}"}
    rows: list[Row] = []
    BACKENDS[SAME_LAYOUT] = _Plain()  # behind the others, so that auto does not see it
    try:
        for which in PASSES:
            new = measure(which, images, dtype, arguments)
            print(f"\n{format_table(new)}", flush=True)
            rows += new
    finally:
        del BACKENDS[SAME_LAYOUT]
    write_results(arguments.output, "Whole models", ABOUT, rows, where, by=["pass"])
    if arguments.profile:
        table = profile_step(images, dtype)
        print(table)
        (arguments.output / "profile.txt").write_text(table, encoding="utf-8")
    return rows


ABOUT = f"""`ratio` is to `{FLOOR}` in the same round: median (quartiles). That is the same model with kind `none` in
every stage, and so with attention over all tokens where the first two stages of sdt_h_tiny have rows, then columns.
`{SAME_LAYOUT}` is sdt_h_tiny as it is, gates, rows and columns included, with nothing added to the scores.
A training step is forward, loss, backward and AdamW; forward is in eval mode without autograd."""

if __name__ == "__main__":
    main()
