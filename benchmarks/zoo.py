"""Every model by its name: parameters, GFLOPs, images a second beside DeiT-tiny, and the memory that training takes.

    python -m benchmarks.zoo                  # CPU, float32, some 10 minutes; results in outputs/benchmarks/zoo
    python -m benchmarks.zoo --write FOLDER   # the tables of docs, from the results in FOLDER and below

GFLOPs are those of torch.utils.flop_counter, halved (a product and its sum are one, as papers count). They hold
convolutions, linear maps and the two products of attention, not what is done number by number: decays, norms, softmax.
"""

import csv
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import DTYPES, Row, command_line, format_table, machine, timing_columns, write_results
from benchmarks.timing import Call, interleaved, peak_memory
from spatial_decay import models
from spatial_decay.models.registry import ENTRIES

FLOOR = "deit_tiny_patch16_224"
PEERS = (FLOOR, "deit_small_patch16_224", "deit_base_patch16_224")
DOCS = Path(__file__).parents[1] / "docs"
RESULTS = Path(__file__).parent / "results"
PAGES = {
    "classifiers": DOCS / "models/index.md",
    "latents": DOCS / "models/index.md",
    "memory": DOCS / "guides/train.md",
}
"""Where the tables stand."""


@dataclass(frozen=True)
class Published:
    """What others have published of a model; None where they say nothing.

    Args:
        millions: Parameters.
        gflops: At 224 x 224.
        result: Top-1 on ImageNet in percent; of latents the FID after 400,000 steps without guidance.
        by: Whose number the result is; the page names the sources.
    """

    millions: str | None = None
    gflops: str | None = None
    result: str | None = None
    by: str = ""


PUBLISHED = {
    "sdt_h_tiny": Published("14", "2.7", "82.7", "SDT"),
    "sdt_h_small": Published("27", "4.8", "84.2", "SDT"),
    "sdt_h_base": Published("54", "10.8", "85.1", "SDT"),
    "rmt_tiny": Published("14", "2.5", "82.4", "RMT"),
    "rmt_small": Published("27", "4.5", "84.1", "RMT"),
    "rmt_base": Published("54", "9.7", "85.0", "RMT"),
    "rmt_large": Published("95", "18.2", "85.5", "RMT"),
    "locatvit_tiny": Published("6", None, "73.94", "LocAtViT"),
    "locatvit_small": Published(),
    "locatvit_base": Published("86", "17.64", "82.31", "LocAtViT"),
    PEERS[0]: Published("5", None, "72.2", "DeiT"),
    PEERS[1]: Published("22", "4.6", "79.9", "DeiT"),
    PEERS[2]: Published("86", None, "81.8", "DeiT"),
    "sdt_p_small": Published("33", None, "60.70", "SDT"),
    "sdt_p_base": Published("132", None, "37.47", "SDT"),
    "sdt_p_large": Published("462", None, "21.28", "SDT"),
    "sdt_p_xlarge": Published("679", None, "18.20", "SDT"),
}
"""All models of list_models, and timm's that stand beside them, in the order of the page."""

TRAINED = ("sdt_h_tiny", "sdt_h_small", "sdt_h_base", "locatvit_tiny", FLOOR)
"""Those whose memory of training is measured, with TRAINING_BATCH images."""
TRAINING_BATCH = 4


def build(name: str) -> nn.Module:
    """A model of ours or of timm's, by name."""
    if name in ENTRIES:
        return ENTRIES[name].build()
    model: nn.Module = importlib.import_module("timm").create_model(name)
    return model


def inputs(name: str, batch_size: int, image_size: int = 224) -> tuple[Tensor, ...]:
    """Images, or latents with their timesteps and labels."""
    if name in ENTRIES and ENTRIES[name].images is None:
        return torch.randn(batch_size, 4, 32, 32), torch.arange(batch_size), torch.arange(batch_size)
    return (torch.randn(batch_size, 3, image_size, image_size),)


def counts(name: str) -> Row:
    """Parameters and GFLOPs, counted without memory or time."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build(name).eval()
        model(*inputs(name, 1))
    return {"parameters": parameters(model), "GFLOPs": counter.get_total_flops() / 2e9}


def parameters(model: nn.Module) -> int:
    """Of SDT-P with the fixed positions, as DiT counts."""
    fixed = 16 * 16 * model.dim if isinstance(model, models.SDTP) else 0
    return sum(parameter.numel() for parameter in model.parameters()) + fixed


def make_forward(name: str, arguments: tuple[Tensor, ...], dtype: torch.dtype) -> Call:
    """One forward pass in eval mode, from the same seed."""
    torch.manual_seed(0)
    device = arguments[0].device
    model = build(name).eval().to(device)

    def forward() -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            out: Tensor = model(*arguments)
        return out

    return forward


def make_training(name: str, batch_size: int, image_size: int, checkpointing: bool, device: str) -> Call:
    """Forward, loss and backward; the gradients of the weights are there before it."""
    torch.manual_seed(0)
    model, (images,) = build(name).train().to(device), inputs(name, batch_size, image_size)
    images, labels = images.to(device), torch.zeros(batch_size, dtype=torch.long, device=device)
    model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]  # all of these have it

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()

    return step


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line; the rows of results.csv."""
    parser = command_line(__doc__.splitlines()[0], "zoo", rounds=5)
    parser.add_argument("--models", default=",".join(PUBLISHED), help="comma-separated")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="measure nothing: write the pages from there")
    arguments = parser.parse_args(argv)
    if arguments.write:
        write(tables(read(arguments.write)))
        return []
    names = arguments.models.split(",")
    if unknown := set(names) - set(PUBLISHED):
        parser.error(f"argument --models: choose from {', '.join(PUBLISHED)}: got {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    device, dtype, quick = torch.device(arguments.device), DTYPES[arguments.dtype], arguments.quick
    batch_size, size = (2, 64) if quick else (arguments.batch_size, 224)
    where = machine(device, arguments.dtype) | {"images": f"{batch_size} of {size} x {size}, or latents of 32 x 32"}
    rows: list[Row] = []
    for name in ("sdt_h_tiny",) if quick else names:
        calls = {}
        for model in dict.fromkeys((FLOOR, name)):
            # A ViT of timm's takes its own size alone.
            tensors = inputs(model, batch_size, size if model in ENTRIES else 224)
            calls[model] = make_forward(model, tuple(tensor.to(device) for tensor in tensors), dtype)
        rounds = 1 if quick else arguments.rounds
        timing = interleaved(calls, FLOOR, rounds=rounds, device=device, warmup=1, min_seconds=0)[name]
        row: Row = {"model": name} | counts(name) | {"images/s": batch_size / timing.seconds} | timing_columns(timing)
        for column, checkpointing in (("training MB", False), ("checkpointed MB", True)):
            peak = None
            if name in TRAINED:
                settings = (name, TRAINING_BATCH, size, checkpointing, str(device))
                peak = peak_memory(make_training, *settings, device=device)
            row[column] = peak / TRAINING_BATCH / 1e6 if peak is not None else None
        rows.append(row)
        print(format_table([row]), flush=True)
    write_results(arguments.output, "Every model", ABOUT, rows, where, by=[])
    return rows


ABOUT = f"""`ratio` is the forward time over that of timm's `{FLOOR}` in the same rounds: median (quartiles).
Training MB: what forward and backward take for one of {TRAINING_BATCH} images, float32, above weights and gradients.
Checkpointed: with set_grad_checkpointing(). GFLOPs count convolutions, linear maps and attention's two products."""


def read(folder: Path) -> list[dict[str, str]]:
    """The rows of results.csv in the folder and in those below it, in the order of the page."""
    rows: dict[str, dict[str, str]] = {}
    for path in folder.rglob("results.csv"):
        with path.open(encoding="utf-8") as file:
            new = {row["model"]: row for row in csv.DictReader(file)}
        if twice := sorted({*rows} & {*new}):
            raise ValueError(
                f"{folder} must have each model once: {', '.join(twice)} stand twice. Remove one's folder."
            )
        rows |= new
    return [rows[name] for name in PUBLISHED if name in rows]


def tables(rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """By name: of classifiers, of backbones for latents, and of the memory of training."""
    columns = "| model | parameters (M) | GFLOPs | published | {} | {} a second | time over DeiT-tiny's |\n"
    columns += "|---" * 7 + "|"
    lines = {
        "classifiers": [columns.format("top-1, by", "images")],
        "latents": [columns.format("FID", "latents")],
        "memory": ["| model | MB an image | with checkpointing |\n|---|---|---|"],
    }
    for row in rows:
        name, published = row["model"], PUBLISHED[row["model"]]
        is_latent = name in ENTRIES and ENTRIES[name].images is None
        by = "" if is_latent else f", {published.by}"
        cells = [
            f"`{name}`" if name in ENTRIES else f"timm's `{name}`",
            f"{int(row['parameters']) / 1e6:.2f}",
            f"{float(row['GFLOPs']):.2f}",
            ", ".join(size for size in (published.millions, published.gflops) if size) or "-",
            f"{published.result}{by}" if published.result else "-",
            f"{float(row['images/s']):.1f}",
            "1" if name == FLOOR else "{:.2f} ({:.2f} to {:.2f})".format(*_ratio(row)),
        ]
        lines["latents" if is_latent else "classifiers"].append(f"| {' | '.join(cells)} |")
        if row["training MB"]:
            megabytes = [f"{float(row[column]):.0f}" for column in ("training MB", "checkpointed MB")]
            lines["memory"].append(f"| {' | '.join([cells[0], *megabytes])} |")
    return {name: "\n".join(table) for name, table in lines.items()}


def write(found: dict[str, str]) -> None:
    """Put the tables between the markers of their pages."""
    for name, table in found.items():
        begin, end = f"<!-- begin: {name}, by python -m benchmarks.zoo --write -->", "<!-- end -->"
        before, found_begin, rest = PAGES[name].read_text(encoding="utf-8").partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"{PAGES[name]} must have the line {begin}, and {end} behind it: got neither or one.")
        PAGES[name].write_text(f"{before}{begin}\n\n{table}\n\n{end}{after}", encoding="utf-8")


def _ratio(row: dict[str, str]) -> list[float]:
    return [float(row[name]) for name in ("ratio", "ratio_low", "ratio_high")]


if __name__ == "__main__":
    main()
