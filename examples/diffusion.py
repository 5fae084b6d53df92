"""Train a small SDT-P to draw clothes, class by class, and let a classifier of real photographs judge what it draws.

    python examples/diffusion.py --data data                 # decay `full` (SDT Eq. 7-9), one seed
    python examples/diffusion.py --data data --decay fixed   # another kind, the same recipe
    python examples/diffusion.py --data data --compare       # none, fixed and full, as in Table 3; 3 seeds each

Fashion-MNIST, 60,000 + 10,000 photographs of 28 x 28 pixels, is read from --data; image_folder.py says where to get it,
and how folders of your own must look. The noise schedule and the sampler are diffusers'. Each run that is done is a row
in OUTPUT/runs.csv, and its weights are kept: the same command goes on with the next run. It may run twice at a time on
one OUTPUT: one for each core, with --threads 1.

Needs the extra [demo].
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.schedulers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import ablation_training
import diffusion_judge
import image_folder
from command_line import at_least, folder, number
from diffusion_judge import Judge, Score
from diffusion_report import COMPARED, NUM_SHOWN, ROWS, Key, Result, describe, format_table, plot_samples
from image_folder import DEBIAN, Images, LabelledImages
from run_log import Log, LogError, TrainingError, check_loss, stamp, write_whole
from spatial_decay import SDTP
from spatial_decay.layers.kinds import KINDS
from spatial_decay.models.sdt_p import SDTPOptions

SIZE = 28  # of the images, in pixels; others are resized
PATCH_SIZE = 4
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.0
WARMUP = 0.1  # share of all steps
EMA_DECAY = 0.995
SAMPLER_STEPS = 20  # divides 1000, or DDIM lands beside its own timesteps
NUM_JUDGED = 2000  # images, as many of each class

SMALL: SDTPOptions = {
    "dim": 64,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2,
    "gate_rank": 8,
    "class_dropout_prob": 0.1,
    "learn_sigma": False,
}

# v-prediction: at the last timestep this schedule leaves nothing of the image, and no image follows from its noise.
NOISE = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
# Clipped on the way, a guided image no longer fits the noise that the sampler keeps.
SAMPLER: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": False}


def describe_config(arguments: argparse.Namespace, data: LabelledImages) -> dict[str, Any]:
    """All that results depend on but the kind and the seed."""
    here = (
        *("SIZE", "PATCH_SIZE", "BATCH_SIZE", "LEARNING_RATE", "WEIGHT_DECAY", "WARMUP", "EMA_DECAY"),
        *("SAMPLER", "SAMPLER_STEPS", "NUM_JUDGED", "SMALL"),
    )
    noise = ("num_train_timesteps", "beta_schedule", "prediction_type")
    judge = {
        "features": diffusion_judge.NUM_FEATURES,
        **asdict(diffusion_judge.PHASE),
        "label_smoothing": ablation_training.LABEL_SMOOTHING,
        "warmup": ablation_training.WARMUP,
    }
    return {
        **{name: globals()[name] for name in here},
        "NOISE": {name: NOISE.config[name] for name in noise},
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "judge": judge,
        "data": data.fingerprint,
    }


def build(decay: str, data: LabelledImages, *, seed: int) -> SDTP:
    """The model before training. What it has in common with those of other decays has the same weights."""
    models = []
    for kind in ("none", decay):
        torch.manual_seed(seed)
        options = SMALL | SDTPOptions(decay={"kind": kind})
        models.append(SDTP(SIZE, PATCH_SIZE, data.train.pixels.shape[1], data.num_classes, **options))
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    return models[1]


def train(
    model: SDTP, images: Images, *, steps: int, seed: int, after_step: Callable[[], object]
) -> tuple[SDTP, list[float]]:
    """Train one model on images (n, C, SIZE, SIZE); the average of its weights, and the loss of each step.

    Raises:
        TrainingError: a loss is not finite.
    """
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARMUP)
    model.train()
    losses = []
    torch.manual_seed(seed)  # images, noise and dropped labels: the same for every kind
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH_SIZE,))
        clean = images.pixels[batch] / 127.5 - 1
        noise, t = torch.randn_like(clean), torch.randint(len(NOISE.betas), (BATCH_SIZE,))
        predicted = model(NOISE.add_noise(clean, noise, t), t, images.labels[batch])
        loss = F.mse_loss(predicted, NOISE.get_velocity(clean, noise, t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        ema.update_parameters(model)
        losses.append(loss.item())
        check_loss(f"step {len(losses)}", losses[-1])
        after_step()
    averaged = ema.module
    assert isinstance(averaged, SDTP)
    return averaged, losses


@torch.no_grad()
def sample(model: SDTP, labels: Tensor, *, guidance: float, seed: int) -> Tensor:
    """Draw one image of each label, (n, C, SIZE, SIZE) in [-1, 1]; guidance 1 is none."""
    model.eval()
    sampler = DDIMScheduler.from_config(NOISE.config, **SAMPLER)
    sampler.set_timesteps(SAMPLER_STEPS)
    channels, num_classes = model.config["in_channels"], model.config["num_classes"]
    images = torch.randn(len(labels), channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, num_classes)])
    for t in sampler.timesteps:
        out = model.forward_with_cfg(torch.cat([images, images]), t.expand(len(both)), both, guidance)
        images = sampler.step(out[: len(images)], t, images).prev_sample
    return images.clamp(-1, 1)


def draw(model: SDTP, *, per_class: int, guidance: float, seed: int) -> Images:
    """So many of each class, one class after the other."""
    num_classes = model.config["num_classes"]
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    parts = [
        sample(model, part, guidance=guidance, seed=seed * num_classes + i)
        for i, part in enumerate(labels.split(per_class))
    ]
    return Images(((torch.cat(parts) + 1) * 127.5).round().byte(), labels)


def make(key: Key, data: LabelledImages, judge: Judge, log: Log[Key, Result], after_step: Callable[[], object]) -> None:
    """Train, keep the weights, draw, judge, and write the row."""
    start = time.process_time()
    steps, guidance = log.config["steps"], log.config["guidance"]
    model = build(key.decay, data, seed=key.seed)
    model, losses = train(model, data.train, steps=steps, seed=key.seed, after_step=after_step)
    seconds = time.process_time() - start
    write_whole(_weights(log, key), lambda part: torch.save(model.state_dict(), part))
    score = judge.score(draw(model, per_class=_num_judged(data), guidance=guidance, seed=key.seed))
    last = losses[-max(1, steps // 10) :]
    result = Result(
        accuracy=round(score.accuracy, 4),
        distance=round(score.distance, 5),
        loss=round(sum(last) / len(last), 5),
        cpu_seconds=round(seconds, 1),
        judge=judge.fingerprint,
        diffusers=version("diffusers"),
        **stamp(),
    )
    log.add(key, result)


def _num_judged(data: LabelledImages) -> int:
    """Images of each class; two at least, or their features have no spread."""
    return max(2, NUM_JUDGED // data.num_classes)


def _weights(log: Log[Key, Result], key: Key) -> Path:
    return log.folder / "weights" / f"{key.decay}-{key.seed}.pt"


def write(log: Log[Key, Result], data: LabelledImages, references: Mapping[str, Score]) -> list[Path]:
    """results.md of what is there, and samples.png: of each kind those of its first seed."""
    results = log.results()
    if not results:  # another process makes the first
        return []
    num_judged = data.num_classes * _num_judged(data)
    num_references = len(data.test.first(NUM_JUDGED)) if references else 0
    table = format_table(results, references)
    text = f"{table}\n\n{describe(results, log.config, num_judged=num_judged, num_references=num_references)}\n"
    write_whole(log.folder / "results.md", lambda part: part.write_text(text, encoding="utf-8"))
    guidance = log.config["guidance"]
    panels = {"real, held out": data.test}
    for decay in ROWS:
        kept = [key for key in results if key.decay == decay and _weights(log, key).exists()]
        if kept:
            key = min(kept, key=lambda key: key.seed)
            model = build(decay, data, seed=key.seed)
            model.load_state_dict(torch.load(_weights(log, key), weights_only=True))
            title = f"{decay}, seed {key.seed}, guidance {guidance:g}"
            panels[title] = draw(model, per_class=NUM_SHOWN, guidance=guidance, seed=key.seed)
    figure = plot_samples(panels, num_classes=data.num_classes)
    write_whole(log.folder / "samples.png", partial(figure.savefig, dpi=150))
    print(text)
    return [log.folder / name for name in ("results.md", "samples.png")]


def find_judge(log: Log[Key, Result], data: LabelledImages, *, is_report: bool) -> Judge | None:
    """The judge of the log's results; a report trains none, and says where it has to do without.

    Raises:
        LogError: another one judged the results.
        TrainingError: the loss of its classifier is not finite.
    """
    judge = (diffusion_judge.load if is_report else diffusion_judge.load_or_train)(data, log.folder)
    judges = {result.judge for result in log.results().values()}
    if judge and judges <= {judge.fingerprint}:
        return judge
    problem = (
        f"{diffusion_judge.classifier_path(log.folder)} must be the classifier that judged the results, "
        f"{', '.join(sorted(judges))}: got {judge.fingerprint if judge else 'no such file'}."
    )
    if not is_report:
        raise LogError(f"{problem} Put it back, pass --report, or choose another --output.")
    print(f"{problem} The rows of other images are left out.")
    return None


def work(runs: Sequence[Key], data: LabelledImages, judge: Judge, log: Log[Key, Result]) -> None:
    """Make all that is missing, but what another process is making."""
    for key in runs:
        with log.claim(f"{key.decay}-{key.seed}") as is_ours:
            if is_ours and key not in log.results():
                with tqdm(total=log.config["steps"], desc=f"{key.decay}, seed {key.seed}", unit="step") as bar:
                    make(key, data, judge, log, bar.update)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small SDT-P to draw Fashion-MNIST, or images of your own.")
    parser.add_argument("--data", type=Path, default=DEBIAN, help=f"folder of images (default: {DEBIAN})")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--decay", choices=KINDS, default="full", help="kind of decay (default: full)")
    what.add_argument("--compare", action="store_true", help="train none, fixed and full, 3 seeds each")
    parser.add_argument("--seeds", type=at_least(1), help="how many, from 0 on (default: 1; of --compare: 3)")
    parser.add_argument("--steps", type=at_least(20), default=2000, help="at least 20 (default: 2000)")
    parser.add_argument("--guidance", type=number, default=1.5, help="1 for none (default: 1.5)")
    parser.add_argument("--report", action="store_true", help="train nothing: table and picture of what is there")
    parser.add_argument("--threads", type=at_least(1), help="of torch; 1 if the CPU is shared (default: torch's own)")
    parser.add_argument("--output", type=folder, default=Path("outputs/diffusion"), help="default: outputs/diffusion")
    arguments = parser.parse_args(argv)
    arguments.seeds = arguments.seeds or (3 if arguments.compare else 1)
    return arguments


def main(argv: Sequence[str] | None = None) -> dict[Key, Result]:
    """Run the command line; all results that the log then has."""
    arguments = parse_arguments(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    decays = COMPARED if arguments.compare else (arguments.decay,)
    runs = [Key(decay, seed) for seed in range(arguments.seeds) for decay in decays]
    try:
        data = image_folder.load(arguments.data, SIZE)
        log = Log(arguments.output, describe_config(arguments, data), Key, Result)
        if arguments.report and not log.results():
            raise LogError(f"{log.path} has no results yet. Leave --report out.")
        judge = find_judge(log, data, is_report=arguments.report)
        if judge and not arguments.report:
            work(runs, data, judge, log)
    except (image_folder.DataError, LogError, TrainingError) as error:
        raise SystemExit(str(error)) from error
    written = write(log, data, judge.references(NUM_JUDGED) if judge else {})
    print(f"results: {', '.join(map(str, [log.path, *written]))}")
    return log.results()


if __name__ == "__main__":
    main()
