"""What the dense examples share: their command line, and runs by row and seed that go on where they were."""

import argparse
import importlib.metadata
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dense_models
import photo
from command_line import at_least, folder
from dense_data import Composites, compose, load_pieces
from dense_models import Recipe
from image_folder import DataError
from run_log import Log, LogError, stamp, write_whole
from seeds import mean_and_spread

NUM_TEST = 300
NUM_SHOWN = 5  # test images in the pictures: the first
RAW = "linear head"


@dataclass(frozen=True)
class Key:
    """One trained model."""

    framework: str
    backbone: str
    seed: int

    @property
    def name(self) -> str:
        """For files and the progress bar."""
        return "-".join(f"{self.framework}-{self.backbone}-{self.seed}".replace(",", "").split())


@dataclass(frozen=True)
class Result:
    """What came of it, in percent, and where."""

    first: float  # mIoU, or AP over overlaps of 0.5 to 0.95
    second: float  # accuracy of pixels, or AP at an overlap of 0.5
    million_parameters: float
    cpu_seconds: float
    date: str
    torch: str
    machine: str
    versions: str


@dataclass(frozen=True)
class Data:
    """Composites to train on and to test."""

    train: Composites
    test: Composites


@dataclass(frozen=True)
class Task:
    """A dense task: how one of its models is trained and measured."""

    name: str
    recipe: Recipe
    rows: Sequence[tuple[str, str]]  # framework and backbone
    config: Mapping[str, Any]  # what the results depend on besides
    libraries: Sequence[str]  # whose versions are kept
    columns: tuple[str, str]  # what first and second are
    fit: Callable[[Key, Data, Recipe, Callable[[], object]], torch.nn.Module]  # and what is called after each batch
    measure: Callable[[Key, torch.nn.Module, Composites], tuple[float, float]]
    predict: Callable[[Key, torch.nn.Module, torch.Tensor], Any]  # of the images shown; goes through torch.save
    draw: Callable[[Composites, Mapping[str, Any]], Any]  # a figure, of rows by name
    composites: Mapping[str, Any] = field(default_factory=dict)  # keywords of compose


def dense_rows(*frameworks: str) -> list[tuple[str, str]]:
    """The linear head, and each framework on each backbone."""
    return [(RAW, "raw patches"), *((f, backbone) for f in frameworks for backbone in dense_models.NAMES)]


def parse_arguments(task: str, recipe: Recipe, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Dense {task} of composites, trained in miniature.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the four files of Fashion-MNIST")
    parser.add_argument(
        "--images", type=at_least(1), default=recipe.images, help=f"to train on (default: {recipe.images})"
    )
    parser.add_argument("--epochs", type=at_least(1), default=recipe.epochs, help=f"default: {recipe.epochs}")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="how many, from 0 on (default: 3)")
    parser.add_argument("--threads", type=at_least(1), help="of torch; 1 if the CPU is shared (default: torch's own)")
    name = f"outputs/dense_{task}"
    parser.add_argument("--output", type=folder, default=Path(name), help=f"folder; goes on there (default: {name})")
    return parser.parse_args(argv)


def configuration(task: Task, recipe: Recipe) -> dict[str, Any]:
    """What results depend on, but the data."""
    how = {"epochs": recipe.epochs, "batch size": recipe.batch_size, "learning rate": recipe.learning_rate}
    return how | dict(task.config)


def main(task: Task, argv: Sequence[str] | None) -> dict[Key, Result]:
    """Run the command line of one task; the results of all rows and seeds."""
    arguments = parse_arguments(task.name, task.recipe, argv)
    recipe = replace(task.recipe, images=arguments.images, epochs=arguments.epochs)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        pieces = load_pieces(arguments.data)
        counts = (arguments.images, NUM_TEST)
        data = Data(
            *(
                compose(part, number, seed=seed, **task.composites)
                for seed, (part, number) in enumerate(zip(pieces, counts, strict=True))
            )
        )
        config = configuration(task, recipe)
        config |= {"train": data.train.fingerprint, "test": data.test.fingerprint}
        log = Log(arguments.output, config, Key, Result)
        results = _run(task, data, recipe, arguments.seeds, log)
    except (DataError, LogError) as error:
        raise SystemExit(f"error: {error}") from error
    table = format_table(task, results)
    write_whole(arguments.output / "table.md", lambda part: part.write_text(table + "\n", encoding="utf-8"))
    print(table)
    shown = {
        f"{framework}\n{backbone}": torch.load(path, weights_only=True)
        for framework, backbone in task.rows
        if (path := _shown_path(log, Key(framework, backbone, 0))).exists()
    }
    write_whole(arguments.output / "predictions.png", partial(photo.save, task.draw(data.test, shown)))
    return results


def _run(task: Task, data: Data, recipe: Recipe, seeds: int, log: Log[Key, Result]) -> dict[Key, Result]:
    """Seed by seed, so that where time ends all rows have as many; models without decay last."""
    keys = [Key(*row, seed) for seed in range(seeds) for row in task.rows]
    keys.sort(key=lambda key: key.backbone == "ViT")
    done = log.results()
    with tqdm(total=recipe.steps * sum(key not in done for key in keys), unit="batch", mininterval=10) as progress:
        for key in keys:
            with log.claim(key.name) as is_ours:
                if not is_ours or key in log.results():
                    continue
                progress.set_description(key.name)
                start = time.process_time()
                torch.manual_seed(key.seed)
                model = task.fit(key, data, recipe, progress.update)
                seconds = time.process_time() - start
                shown = task.predict(key, model, data.test.images[:NUM_SHOWN])
                write_whole(_shown_path(log, key), partial(torch.save, shown))
                first, second = task.measure(key, model, data.test)
                millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
                versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in task.libraries)
                result = Result(
                    first=round(first, 3),
                    second=round(second, 3),
                    million_parameters=round(millions, 3),
                    cpu_seconds=round(seconds, 1),
                    versions=versions,
                    **stamp(),
                )
                log.add(key, result)
    return log.results()


def _shown_path(log: Log[Key, Result], key: Key) -> Path:
    return log.folder / "weights" / f"{key.name}.pt"


def format_table(task: Task, results: Mapping[Key, Result]) -> str:
    """In percent, mean ± standard deviation over the seeds (and how many), as Markdown."""
    lines = [f"| framework | backbone | parameters | {' | '.join(task.columns)} |", "|---|---|---|---|---|"]
    for row in task.rows:
        of_row = [result for key, result in results.items() if (key.framework, key.backbone) == row]
        if of_row:
            values = [_mean([asdict(result)[name] for result in of_row]) for name in ("first", "second")]
            lines.append(f"| {row[0]} | {row[1]} | {of_row[0].million_parameters:.2f} M | {' | '.join(values)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    return "-" if math.isnan(values[0]) else mean_and_spread(values)
