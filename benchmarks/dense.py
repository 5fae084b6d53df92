"""Backbones at the size of detection: time and memory, forward and with gradients.

    python -m benchmarks.dense                        # CPU, some 10 minutes; results in outputs/benchmarks/dense
    python -m benchmarks.dense --profile sdt_h_tiny   # and where the time of its training pass goes, by operator

One image of 800 x 1344: COCO's 800 x 1333, padded to multiples of 32. A backbone gives the maps of its four stages.
Ours stand beside themselves with plain SDPA in place of attention with decay, and beside convolutional backbones of
timm, where it is installed.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks.models import IN_ITS_PLACE, Plain
from benchmarks.report import Row, command_line, format_table, machine, timing_columns, write_results
from benchmarks.timing import Call, interleaved, operator_table, peak_memory
from spatial_decay import models, sdt_h_tiny
from spatial_decay.ops import BACKENDS

CPU = torch.device("cpu")
PASSES = ("forward", "forward and backward")
CHECKPOINTING = "auto, checkpointing"
OURS: dict[str, Callable[..., models.SDTH]] = {"sdt_h_tiny": sdt_h_tiny, "rmt_tiny": models.rmt_tiny}
PEERS = ("convnext_nano", "resnet50") if importlib.util.find_spec("timm") else ()
CONTENDERS = {
    "sdt_h_tiny": (IN_ITS_PLACE, "auto", CHECKPOINTING, *PEERS),
    "rmt_tiny": (IN_ITS_PLACE, "auto", CHECKPOINTING),
}
"""Of each of ours, the floor first: a backend, or a backbone of timm."""


def build(name: str, contender: str) -> tuple[nn.Module, Callable[[Tensor], list[Tensor]]]:
    """A backbone with its first weights, and its maps of an image."""
    BACKENDS.setdefault(IN_ITS_PLACE, Plain())  # behind the others, so that auto does not see them
    torch.manual_seed(0)
    if contender in PEERS:
        timm = importlib.import_module("timm")
        peer: nn.Module = timm.create_model(contender, features_only=True, out_indices=(-4, -3, -2, -1))
        return peer, peer
    model = OURS[name](0, projection_dim=0, backend="auto" if contender == CHECKPOINTING else contender)
    model.set_grad_checkpointing(contender == CHECKPOINTING)
    return model, lambda image: model.forward_intermediates(image, intermediates_only=True)


def make_call(name: str, contender: str, which: str, height: int, width: int) -> Call:
    """One pass; a loss of all maps stands for a detector's heads."""
    model, maps_of = build(name, contender)
    image = torch.randn(1, 3, height, width)
    model.train(which == PASSES[1])

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return maps_of(image)

    def step() -> None:
        torch.stack([x.square().mean() for x in maps_of(image)]).sum().backward()
        model.zero_grad()  # behind it: what stands before the next call is no gradient

    return forward if which == PASSES[0] else step


def contenders_of(name: str, which: str) -> list[str]:
    """Of one pass of one of ours; nothing is computed again without a backward pass."""
    return [x for x in CONTENDERS[name] if which == PASSES[1] or x != CHECKPOINTING]


def measure(name: str, which: str, size: tuple[int, int], rounds: int, peaks: Mapping[str, int | None]) -> list[Row]:
    """The times of one pass of one of ours and of what it is held against, beside their peaks."""
    contenders = contenders_of(name, which)
    calls = {x: make_call(name, x, which, *size) for x in contenders}
    timings = interleaved(calls, IN_ITS_PLACE, rounds=rounds, device=CPU, warmup=0, min_seconds=0)
    rows: list[Row] = []
    for x in contenders:
        count = sum(p.numel() for p in build(name, x)[0].parameters()) / 1e6
        row: Row = {"model": name, "pass": which, "contender": x, "parameters, million": count}
        peak = peaks[x]
        rows.append(row | timing_columns(timings[x]) | {"peak MB": None if peak is None else peak / 1e6})
    return rows


def profile_step(name: str, size: tuple[int, int]) -> str:
    """torch.profiler's table of a pass with gradients of one of ours, by operator."""
    step = make_call(name, "auto", PASSES[1], *size)
    step()
    return operator_table(step, CPU)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line; the rows of results.csv."""
    parser = command_line(__doc__.splitlines()[0], "dense", rounds=3)
    parser.add_argument("--models", default=",".join(OURS), help=f"comma-separated, of {', '.join(OURS)}")
    parser.add_argument("--profile", choices=tuple(OURS), help="print and write where its time goes")
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu" or arguments.dtype != "float32":
        parser.error("argument --device, --dtype: this benchmark is for the CPU and float32")
    torch.set_num_threads(arguments.threads)
    size = (64, 96) if arguments.quick else (800, 1344)
    where = machine(CPU, "float32") | {"images": f"1 of {size[0]} x {size[1]}"}
    rows: list[Row] = []
    passes = [(name, which) for name in arguments.models.split(",") for which in PASSES]
    peaks = {
        key: {x: peak_memory(make_call, key[0], x, key[1], *size, device=CPU) for x in contenders_of(*key)}
        for key in passes
    }
    print("memory is measured, each in a process of its own; now the times", flush=True)
    table = None
    try:
        for key in passes:
            rows += (new := measure(*key, size, 1 if arguments.quick else arguments.rounds, peaks[key]))
            print(f"\n{format_table(new)}", flush=True)
        if arguments.profile:
            table = profile_step(arguments.profile, size)
    finally:
        BACKENDS.pop(IN_ITS_PLACE, None)
    write_results(arguments.output, "Backbones at the size of detection", ABOUT, rows, where, by=["model", "pass"])
    if table is not None:
        print(table)
        (arguments.output / "profile.txt").write_text(table, encoding="utf-8")
    return rows


ABOUT = f"""`ratio` is to the first contender in the same round: median (quartiles). `peak MB` (10^6 bytes) is above the
weights and the image: maps, all gradients and scratch. `{IN_ITS_PLACE}`: the model as it is, rows and columns included,
with nothing added to the scores.
`{CHECKPOINTING}`: with set_grad_checkpointing, a block's insides are computed again in the backward pass.
Forward is in eval mode without autograd; with backward, in training mode, without an optimiser."""

if __name__ == "__main__":
    main()
