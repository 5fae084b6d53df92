"""Does the decay help? The paper's Tables 3, 4 and 5 on small photographs, other resolutions, and trained models.

    python examples/ablation.py                          # a first look at the tables: 2 seeds, 12 minutes on two cores
    python examples/ablation.py --data photos            # another place than Debian's, or images of your own
    python examples/ablation.py --full                   # 3 seeds of trainings that are long enough: hours
    python examples/ablation.py --full tables sizes transfer    # all that there is

Fashion-MNIST, 60,000 + 10,000 photographs of 28 x 28 pixels, is read from --data; image_folder.py says where to get it,
and how folders of your own must look. Three studies:

    tables      a plain ViT with each decay of Tables 3, 4 and 5, and a small SDT-H with each of Tables 3 and 4
    sizes       plain ViTs with four kinds of positions and up to nine decays, tested at sizes other than their own:
                as they are, with positions and distances in steps of the size trained on, and after training the
                gates alone (without gates: the norms); and the images resized to the size trained on
    transfer    a plain ViT that is trained already, and trained on: as it is, or with a decay swapped in

Each result is a row in OUTPUT/runs.csv as soon as it is there. The same command goes on where it was, and may run twice
at a time on one OUTPUT: one for each core, with --threads 1. Tables and pictures are made of what is there.

Needs the extra [demo]; rows with LoRA need peft too.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

import ablation_models as models
import ablation_report as report
import ablation_training as training
import image_folder
from ablation_log import Key, Result, RunLog
from ablation_models import Recipe
from ablation_plan import LORA, TRANSFERS, Run, Study, plan, transfers
from ablation_runs import Lab
from command_line import at_least, folder
from image_folder import DEBIAN, LabelledImages
from run_log import LogError, TrainingError
from spatial_decay.layers.kinds import DecayLike, as_kind

QUICK = Recipe(
    vit_images=8000,
    vit_epochs=3,
    sdt_h_images=2000,
    sdt_h_epochs=2,
    gate_images=500,
    test_images=2000,
    size_images=500,
    further_epochs=1,
    batch_size=50,
    learning_rate=2e-3,
)
FULL = Recipe(
    vit_images=12000,
    vit_epochs=50,
    sdt_h_images=12000,
    sdt_h_epochs=30,
    gate_images=2000,
    test_images=10000,
    size_images=2000,
    further_epochs=5,
    batch_size=200,
    learning_rate=3e-3,
)
NUM_SEEDS = {False: 2, True: 3}  # without --full, and with it


def describe_config(recipe: Recipe, data: LabelledImages) -> dict[str, Any]:
    """All that results depend on but the row and the seed."""
    constants = ("WEIGHT_DECAY", "LABEL_SMOOTHING", "WARMUP", "GATES_RATE", "GATES_BATCH", "FURTHER_RATE")

    def config_of(like: DecayLike) -> dict[str, Any]:
        return as_kind(like).resolved(grid_size=models.grid_of(recipe)).config

    return {
        **asdict(recipe),
        **{name: getattr(training, name) for name in constants},
        **{name: getattr(models, name) for name in ("VIT", "SDT_H")},
        "decays": {name: config_of(like) for name, like in models.DECAYS.items()},
        "transfers": {name: config_of(like) for name, like in TRANSFERS.items()},
        "LORA": LORA,
        "data": data.fingerprint,
    }


def work(runs: Sequence[Run], data: LabelledImages, recipe: Recipe, log: RunLog) -> None:
    """Make all that is missing, but what another process is making."""
    form = "{desc}{percentage:.0f}%|{bar}| {elapsed}, {remaining} left"
    with tqdm(total=1, bar_format=form, smoothing=0) as bar:
        lab = Lab(data, recipe, log, bar.update)
        for i, run in enumerate(runs):
            with log.claim(run.name) as is_ours:
                if is_ours and lab.missing(run):
                    bar.set_description(run.name, refresh=False)
                    bar.total = bar.n + sum(map(lab.cost, runs[i:]))
                    lab.make(run)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    studies = get_args(Study)
    parser = argparse.ArgumentParser(description="The paper's Tables 3, 4 and 5, other resolutions, trained models.")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"{', '.join(studies)} (default: tables)")
    parser.add_argument("--data", type=Path, default=DEBIAN, help=f"folder of images (default: {DEBIAN})")
    parser.add_argument("--size", type=at_least(1), default=28, help="of the images in pixels (default: 28)")
    parser.add_argument("--patch-size", type=at_least(1), default=4, help="of the plain ViT in pixels (default: 4)")
    parser.add_argument(
        "--other-sizes", type=at_least(1), nargs="+", default=[40, 56, 84, 112], help="default: 40 56 84 112"
    )
    parser.add_argument("--full", action="store_true", help="3 seeds of long trainings instead of 2 of short ones")
    parser.add_argument("--seeds", type=at_least(1), help="how many, from 0 on")
    parser.add_argument("--report", action="store_true", help="train nothing: tables and pictures of what is there")
    parser.add_argument("--threads", type=at_least(1), help="of torch; 1 if the CPU is shared (default: torch's own)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--output", type=folder, help="default: outputs/ablation, with --full outputs/ablation-full")
    arguments = parser.parse_args(argv)
    for study in arguments.studies:
        if study not in studies:
            parser.error(f"argument STUDY: must be one of {', '.join(studies)}: got {study!r}")
    sizes = [arguments.size, *arguments.other_sizes]
    if odd := [str(size) for size in sizes if size % arguments.patch_size]:
        parser.error(
            f"--size and --other-sizes must be multiples of --patch-size, {arguments.patch_size}: got {', '.join(odd)}"
        )
    if len({*sizes}) < len(sizes):
        parser.error(f"--size and --other-sizes must all differ: got {', '.join(map(str, sizes))}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: must be cpu where PyTorch sees no GPU: got cuda")
    arguments.studies = arguments.studies or ["tables"]
    arguments.output = arguments.output or Path("outputs") / f"ablation{'-full' * arguments.full}"
    return arguments


def main(argv: Sequence[str] | None = None) -> dict[Key, Result]:
    """Run the command line; all results that the log then has."""
    arguments = parse_arguments(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    recipe = replace(
        FULL if arguments.full else QUICK,
        size=arguments.size,
        other_sizes=tuple(arguments.other_sizes),
        patch_size=arguments.patch_size,
    )
    if arguments.report and not (arguments.output / "runs.csv").exists():
        raise SystemExit(f"--report needs results in {arguments.output}: got none. Run the command without it first.")
    if "transfer" in arguments.studies and len(transfers()) < len(TRANSFERS):
        print(f"Left out for want of peft: {', '.join({*TRANSFERS} - {*transfers()})}. pip install peft")
    try:
        data = image_folder.load(arguments.data, arguments.size)
        log = RunLog(arguments.output, describe_config(recipe, data))
        runs = plan(arguments.studies, recipe, seeds=arguments.seeds or NUM_SEEDS[arguments.full])
        if not arguments.report:
            work(runs, data.to(torch.device(arguments.device)), recipe, log)
    except (image_folder.DataError, LogError, TrainingError) as error:
        raise SystemExit(str(error)) from error
    results = log.results()
    written = report.write(results, arguments.output, recipe)
    print(f"results: {', '.join(map(str, [log.path, *written]))}")
    return results


if __name__ == "__main__":
    main()
