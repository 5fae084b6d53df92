"""Train a small SDT-H on scikit-learn's scanned digits, in a minute on two CPU cores, and look at its decay.

    python examples/digits.py                     # decay `full` (SDT Eq. 7-9), pictures in outputs/
    python examples/digits.py --decay decomposed  # another kind, the same recipe
    python examples/digits.py --compare           # the mechanisms of the paper's Tables 3 and 4, 3 seeds each

1,797 images of 8 x 8 pixels come with scikit-learn: nothing is downloaded. 1,400 train, 397 test.
Needs the extra [demo].
"""

import argparse
import datetime
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm

from command_line import at_least, folder
from spatial_decay import SDTH, viz
from spatial_decay.layers.kinds import KINDS, KindName

NUM_TRAIN = 1400
BATCH_SIZE = 100
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
MAX_SHIFT = 1  # pixels
NUM_SEEDS = 3  # of --compare

MECHANISMS: dict[KindName, str] = {
    "none": "No decay",
    "fixed": "Spatial Decay",
    "1d": "1D Decay",
    "bidirectional": "Bidirectional Decay",
    "decomposed": "Decomposed 2D Decay",
    "full": "Ours (full)",
}
"""Kinds in the order of the paper's Tables 3 and 4, with their names there."""


@dataclass(frozen=True)
class History:
    """One value an epoch: mean training loss in nats, and accuracies in percent."""

    loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)


def split_indices(num_images: int) -> tuple[Tensor, Tensor]:
    """Numbers of the training and of the test images: the same for every run, whatever its seed."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    return order[:NUM_TRAIN], order[NUM_TRAIN:]


def load_all() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [0, 1] and labels 0 .. 9."""
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return images, torch.as_tensor(digits.target, dtype=torch.long)


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Training and test set of load_all."""
    images, labels = load_all()
    train, test = split_indices(len(images))
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def build_model(decay: KindName) -> SDTH:
    """Two stages, 8 x 8 and 4 x 4 tokens, with the same kind of decay in both."""
    return SDTH(
        num_classes=10,
        in_chans=1,
        embed_dims=(32, 64),
        depths=(2, 2),
        num_heads=(2, 4),
        mlp_ratios=(2, 2),
        decay=(decay, decay),
        init_values=(None, None),
        drop_path_rate=0.1,
        projection_dim=128,
        stem_stride=1,
        lpe_kernel_size=3,
        gate_rank=4,
    )


def build_optimizer(model: SDTH) -> torch.optim.AdamW:
    """AdamW that leaves biases and norms alone."""
    groups = param_groups_weight_decay(model, WEIGHT_DECAY, no_weight_decay_list=model.no_weight_decay())
    return torch.optim.AdamW(groups, lr=LEARNING_RATE)


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image (B, C, H, W) by up to MAX_SHIFT pixels along each axis; what comes in is black."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (MAX_SHIFT,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, shifts, shifts, H, W)
    down, right = torch.randint(2 * MAX_SHIFT + 1, (2, len(images)), generator=generator)
    return windows[torch.arange(len(images)), :, down, right]


@torch.no_grad()
def evaluate(model: SDTH, data: TensorDataset) -> float:
    """Accuracy in percent."""
    images, labels = data.tensors
    model.eval()
    correct: Tensor = model(images).argmax(-1) == labels
    return 100 * correct.float().mean().item()


def train(decay: KindName, *, epochs: int, seed: int) -> tuple[SDTH, History]:
    """Train one model. The test set is measured for the curve only: nothing is chosen by it, the last epoch counts."""
    train_data, test_data = load_data()
    images, labels = train_data.tensors
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)  # order and shifts: the same for every kind
    model = build_model(decay)
    optimizer = build_optimizer(model)
    steps = epochs * -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    history = History()
    progress = tqdm(range(epochs), desc=f"decay {decay}, seed {seed}", unit="epoch")
    for _ in progress:
        model.train()
        total_loss, num_correct = 0.0, 0
        for batch in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            logits = model(shift(images[batch], generator))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item() * len(batch)
            num_correct += int((logits.argmax(-1) == labels[batch]).sum())
        history.loss.append(total_loss / len(images))
        history.train_accuracy.append(100 * num_correct / len(images))
        history.test_accuracy.append(evaluate(model, test_data))
        progress.set_postfix(loss=f"{history.loss[-1]:.3f}", test=f"{history.test_accuracy[-1]:.2f} %")
    return model, history


def save_pictures(model: SDTH, history: History, curve_path: Path, maps_path: Path) -> None:
    """The training curve, and the decay maps of the last layer on 8 x 8 tokens for two test images."""
    curve = viz.plot_training_curve(
        {
            "cross-entropy, smoothed labels (nats)": {"train, shifted": history.loss},
            "accuracy (%)": {"train, shifted": history.train_accuracy, "test": history.test_accuracy},
        }
    )
    curve.savefig(curve_path, dpi=150)
    images = load_data()[1].tensors[0][:2]
    model.eval()
    layer = [layer for layer in viz.record(model, images) if layer.layout.size == (8, 8)][-1]
    queries = [(image, h, w) for image in range(len(images)) for h, w in ((3, 4), (6, 1))]
    viz.plot_decay_maps(layer, images, queries).savefig(maps_path, dpi=150)


def compare(*, epochs: int, seeds: Sequence[int]) -> dict[KindName, list[float]]:
    """Test accuracy in percent after the last epoch, of each mechanism and seed; the recipe is the same for all."""
    return {kind: [train(kind, epochs=epochs, seed=seed)[1].test_accuracy[-1] for seed in seeds] for kind in MECHANISMS}


def format_table(results: Mapping[KindName, Sequence[float]]) -> str:
    """Accuracies in percent, kind -> one a seed, as Markdown in the form of the paper's Tables 3 and 4."""
    lines = ["| Decay mechanism | `decay` | Acc (%) |", "|---|---|---|"]
    for kind, accuracies in results.items():
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        lines.append(f"| {MECHANISMS[kind]} | `{kind}` | {statistics.mean(accuracies):.2f}{spread} |")
    return "\n".join(lines)


def describe(*, epochs: int, seeds: Sequence[int]) -> str:
    """What the numbers of a comparison stand on, in one paragraph."""
    return (
        f"Test accuracy on scikit-learn's digits after the last of {epochs} epochs: mean ± standard deviation over "
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}). One of the 397 test images is 0.25 points. "
        f"torch {torch.__version__}, {datetime.date.today().isoformat()}."
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small SDT-H on scikit-learn's 8 x 8 digits.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--decay", choices=KINDS, default="full", help="kind of decay (default: full)")
    what.add_argument("--compare", action="store_true", help="train the mechanisms of Tables 3 and 4, 3 seeds each")
    parser.add_argument("--epochs", type=at_least(1), default=15, help="default: 15")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of --compare: the first of three (default: 0)")
    parser.add_argument("--threads", type=at_least(1), help="of torch; 1 if the CPU is shared (default: torch's own)")
    parser.add_argument(
        "--output", type=folder, default=Path("outputs"), help="for results, new for old (default: outputs)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[KindName, list[float]]:
    """Run the command line; test accuracies in percent after the last epoch, kind -> one a seed."""
    arguments = parse_arguments(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    epochs, seed, output = arguments.epochs, arguments.seed, arguments.output
    output.mkdir(parents=True, exist_ok=True)
    if arguments.compare:
        seeds = range(seed, seed + NUM_SEEDS)
        results = compare(epochs=epochs, seeds=seeds)
        text = f"{format_table(results)}\n\n{describe(epochs=epochs, seeds=seeds)}\n"
        (output / "compare.md").write_text(text, encoding="utf-8")
        print(text, end="")
        return results
    model, history = train(arguments.decay, epochs=epochs, seed=seed)
    curve, maps = (output / f"{arguments.decay}-{seed}-{name}.png" for name in ("training_curve", "decay_maps"))
    save_pictures(model, history, curve, maps)
    accuracy = history.test_accuracy[-1]
    print(f"test accuracy of decay {arguments.decay} after {epochs} epochs: {accuracy:.2f} %")
    print(f"pictures: {curve}, {maps}")
    return {arguments.decay: [accuracy]}


if __name__ == "__main__":
    main()
