"""Train a small SDT-P to draw scanned digits, class by class, and let a classifier of real digits read what it draws.

    python examples/diffusion.py                # decay `full` (SDT Eq. 7-9); pictures in outputs/diffusion/
    python examples/diffusion.py --decay fixed  # another kind, the same recipe
    python examples/diffusion.py --compare      # the question of the paper's Table 3: none, fixed, full, 3 seeds each

1,797 images of 8 x 8 pixels come with scikit-learn: nothing is downloaded. 1,400 train, 397 test. The noise schedule
and the sampler are diffusers'. The state of training is kept beside the pictures, and the same command goes on from it:
a run that was killed ends with the numbers of one that was not, to the last bit on one machine with as many threads.

Needs the extra [demo].
"""

import argparse
import copy
import datetime
import io
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.schedulers import DDIMScheduler, DDPMScheduler
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from spatial_decay import SDTP
from spatial_decay.layers.kinds import KINDS, KindName
from spatial_decay.models.sdt_p import SDTPOptions

NUM_CLASSES = 10
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
EMA_DECAY = 0.995
CHECKPOINT_EVERY = 100  # steps
SAMPLER_STEPS = 20  # divides 1000, or DDIM lands beside its own timesteps; 50 score the same
SAMPLES_PER_CLASS = 50  # for the classifier
NUM_SHOWN = 10  # of each class in the picture
COMPARED: tuple[KindName, ...] = ("none", "fixed", "full")
NUM_SEEDS = 3  # of --compare

SMALL: SDTPOptions = {"dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2, "gate_rank": 8, "learn_sigma": False}

# v-prediction: at the last timestep this schedule leaves nothing of the image, and no image follows from its noise.
NOISE = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


class CheckpointError(ValueError):
    """A checkpoint that this run cannot go on from."""


@dataclass(frozen=True)
class Digits:
    """Part of the digits."""

    images: Tensor  # (B, 1, 8, 8), in [-1, 1]
    labels: Tensor  # (B,), 0 .. 9


@dataclass(frozen=True)
class Result:
    """Of one model: the share of samples that the classifier reads as their class, in percent, and training time."""

    guided: float
    unguided: float
    seconds: float


def load_data() -> tuple[Digits, Digits]:
    """Training and test images: the same for every run, whatever its seed."""
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.as_tensor(digits.target, dtype=torch.long)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = (Digits(images[part], labels[part]) for part in (order[:1400], order[1400:]))
    return train, test


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The new file, or what was there before, whoever is killed or writes it too."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        write(part)
        os.replace(part, path)


class Training:
    """One model on its way: everything that the next step depends on, so that it can be left and taken up again."""

    def __init__(self, decay: KindName, *, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = SDTP(8, 2, 1, NUM_CLASSES, **(SMALL | SDTPOptions(decay=decay)))
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
        )
        recipe = {"steps": steps, "seed": seed, "batch": BATCH_SIZE, "lr": LEARNING_RATE, "ema": EMA_DECAY}
        self.settings: dict[str, Any] = recipe | self.model.config
        self.losses: list[float] = []
        self.seconds = 0.0
        torch.manual_seed(seed)  # images, noise and dropped labels: the same for every kind

    def step(self, data: Digits) -> float:
        """One batch; its loss."""
        start = time.perf_counter()
        self.model.train()
        batch = torch.randint(len(data.images), (BATCH_SIZE,))
        images, noise = data.images[batch], torch.randn(BATCH_SIZE, *data.images.shape[1:])
        t = torch.randint(len(NOISE.betas), (BATCH_SIZE,))
        predicted = self.model(NOISE.add_noise(images, noise, t), t, data.labels[batch])
        loss = F.mse_loss(predicted, NOISE.get_velocity(images, noise, t))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - start
        return self.losses[-1]

    def save(self, path: Path) -> None:
        write_whole(path, lambda part: torch.save(self._state(), part))

    def load(self, path: Path) -> None:
        """Take up what save() wrote, all or nothing.

        Raises:
            CheckpointError: the file is not as it was written, or has other settings.
        """
        before = copy.deepcopy(self._state())
        remedy = f"Delete {path} to start again, or choose another --output."
        try:
            content = io.BytesIO(path.read_bytes())
            if other := zipfile.ZipFile(content).testzip():  # torch.load does not look: pytorch/pytorch#126952
                raise ValueError(f"another checksum for {other}")
            content.seek(0)
            saved: Any = torch.load(content, weights_only=True)
            theirs, ours = saved["settings"], self.settings
            names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            if not names:
                if (num_losses := len(saved["losses"])) != (steps := saved["schedule"]["last_epoch"]):
                    raise ValueError(f"{num_losses} losses of {steps} steps")
                self._take_up(saved)
        except Exception as error:  # what is damaged can raise anything
            self._take_up(before)
            raise CheckpointError(
                f"{path} must be a whole checkpoint of this example: got {error!r}. {remedy}"
            ) from error
        if names:
            differ = ", ".join(f"{name}={theirs.get(name)} where this run has {ours.get(name)}" for name in names)
            raise CheckpointError(
                f"{path} must have the settings of this run: it has {differ}. Give the same arguments. {remedy}"
            )

    def _state(self) -> dict[str, Any]:
        numbers = {"losses": self.losses, "seconds": self.seconds, "random": torch.get_rng_state()}
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {**parts, **numbers, "settings": self.settings}

    def _take_up(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.losses, self.seconds = state["losses"], state["seconds"]
        torch.set_rng_state(state["random"])

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "ema": self.ema, "optimizer": self.optimizer, "schedule": self.schedule}


def train(decay: KindName, *, steps: int, seed: int, output: Path) -> Training:
    """Train one model, or go on with it; the last step counts."""
    data, _ = load_data()
    training = Training(decay, steps=steps, seed=seed)
    path = output / f"{decay}-{seed}.pt"
    if path.exists():
        training.load(path)
        tqdm.write(f"resumed from {path}: {len(training.losses)} of {steps} steps are done")
    first = len(training.losses)
    progress = tqdm(range(first, steps), f"decay {decay}, seed {seed}", total=steps, initial=first, unit="step")
    for done in progress:
        loss = training.step(data)
        if (done + 1) % CHECKPOINT_EVERY == 0 or done + 1 == steps:
            training.save(path)
            progress.set_postfix(loss=f"{loss:.3f}")
    return training


@torch.no_grad()
def sample(model: nn.Module, labels: Tensor, *, guidance: float, seed: int) -> Tensor:
    """Draw one image of each label, (B, 1, 8, 8) in [-1, 1]; guidance 1 is none."""
    assert isinstance(model, SDTP)
    model.eval()
    # Clipped on the way, a guided image no longer fits the noise that the sampler keeps: 1 % are legible at guidance 3.
    sampler = DDIMScheduler.from_config(NOISE.config, timestep_spacing="trailing", clip_sample=False)
    sampler.set_timesteps(SAMPLER_STEPS)
    images = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, NUM_CLASSES)])
    for t in sampler.timesteps:
        out = model.forward_with_cfg(torch.cat([images, images]), t.expand(len(both)), both, guidance)
        images = sampler.step(out[: len(images)], t, images).prev_sample
    return images.clamp(-1, 1)


def fit_classifier(data: Digits) -> SVC:
    """A support vector machine on the pixels."""
    return SVC(C=10, gamma=0.02).fit(data.images.flatten(1).numpy(), data.labels.numpy())


def read(classifier: SVC, data: Digits) -> float:
    """Share of images that the classifier reads as their label, in percent."""
    predicted = torch.as_tensor(classifier.predict(data.images.flatten(1).numpy()))
    return 100 * (predicted == data.labels).float().mean().item()


def measure(training: Training, classifier: SVC, *, guidance: float) -> Result:
    """Read SAMPLES_PER_CLASS images of each class, drawn by the averaged model with guidance and without."""
    labels = torch.arange(NUM_CLASSES).repeat_interleave(SAMPLES_PER_CLASS)
    guided, unguided = (
        read(classifier, Digits(sample(training.ema.module, labels, guidance=scale, seed=0), labels))
        for scale in (guidance, 1.0)
    )
    return Result(guided, unguided, training.seconds)


def plot_samples(model: nn.Module, test: Digits, *, guidance: float) -> Figure:
    """A row for each class: real digits that no training has seen, and samples."""
    labels = torch.arange(NUM_CLASSES).repeat_interleave(NUM_SHOWN)
    real = torch.cat([test.images[test.labels == digit][:NUM_SHOWN] for digit in range(NUM_CLASSES)])
    panels = {"real, held out": real, f"drawn, guidance {guidance:g}": sample(model, labels, guidance=guidance, seed=0)}
    figure = Figure((10, 5.3), layout="constrained")
    for ax, (title, images) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        framed = F.pad(images, (1, 1, 1, 1), value=-1).view(NUM_CLASSES, NUM_SHOWN, 10, 10)
        ax.imshow(framed.transpose(1, 2).flatten(2).flatten(0, 1).numpy(), cmap="gray_r", interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[10 * digit + 4.5 for digit in range(NUM_CLASSES)])
        ax.set_yticklabels(range(NUM_CLASSES))
    return figure


def plot_loss(losses: Sequence[float]) -> Figure:
    """Each step's loss, and the mean of the steps around it."""
    width = min(51, len(losses))
    smooth = torch.tensor(losses).unfold(0, width, 1).mean(1)
    figure = Figure((6, 3.6), layout="constrained")
    ax = figure.subplots()
    middle = width // 2 + 1
    ax.plot(range(1, len(losses) + 1), losses, color="C0", alpha=0.25, linewidth=0.8, label="each step")
    ax.plot(
        range(middle, middle + len(smooth)),
        smooth.numpy(),
        color="C0",
        label=f"mean of {width} steps, last {smooth[-1]:.3f}",
    )
    ax.set(xlabel="step", ylabel="mean squared error of v", ylim=(0, None), xlim=(0, len(losses)))
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def format_table(results: Mapping[str, Sequence[Result]], *, guidance: float) -> str:
    """Mean ± standard deviation over the seeds, as Markdown."""
    lines = [f"| decay | guidance {guidance:g} (%) | no guidance (%) | training (s) |", "|---|---|---|---|"]
    for name, seeds in results.items():
        columns = zip(*((result.guided, result.unguided, result.seconds) for result in seeds), strict=True)
        cells = [f"{statistics.mean(column):.1f} ± {statistics.stdev(column):.1f}" for column in columns]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def describe(*, steps: int, seeds: Sequence[int], real: float) -> str:
    """What the numbers of a comparison stand on, in one paragraph."""
    num_samples, threads = NUM_CLASSES * SAMPLES_PER_CLASS, torch.get_num_threads()
    return (
        f"Share of {num_samples} samples (DDIM, {SAMPLER_STEPS} steps) after {steps} training steps that a support "
        f"vector machine reads as their class; of the 397 held-out real digits it reads {real:.1f} %. Mean ± standard "
        f"deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))}). {os.cpu_count()} CPU cores "
        f"({platform.machine()}), {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}, diffusers "
        f"{version('diffusers')}, {datetime.date.today().isoformat()}."
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small SDT-P to draw scikit-learn's 8 x 8 digits.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--decay", choices=KINDS, default="full", help="kind of decay (default: full)")
    what.add_argument("--compare", action="store_true", help="train none, fixed and full, 3 seeds each")
    parser.add_argument("--steps", type=_at_least(20), default=1200, help="at least 20 (default: 1200)")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of --compare: the first of three (default: 0)")
    parser.add_argument("--guidance", type=float, default=1.5, help="1 for none (default: 1.5)")
    parser.add_argument("--threads", type=_at_least(1), help="of torch; 1 if the CPU is shared (default: torch's own)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/diffusion"), help="for state and results of one run at a time"
    )
    arguments = parser.parse_args(argv)
    if arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"argument --output: must be a folder, or not be there yet: got the file {arguments.output}")
    if not 0 <= arguments.guidance < math.inf:
        parser.error(f"argument --guidance: must be a number >= 0: got {arguments.guidance}")
    return arguments


def _at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {low}: got {text!r}")
        return int(text)

    return parse


def main(argv: Sequence[str] | None = None) -> dict[str, list[Result]]:
    """Run the command line; decay -> one result a seed."""
    arguments = parse_arguments(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):  # the system drops it when the process ends, however that ends
            for part in output.glob(".part-*"):  # of killed runs
                shutil.rmtree(part)
            return run(arguments)
    except Timeout as error:
        raise SystemExit(
            f"--output must belong to one run at a time: another one is at work in {output}. Wait until it ends, or "
            "choose another --output."
        ) from error
    except CheckpointError as error:
        raise SystemExit(str(error)) from error


def run(arguments: argparse.Namespace) -> dict[str, list[Result]]:
    """Train, or go on with it, then measure and draw."""
    steps, seed, guidance, output = arguments.steps, arguments.seed, arguments.guidance, arguments.output
    train_data, test = load_data()
    classifier = fit_classifier(train_data)
    real = read(classifier, test)
    seeds = range(seed, seed + NUM_SEEDS) if arguments.compare else [seed]
    results: dict[str, list[Result]] = {}
    for decay in COMPARED if arguments.compare else [arguments.decay]:
        for number in seeds:
            training = train(decay, steps=steps, seed=number, output=output)
            results.setdefault(decay, []).append(measure(training, classifier, guidance=guidance))
    if arguments.compare:
        text = f"{format_table(results, guidance=guidance)}\n\n{describe(steps=steps, seeds=seeds, real=real)}\n"
        write_whole(output / "compare.md", lambda part: part.write_text(text, encoding="utf-8"))
        print(text, end="")
        return results
    pictures = {
        f"{arguments.decay}-{seed}-samples.png": plot_samples(training.ema.module, test, guidance=guidance),
        f"{arguments.decay}-{seed}-loss.png": plot_loss(training.losses),
    }
    for name, figure in pictures.items():
        write_whole(output / name, figure.savefig)
    result = results[arguments.decay][0]
    print(
        f"the classifier reads {result.guided:.1f} % of the samples as their class, without guidance "
        f"{result.unguided:.1f} %, and {real:.1f} % of the real digits held out; {result.seconds:.0f} s of training"
    )
    print(f"pictures: {', '.join(str(output / name) for name in pictures)}")
    return results


if __name__ == "__main__":
    main()
